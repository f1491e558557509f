"""``--parallel hecate``: the training loop's team whose experts are sharded whole, with copies of the busy ones.

    hecate                                   # room and overlap measured, owners dealt out anew every 100 steps
    hecate,overlap=8,capacity=4,reshard=50   # by hand
    hecate,free=1                            # copies freed between the passes

Source: Hecate (2502.02581), sec. 4.
"""

from __future__ import annotations

import torch
from torch import nn

from mixtura.lm.parallel.mesh import ExpertMesh
from mixtura.lm.parallel.sharded_experts import reshard, shard_experts
from mixtura.lm.parallel.training import ExpertParallel

__all__ = ["Sharded"]

WORDS = ("overlap", "capacity", "reshard", "free")


class Sharded(ExpertParallel):
    """Processes that each own whole experts, and copy others' for an iteration.

    Args:
        mesh: of experts alone.
        overlap, capacity: see :func:`~mixtura.lm.parallel.sharded_experts.shard_experts`.
        every: steps between looks at who owns what; 0: never.
        free: free copies between the passes.
        shard: shard what is no expert (FSDP2).
    """

    def __init__(
        self,
        mesh: ExpertMesh,
        *,
        overlap: int | None = None,
        capacity: int | None = None,
        every: int = 100,
        free: bool = False,
        shard: bool = True,
    ) -> None:
        super().__init__(mesh, form="E+D+Z" if shard else "E+D")
        self.overlap, self.capacity, self.every, self.free = overlap, capacity, every, free

    @classmethod
    def of(cls, layout: str, mesh: ExpertMesh) -> Sharded:
        """The team that words like ``hecate,capacity=4`` describe.

        Raises:
            ValueError: an unknown or repeated word, or no whole number.
        """
        given: dict[str, int] = {}
        for part in layout.split(",")[1:]:
            word, _, value = (piece.strip() for piece in part.partition("="))
            if word not in WORDS or not value.isdecimal() or word in given:
                raise ValueError(
                    f"hecate takes {', '.join(f'{w}=N' for w in WORDS)}, each once, separated by commas; got {part.strip()!r}"
                )
            given[word] = int(value)
        return cls(
            mesh,
            overlap=given.get("overlap"),
            capacity=given.get("capacity"),
            every=given.get("reshard", 100),
            free=bool(given.get("free", 0)),
        )

    def prepare(self, model: nn.Module) -> None:
        """Leave in each process its part of the model, in place. Collective."""
        shard_experts(model, self.mesh, overlap=self.overlap, capacity=self.capacity, rematerialize=self.free)
        self.adopt(model)

    def settle(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.every and (step + 1) % self.every == 0:
            optimizer.zero_grad(set_to_none=True)
            reshard(model, optimizer)

    def __str__(self) -> str:
        return f"{self.mesh.world} processes (experts sharded, busy ones copied)"
