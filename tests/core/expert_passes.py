"""Experts run on a case, and all that comes of it, for the tests of every backend."""

import torch
from torch import Tensor

from mixtura.core.dispatch import experts_forward


def by_backend(case: dict, backend: str) -> Tensor:
    return experts_forward(
        case["x"],
        case["up"],
        case["down"],
        case["indices"],
        case["weights"],
        gate_up_bias=case["up_bias"],
        down_bias=case["down_bias"],
        backend=backend,
    )


def everything(case: dict, forward) -> dict[str, Tensor]:
    """Output and every gradient by name. The loss is not symmetric, so that a transposed gradient shows."""
    leaves = {name: t for name, t in case.items() if t is not None and t.requires_grad}
    y = forward(case)
    scale = torch.arange(1, y.numel() + 1, dtype=y.dtype, device=y.device).view_as(y) / max(y.numel(), 1)
    grads = torch.autograd.grad((y * scale).sum() + y.square().sum(), list(leaves.values()), allow_unused=True)
    return {"y": y.detach()} | {
        f"{name}.grad": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
