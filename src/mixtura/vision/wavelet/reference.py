"""Weights of the authors' package (PyPI ``wavemix``) in models of this library.

Their files are pickled state dicts, which nothing here opens; convert one to safetensors where it is trusted, and name that.
"""

from pathlib import Path
from typing import TypeVar

from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["load_reference_checkpoint", "renamed"]

M = TypeVar("M", bound=nn.Module)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of this library for the tensors of the authors' models.

    Args:
        state: theirs: ``conv.*``, ``layers.<i>.feedforward[<level>].*``, ``layers.<i>.reduction.*``, ``pool.*``, or the
            heads of their segmentation and super-resolution models.
    """
    found = {}
    for name, tensor in state.items():
        parts = name.removeprefix("module.").split(".")
        if parts[0] == "layers" and parts[2].startswith("feedforward"):
            level = int(parts[2].removeprefix("feedforward") or 1) - 1
            parts = ["blocks", parts[1], "mixing", str(level), *parts[3:]]
        elif parts[0] == "layers":
            parts[0] = "blocks"
        elif parts[0] == "conv":
            parts[0] = "stem"
        elif parts[0] == "pool":  # pooling, a rearrangement, a linear layer
            parts = ["head", *parts[2:]]
        elif parts[0] == "expand":
            parts[0] = "head"
        found[".".join(parts)] = tensor
    return found


def load_reference_checkpoint(model: M, path: str | Path) -> M:
    """Fill ``model`` with the authors' weights, in place.

    Args:
        model: a :class:`WaveletClassifier` or another of this package, of the same widths, depth and levels.
        path: safetensors file with the names of the authors' package.
    Returns:
        the model.
    Raises:
        ValueError: the file is pickled, or of another model (first tensor that differs named).
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no safetensors file, and pickled weights are not opened here; convert it where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), ...)"
        )
    found, want = renamed(load_file(path)), model.state_dict()
    for name in [*want, *(name for name in found if name not in want)]:
        here = tuple(want[name].shape) if name in want else "nothing"
        there = tuple(found[name].shape) if name in found else "nothing"
        if here != there:
            raise ValueError(f"{path} holds another model: {name} is {here} here and {there} there")
    model.load_state_dict(found)
    return model
