"""Checkpoints in and out: every load is checked first, every save is whole or not at all."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from mixtura.core.checkpoint import atomic_directory, check_replaceable, read_json, verify_safetensors
from mixtura.core.measure import bfloat16_over_float32
from mixtura.lm.anatomy import find_moe
from mixtura.lm.card import model_card
from mixtura.lm.families.save import save_checkpoint

__all__ = [
    "CheckpointError",
    "directory_bytes",
    "empty_model",
    "load",
    "load_config",
    "load_tokenizer",
    "quick_dtype",
    "same_vocabulary",
    "save",
]

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("*token*", "*vocab*", "*merges*", "*.model", "*.tiktoken", "*.spm", "*.bpe")  # names in use


class CheckpointError(ValueError):
    """The path is no checkpoint that can be loaded; the message says what is missing and what would do."""


def load_config(source: str | Path) -> Any:
    """Configuration of a checkpoint: a directory, or the id of a model on the hub.

    Raises:
        CheckpointError: no directory and no id, a directory without ``config.json``, or code that would have to run.
    """
    path = Path(source)
    if path.is_file():
        raise CheckpointError(
            f"{source} is a file; give the directory that holds config.json and the safetensors files"
        )
    if path.is_dir():
        if not (path / "config.json").exists():
            raise CheckpointError(f"{source} is no checkpoint: it holds no config.json")
        if "auto_map" in read_json(path / "config.json"):
            log.warning(
                "%s names code of its own in auto_map; mixtura never runs it and uses transformers' classes", source
            )
        try:
            verify_safetensors(path)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        if not list(path.glob("*.safetensors")):
            raise CheckpointError(
                f"{source} holds no safetensors file; pickled weights (.bin, .pt) are not opened, "
                "since a pickle can run code. Convert them once with a tool that you trust"
            )
    elif len(path.parts) != 2 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(f"{source} does not exist, and is no hub id of the form owner/name")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be opened: {str(error).splitlines()[0]}") from error


def load_tokenizer(source: str | Path) -> Any:
    """Tokenizer of a checkpoint; its padding token is the end token where it has none.

    Raises:
        CheckpointError: a directory without one, or one that does not load.
    """
    if Path(source).is_dir() and not any(list(Path(source).glob(name)) for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{source} holds no tokenizer (tokenizer.json); copy the tokenizer's files there from the model it was made of, or "
            "save them with tokenizer.save_pretrained"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source} has no tokenizer that loads: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(
    source: str | Path, *, dtype: torch.dtype | str = "auto", device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint.

    Args:
        source: directory or hub id.
        dtype: type of the weights in memory. ``"auto"`` keeps the checkpoint's; ``"quick"``, for inference, does too, but for
            float32 where this processor multiplies 16-bit floats slower than that (see :func:`quick_dtype`), and gives a mixture
            on a CPU mixtura's experts engine.
        device: where the model goes.
    Raises:
        CheckpointError: what is wrong with the checkpoint; a damaged or foreign file is named.
    """
    config = load_config(source)
    quick = dtype == "quick"
    if quick:
        dtype = quick_dtype(getattr(config, "dtype", None), device)
    try:
        model = _auto(config).from_pretrained(source, dtype=dtype, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{source} cannot be loaded: {str(error).splitlines()[0]}") from error
    if quick and torch.device(device).type == "cpu" and find_moe(model):
        import mixtura.lm.experts_forward  # noqa: F401 (registers the engine)

        model.set_experts_implementation("mixtura")
    return model.to(device), load_tokenizer(source)


def quick_dtype(stored: torch.dtype | str | None, device: str | torch.device) -> torch.dtype | str:
    """Type to compute in: the stored one, or float32 on a processor that multiplies 16-bit floats slower than that.

    Every 16-bit value is a float32 value, so nothing is lost; memory doubles.
    """
    half = stored in (torch.bfloat16, torch.float16, "bfloat16", "float16")
    if half and torch.device(device).type == "cpu" and bfloat16_over_float32() < 0.7:
        return torch.float32
    return stored or "auto"


def empty_model(config: Any) -> Any:
    """The model of a configuration without its weights (on the meta device), for counting."""
    with torch.device("meta"):
        return _auto(config).from_config(config)


def _auto(config: Any) -> Any:
    """The Auto class of what generates text: behind an encoder, or by itself."""
    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def save(model: Any, tokenizer: Any, path: str | Path, *, card: Mapping[str, Any]) -> Path:
    """Write model, tokenizer and model card; ``path`` changes only when all of it is on the disk.

    Args:
        model, tokenizer: what to write.
        path: directory to create or replace.
        card: fields of :func:`mixtura.lm.card.model_card`.
    Raises:
        ValueError: ``path`` is a directory of other things, which would be lost.
    """
    path = Path(path)
    check_replaceable(path, "config.json")
    with atomic_directory(path) as beside:
        save_checkpoint(model, beside, shard_bytes=shard_size(model))
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        (beside / "README.md").write_text(model_card(**card), encoding="utf-8")
    return path


def shard_size(model: Any) -> int:
    """Largest bytes a shard: a twentieth of the model, which saving then copies at a time, and at least 100 MB."""
    whole = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return max(100_000_000, math.ceil(whole / 20))


def same_vocabulary(sources: Sequence[str], tokenizers: Sequence[Any]) -> None:
    """Refuse tokenizers that do not all have the vocabulary of the first; the first token that differs is named."""
    first = tokenizers[0].get_vocab()
    for source, tokenizer in zip(sources[1:], tokenizers[1:], strict=True):
        other = tokenizer.get_vocab()
        if other != first:
            token = min(set(first.items()) ^ set(other.items()), key=lambda pair: (pair[1], pair[0]))[0]
            raise ValueError(
                f"the tokenizers of {sources[0]} and {source} differ: {token!r} is {first.get(token)} in the first "
                f"and {other.get(token)} in the second; they must share one tokenizer"
            )


def directory_bytes(path: str | Path) -> int:
    """Bytes of the weights below a checkpoint directory."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
