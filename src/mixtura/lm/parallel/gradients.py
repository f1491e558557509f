"""The gradient rule: what each process computed becomes the gradient of the loss over all tokens.

Each process has a loss whose mean over processes is the loss of all tokens (:mod:`mixtura.core.shared_batch`). Then

- a parameter that all processes hold gets the sum of its gradients over all of them, divided by their number W;
- an expert gets the sum over its copies, divided by W too and not by the number of copies: each copy has already seen the
  tokens of all processes that it shares the experts with.

Source: DeepSpeed-MoE (2201.05596), sec. 4.1.3; the divisor as in DeepSpeed PR 6546, which mended it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mixtura.lm.parallel.experts import parallel_experts
from mixtura.lm.parallel.mesh import ExpertMesh

__all__ = ["Rule", "clip_gradients", "expert_rules", "reduce_gradients"]

BUCKET = 32 * 2**20  # bytes of gradients that travel together


@dataclass(frozen=True)
class Rule:
    """How the gradients of a parameter are brought together."""

    group: dist.ProcessGroup | None  # processes that hold a copy of it
    copies: int  # their number
    divisor: int  # of the sum over the group


def expert_rules(model: nn.Module) -> dict[nn.Parameter, Rule]:
    """The rules of the parameters of which each process holds its own part."""
    found = {}
    for _, module in parallel_experts(model):
        rule = Rule(module.mesh.group("expert_data"), module.mesh.expert_data, module.divisor)
        for name in module.stacked:
            found[getattr(module.local_experts, name)] = rule
    return found


def reduce_gradients(model: nn.Module, mesh: ExpertMesh) -> None:
    """Sum and divide the gradients of all trained parameters by the rule, in place. Collective.

    A parameter that got no gradient anywhere keeps None; one that got it somewhere counts 0 elsewhere. What FSDP shards is left
    alone: it was averaged in the backward pass.
    """
    trained = [p for p in model.parameters() if p.requires_grad and not _averaged(p)]
    if mesh.world == 1 or not trained:
        return
    experts, everyone = expert_rules(model), Rule(mesh.group("world"), mesh.world, mesh.world)
    parts = mesh.world // mesh.tensor
    sliced = Rule(mesh.group("data"), parts, parts)  # cut over the tensor axis: copies hold other rows
    _fill_missing(trained, everyone.group)
    buckets: dict[tuple[Rule, torch.dtype], list[Tensor]] = defaultdict(list)
    for p in trained:
        if isinstance(p.grad, DTensor) and isinstance(p, DTensor) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)  # that of a sliced embedding comes whole
        if p.grad is not None:
            rule = sliced if isinstance(p, DTensor) else experts.get(p, everyone)
            buckets[rule, p.grad.dtype].append(_local(p.grad))
    for (rule, _), gradients in buckets.items():
        for part in _parts(gradients):
            _sum(part, rule.group)
            torch._foreach_div_(part, rule.divisor)


def clip_gradients(model: nn.Module, mesh: ExpertMesh, limit: float) -> Tensor:
    """Scale the gradients so that their norm over all parameters of the whole model is at most ``limit``. Collective.

    Returns:
        The norm before, the same in every process; gradients are left alone where it is not finite, or ``limit`` is 0.
    """
    experts = expert_rules(model)
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for p in model.parameters():
        if p.grad is not None:
            copies = experts[p].copies if p in experts else mesh.world
            # Every copy counts, so each counts its share.
            total += torch.linalg.vector_norm(_local(p.grad)).double().square() * _shards(p) / copies
    if (world := mesh.group("world")) is not None:
        dist.all_reduce(total, group=world)
    norm = total.sqrt()
    if limit and bool(norm.isfinite()):
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
        for p in model.parameters():
            if p.grad is not None:
                _local(p.grad).mul_(scale.to(p.grad.dtype))
    return norm


def _averaged(p: nn.Parameter) -> bool:
    """Whether FSDP brings the parameter's gradients together in the backward pass."""
    return isinstance(p, DTensor) and p.device_mesh.mesh_dim_names != ("tensor",)


def _shards(p: nn.Parameter) -> int:
    """Parts that torch has cut a parameter into, those of the mesh's own cutting of experts not counted."""
    if not isinstance(p, DTensor):
        return 1
    return math.prod(n for n, place in zip(p.device_mesh.shape, p.placements, strict=True) if not place.is_replicate())


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _sum(gradients: list[Tensor], group: dist.ProcessGroup | None) -> None:
    if group is None:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def _parts(gradients: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    part: list[Tensor] = []
    size = 0
    for gradient in gradients:
        part.append(gradient)
        size += gradient.numel() * gradient.element_size()
        if size >= BUCKET:
            yield part
            part, size = [], 0
    if part:
        yield part


def _fill_missing(parameters: list[nn.Parameter], world: dist.ProcessGroup | None) -> None:
    seen = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(seen, dist.ReduceOp.MAX, group=world)
    for p, somewhere in zip(parameters, seen.tolist(), strict=True):
        if p.grad is None and somewhere:
            p.grad = torch.zeros_like(p)
