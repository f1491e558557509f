"""Read a dense model, in memory or on disk, as a config of our decoder and a function from names to tensors.

Nothing is copied: a tensor comes when it is asked for, from the model or from the file, so that a model can be converted
layer by layer without being held twice.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from mixtura.lm.families.dense import FAMILIES, Source
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM

__all__ = ["Dense", "NotDense", "UnsupportedFamily", "parameter_shapes", "read_dense"]

EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "attention_experts")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class UnsupportedFamily(ValueError):
    """The model belongs to no family that can be read; the message names it and says what would do."""


class NotDense(ValueError):
    """The model is already a mixture of experts."""


@dataclass(frozen=True)
class Dense:
    """A dense model in the decoder's own words.

    Attributes:
        config: a dense ``MixturaConfig``.
        tensor: parameter of the dense ``MixturaForCausalLM`` by name; may share memory with the model it was read from.
        shapes: every parameter's name and shape, in the order of the layers.
        dtype: of the weights.
        family: what it was read from, as transformers names it.
        generation_config: defaults of ``generate`` that came with the model.
        name: the class or the path, for messages.
    """

    config: MixturaConfig
    tensor: Source
    shapes: dict[str, torch.Size]
    dtype: torch.dtype
    family: str
    generation_config: GenerationConfig | None
    name: str


def read_dense(model: PreTrainedModel | str | Path) -> Dense:
    """Read a dense causal language model.

    Args:
        model: a model in memory, a directory with ``config.json`` and safetensors, or a name on the Hugging Face hub.
    Raises:
        UnsupportedFamily: of a family that is not known here.
        NotDense: a mixture of experts.
        ValueError: quantized weights, or a variant of the family that cannot be expressed; the message names it.
        FileNotFoundError: the path holds no checkpoint.
        TypeError: neither a model nor a path.
    """
    if isinstance(model, (str, Path)):
        folder = _folder(model)
        config = AutoConfig.from_pretrained(folder)
        _refuse(config, str(model))
        source, dtype = _stored(folder)
        generation = GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None
        return _dense(config, source, dtype, generation, str(model))
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model or a path, got {type(model).__name__}")
    _refuse(model.config, type(model).__name__)
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{type(model).__name__} has quantized weights; load it without quantization_config")
    state = model.state_dict()
    return _dense(model.config, state.__getitem__, model.dtype, model.generation_config, type(model).__name__)


def parameter_shapes(config: MixturaConfig) -> dict[str, torch.Size]:
    """Names and shapes of the parameters of ``MixturaForCausalLM(config)``, tied ones once, without allocating them."""
    with torch.device("meta"):
        model = MixturaForCausalLM(config)
    return {name: p.shape for name, p in model.named_parameters()}


def _dense(config: Any, source: Source, dtype: torch.dtype, generation: GenerationConfig | None, name: str) -> Dense:
    family = FAMILIES[config.model_type]
    ours = MixturaConfig(**family.fields(config))
    shapes = parameter_shapes(ours)

    def tensor(key: str) -> Tensor:
        found = family.tensor(key, source, config).detach()
        if found.shape != shapes[key]:
            raise ValueError(f"{name}: {key} has shape {tuple(found.shape)}, its config says {tuple(shapes[key])}")
        return found

    return Dense(ours, tensor, shapes, dtype, config.model_type, generation, name)


def _refuse(config: Any, name: str) -> None:
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{name} is quantized; convert the unquantized checkpoint and quantize the result")
    field = next((f for f in EXPERT_FIELDS if _several(getattr(config, f, None))), None)
    if field is not None:
        raise NotDense(
            f"{name} (model_type {config.model_type!r}) is already a mixture of experts with "
            f"{field}={getattr(config, field)}; a dense model is needed. `train` and `compress` take it as it is"
        )
    if config.model_type not in FAMILIES:
        raise UnsupportedFamily(
            f"{name} is of the family {config.model_type!r}, which cannot be read; known families: "
            f"{', '.join(f'{t.title} ({k})' for k, t in FAMILIES.items())}"
        )


def _several(count: Any) -> bool:
    """More than one expert, in some layer where they are counted by layer."""
    return (max(count, default=0) if isinstance(count, (list, tuple)) else count or 0) > 1


def _folder(model: str | Path) -> Path:
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"{folder} holds no checkpoint: config.json is missing")
        return folder
    if folder.is_absolute() or folder.exists() or str(model).startswith(".") or str(model).count("/") > 1:
        raise FileNotFoundError(f"{folder} is not a directory with a checkpoint")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors"]))


def _stored(folder: Path) -> tuple[Source, torch.dtype]:
    """Tensors of a checkpoint. Each maps its file anew and lets go of it when dropped: pages read count as memory in use."""
    if (folder / INDEX).exists():
        files: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    elif (folder / SINGLE).exists():
        with _opened(folder / SINGLE) as file:
            files = dict.fromkeys(file.keys(), SINGLE)
    else:
        raise FileNotFoundError(
            f"{folder} holds no safetensors weights ({SINGLE} or {INDEX}); pickled ones are not read"
        )

    def source(name: str) -> Tensor:
        if name not in files:
            raise KeyError(name)
        with _opened(folder / files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    first = next(iter(files))
    return _checked(source, folder), source(first).dtype


def _checked(source: Source, folder: Path) -> Source:
    """Fall back on transformers' own loading where the file's names are not the model's."""
    loaded: list[dict[str, Tensor]] = []

    def tensor(name: str) -> Tensor:
        if loaded:
            return loaded[0][name]
        try:
            return source(name)
        except KeyError:
            loaded.append(AutoModelForCausalLM.from_pretrained(folder).state_dict())
            return loaded[0][name]

    return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """``safe_open`` whose failure names the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or cut short ({error}); copy or download it again") from error
