"""Copies of experts in one pass: there, freed and fetched again, and their gradients on the way home.

Shapes: as in :mod:`mixtura.lm.parallel.sparse_collectives`.
Source: Hecate (2502.02581), sec. 4.3 (re-materialization).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mixtura.lm.parallel.experts import ParallelExperts
from mixtura.lm.parallel.sparse_collectives import Summing, Transfer, sparse_all_gather, sparse_reduce_scatter

__all__ = ["Copies", "FetchAgain", "Flights", "Materialize"]


class Copies:
    """The copies of one pass of one layer: there, freed, or fetched again."""

    def __init__(self, layer: ParallelExperts, transfer: Transfer, stacks: dict[str, Tensor], flights: Flights):
        self.layer, self.transfer, self.stacks, self.flights = layer, transfer, stacks, flights
        self._storages = {s.untyped_storage().data_ptr(): name for name, s in stacks.items() if s.numel()}

    def saved_by_name(self) -> saved_tensors_hooks:
        """While it lasts, what autograd saves of the copies is saved as a name and a place."""

        def pack(t: Tensor) -> Any:
            name = self._storages.get(t.untyped_storage().data_ptr()) if t.numel() else None
            return t if name is None else (name, t.shape, t.stride(), t.storage_offset())

        def unpack(saved: Any) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            name, *place = saved
            return self.stacks[name].as_strided(*place)

        return saved_tensors_hooks(pack, unpack)

    def free(self) -> None:
        """Release their memory, though autograd still knows of them."""
        for stack in self.stacks.values():
            stack.untyped_storage().resize_(0)
        self.stacks = {}

    def fetch(self) -> None:
        """Bring them again. Collective."""
        layer, group = self.layer, self.layer.mesh.group("world")
        shards = {name: getattr(layer.local_experts, name).detach() for name in layer.stacked}
        coming = {name: sparse_all_gather(p, self.transfer, group) for name, p in shards.items()}
        self.stacks = {name: arriving.wait() for name, arriving in coming.items()}


class Flights:
    """Gradients under way, of at most one layer: the next layer's wait for the last one's, and the end of backward for all."""

    def __init__(self) -> None:
        self._pending: list[tuple[nn.Parameter, Tensor, Summing]] = []

    def start(self, gradients: list[tuple[nn.Parameter, Tensor, Summing]]) -> None:
        """Take a layer's: parameter, gradient computed here, sum that comes from elsewhere."""
        self.land()
        self._pending = gradients
        engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
        engine.queue_callback(self.land)

    def land(self) -> None:
        pending, self._pending = self._pending, []
        for parameter, own, elsewhere in pending:
            total = own + elsewhere.wait()
            parameter.grad = total if parameter.grad is None else parameter.grad + total


class Materialize(torch.autograd.Function):
    """Own experts -> own experts and copies of others'. Backward, the copies' gradients go home; sums land in ``.grad``.

    That it returns no gradient keeps autograd from waiting for them, and from caring that a parameter changes its shape when
    experts change owners.
    """

    @staticmethod
    def forward(ctx: Any, copies: Copies, *shards: Tensor) -> tuple[Tensor, ...]:
        ctx.copies = copies
        return (*(p.detach() for p in shards), *(copies.stacks[name] for name in copies.layer.stacked))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        copies: Copies = ctx.copies
        layer, n = copies.layer, len(copies.layer.stacked)
        group = layer.mesh.group("world")
        landing = []
        for name, own, away in zip(layer.stacked, grads[:n], grads[n:], strict=True):
            summing = sparse_reduce_scatter(away, copies.transfer, group)
            if (parameter := getattr(layer.local_experts, name)).requires_grad:
                landing.append((parameter, own, summing))
        copies.flights.start(landing)
        copies.stacks = {}
        return (None,) * (1 + n)


class FetchAgain(torch.autograd.Function):
    """The results of copies, unchanged; backward the copies are fetched again before anything needs them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, copies: Copies) -> Tensor:
        ctx.copies = copies
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.copies.fetch()
        return grad, None
