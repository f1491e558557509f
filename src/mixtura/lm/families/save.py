"""Write a checkpoint shard by shard.

``save_pretrained`` of transformers 5.23 first turns *all* stacked experts into the family's tensors, one an expert, which
copies half of a mixture. Here each shard is converted by itself, so writing takes no more than one shard of memory.
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

__all__ = ["save_checkpoint"]

INDEX = "model.safetensors.index.json"


def save_checkpoint(model: PreTrainedModel, folder: str | Path, *, shard_bytes: int = 500_000_000) -> None:
    """Write what ``model.save_pretrained(folder)`` writes, with the memory of one shard.

    Args:
        model: any transformers model in memory.
        folder: directory, made where it is not there. To be safe from an interrupt write into
            :func:`mixtura.core.checkpoint.atomic_directory`.
        shard_bytes: largest shard, unless a single parameter is larger.
    Raises:
        ValueError: shard_bytes < 1.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    state = model.state_dict()
    shards = _shards(model, state, shard_bytes)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    # What the weights are now: a cast leaves the config at the type they were loaded in, and loading would go back to that.
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    files: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = revert_weight_conversion(model, {name: state[name] for name in names})
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(_bytes(state[name]) for names in shards for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(model: PreTrainedModel, state: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, cut where the limit would be passed; a tied tensor stands once."""
    tied = set(model.all_tied_weights_keys)
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in state.items():
        if name in tied:
            continue
        if shards[-1] and size + _bytes(tensor) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(tensor)
    return shards


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
