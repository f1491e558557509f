"""Training that keeps a model sparse: static masks, or masks that move (SET, RigL).

After every ``every`` steps the smallest active weights are dropped and as many others grown: where the gradient is largest
(RigL) or at random (SET). The number of active weights of a layer never changes. Grown weights and their optimizer state
start at zero.

Order within a step, as in the authors' code: masked gradients, the optimizer's step, then the masks move by the weights after
that step and the gradient, unmasked, of that same step.

Source: Evci et al. 2020 (1911.11134), sec. 3, alg. 1; SET: Mocanu et al. 2018 (1707.04780); the masks' union over training:
Liu et al. 2021 (2102.02887), sec. 2.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixtura.core.sparse_layers import Masked, masked_parameters

__all__ = ["METHODS", "MaskConfig", "MaskOptimizer", "drop_share", "moved_mask"]

METHODS = ("rigl", "set", "static")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """How masks move in a training.

    Attributes:
        method: ``"rigl"``, ``"set"`` or ``"static"`` (they stay).
        drop: share of a layer's active weights that the first move drops; falls to 0 along a cosine.
        every: steps between moves.
        end: share of the training after which masks stay.
        n_m: (N, M) for masks with N active of every M neighbours along the last axis, which moves then keep; (0, 0): none.
        seed: where SET grows.
    """

    method: Literal["rigl", "set", "static"] = "rigl"
    drop: float = 0.3
    every: int = 100
    end: float = 0.75
    n_m: tuple[int, int] = (0, 0)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {list(METHODS)}, got {self.method!r}")
        if not 0 <= self.drop < 1 or not 0 < self.end <= 1:
            raise ValueError(f"drop must be in [0, 1) and end in (0, 1], got {self.drop} and {self.end}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        n, m = self.n_m
        if (n, m) != (0, 0) and not 0 < n <= m:
            raise ValueError(f"n_m must be (N, M) with 0 < N <= M, got {self.n_m}")


def drop_share(step: int, end: float, drop: float = 0.3) -> float:
    """Share of the active weights that a move at ``step`` drops: drop / 2 (1 + cos(pi step / end)), 0 from ``end`` on.

    Source: RigL, sec. 3 (2).
    Example:
        >>> [round(drop_share(step, 100), 3) for step in (0, 50, 100)]
        [0.3, 0.15, 0.0]
    """
    return drop / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0


def moved_mask(
    weight: Tensor, mask: Tensor, score: Tensor, share: float, *, n_m: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """One move of one layer's mask.

    Args:
        weight: the layer's weight, any shape.
        mask: its mask, bool.
        score: where to grow, of the same shape: larger is sooner. RigL's is the size of the gradient.
        share: of the active weights to drop, rounded down to a whole number of them.
        n_m: keep N active of every M neighbours along the last axis: what a group drops grows in that group.
    Returns:
        The new mask, with as many active weights, and where it grew, both bool. A weight that was just dropped may grow
        again.
    """
    flat, old = weight.detach().abs().flatten(), mask.flatten()
    n_drop = int(share * int(old.sum()))
    kept = old.clone()
    kept[flat.masked_fill(~old, math.inf).topk(n_drop, largest=False).indices] = False
    sooner = score.flatten().masked_fill(kept, -math.inf)
    grown = torch.zeros_like(old)
    if n_m == (0, 0):
        grown[sooner.topk(n_drop).indices] = True
    else:
        groups = (-1, n_m[1])
        wanted = (old & ~kept).view(groups).sum(-1, keepdim=True)
        ranks = sooner.view(groups).argsort(-1, descending=True).argsort(-1)
        grown = (ranks < wanted).flatten()
    return (kept | grown).view_as(mask), grown.view_as(mask)


class MaskOptimizer:
    """An optimizer that keeps masked weights masked, and moves the masks.

    Call ``step()`` in place of the optimizer's. Learning-rate schedulers stay on the inner optimizer. Under DDP every process
    makes one of these after wrapping: masks are taken from rank 0 at the start and after every move, and gradients are averaged
    by DDP before growth looks at them.

    Args:
        model: has masked weights (:func:`~mixtura.core.sparse_layers.masked_parameters`).
        optimizer: any whose state is tensors of the parameter's shape and scalars: SGD, Adam, AdamW, RMSprop and the like.
        config: how masks move.
        total_steps: length of the training.
    Raises:
        ValueError: no masked weight, ``every`` not below ``total_steps``, masks that do not have the pattern ``n_m``, or, at the
            first step, an optimizer with state of another layout or one that moves weights without a gradient (it is named).
        TypeError: a sharded parameter (DTensor): a layer's largest weights are not to be found in one shard.
    Example:
        >>> from mixtura.core.sparse_layers import SparseLinear, draw_mask
        >>> layer = SparseLinear(8, 8)
        >>> layer.set_mask(draw_mask((8, 8), 16))
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = MaskOptimizer(layer, optimizer, MaskConfig(every=2), total_steps=10)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     layer(torch.randn(4, 8)).pow(2).sum().backward()
        ...     optimizer.step()
        >>> int(layer.mask.sum()), optimizer.explored > 0.25
        (16, True)
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: MaskConfig, *, total_steps: int
    ) -> None:
        self.optimizer, self.config, self.total_steps = optimizer, config, total_steps
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.masked: Mapping[str, Masked] = {
            name: found for name, found in masked_parameters(model).items() if id(found.parameter) in trained
        }
        if not self.masked:
            raise ValueError(f"{type(model).__name__} has no masked weight that is trained; convert or widen it first")
        if config.method != "static" and config.every >= total_steps:
            raise ValueError(f"every={config.every} must be below total_steps={total_steps}, or the masks never move")
        for name, found in self.masked.items():
            if hasattr(found.parameter, "placements"):
                raise TypeError(
                    f"{name} is sharded (DTensor), and masks move on whole layers; train with DDP or one process"
                )
            _check_pattern(name, found.mask, config.n_m)
        self.steps_done = 0
        self._dense: dict[str, Tensor] = {}
        self._ready = False
        self._share_masks()
        self._union = {name: found.mask.clone() for name, found in self.masked.items()}
        # A product with bools takes five times as long as one with floats.
        self._factors = {name: found.mask.to(found.parameter.dtype) for name, found in self.masked.items()}
        self._settle(self.masked)

    @property
    def explored(self) -> float:
        """Share of the maskable weights that were active at some time; the density at first, and it only grows."""
        return sum(int(union.sum()) for union in self._union.values()) / sum(u.numel() for u in self._union.values())

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none)
        self._dense, self._ready = {}, False

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Take the gradients of inactive weights away; ``step`` does it where nobody did. Clip gradients after this."""
        moves = self._moves()
        for name, found in self.masked.items():
            if found.parameter.grad is None:
                continue
            if moves and self.config.method == "rigl":
                self._dense[name] = found.parameter.grad.clone()
            found.parameter.grad.mul_(self._factors[name])
        self._ready = True

    @torch.no_grad()
    def step(self) -> None:
        """The optimizer's step on the active weights; then, where it is time, the masks move."""
        if not self._ready:
            self.mask_gradients()
        self.optimizer.step()
        if self.steps_done == 0:
            self._check_state()
        # Without gradient and state an inactive weight stays at zero, so only a move has to put weights there.
        self._settle(self._move() if self._moves() else ())
        self._dense, self._ready = {}, False
        self.steps_done += 1

    def state_dict(self) -> dict[str, Any]:
        """Masks, their union, the number of steps and the inner optimizer's state."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "masks": {name: found.mask.clone() for name, found in self.masked.items()},
            "union": {name: union.clone() for name, union in self._union.items()},
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``; the weights are the model's own.

        Raises:
            ValueError: masks of another model; the first name that differs is given.
        """
        if different := sorted(set(state["masks"]) ^ set(self.masked)):
            raise ValueError(f"the state holds masks of another model: {different[0]} is in one of the two only")
        self.optimizer.load_state_dict(state["optimizer"])
        self.restore(state["masks"], state["union"], state["steps_done"])

    def restore(self, masks: Mapping[str, Tensor], union: Mapping[str, Tensor], steps_done: int) -> None:
        """Take masks, their union and the number of steps, and leave the inner optimizer as it is."""
        self.steps_done = steps_done
        for name, found in self.masked.items():
            found.mask.copy_(masks[name])
            self._union[name].copy_(union[name])
        self._settle(self.masked)

    @property
    def union(self) -> Mapping[str, Tensor]:
        """By parameter name, where a weight was active at some time, bool."""
        return self._union

    def _moves(self) -> bool:
        due = self.steps_done > 0 and self.steps_done % self.config.every == 0
        return self.config.method != "static" and due and self.steps_done < self.config.end * self.total_steps

    def _settle(self, changed: Iterable[str]) -> None:
        """Put inactive weights to zero where masks changed, and tell every layer that they are."""
        with torch.no_grad():
            for name in changed:
                self._factors[name].copy_(self.masked[name].mask)
                self.masked[name].parameter.mul_(self._factors[name])
        for found in self.masked.values():
            found.settle()

    def _move(self) -> Iterable[str]:
        """Move the masks; names of the parameters whose mask moved."""
        share = drop_share(self.steps_done, self.config.end * self.total_steps, self.config.drop)
        # A stream for each step, so that a resumed run grows what an unbroken one grew.
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.steps_done)
        grown: dict[str, Tensor] = {}
        for name, found in self.masked.items():
            weight, mask = found.parameter, found.mask
            if self.config.method == "rigl":
                # Without a gradient (an expert that saw no token, a part out of use) a layer has nothing to grow by.
                if name not in self._dense:
                    continue
                score = self._dense[name].abs()
            else:
                score = torch.rand(mask.shape, generator=generator).to(mask.device)
            if found.layers > 1:
                moved = [moved_mask(weight[e], mask[e], score[e], share, n_m=self.config.n_m) for e in range(len(mask))]
                new, grown[name] = torch.stack([m for m, _ in moved]), torch.stack([g for _, g in moved])
            else:
                new, grown[name] = moved_mask(weight, mask, score, share, n_m=self.config.n_m)
            mask.copy_(new)
        self._share_masks()
        for name, new_ones in grown.items():
            found = self.masked[name]
            self._union[name] |= found.mask
            found.parameter.masked_fill_(new_ones, 0)
            for value in self.optimizer.state.get(found.parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == found.mask.shape:
                    value.mul_(found.mask & ~new_ones)
        return grown

    def _share_masks(self) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for found in self.masked.values():
                # As bytes: gloo has no broadcast of bools.
                sent = found.mask.to(torch.uint8)
                torch.distributed.broadcast(sent, src=0)
                found.mask.copy_(sent)

    def _check_state(self) -> None:
        for name, found in self.masked.items():
            if bool((found.parameter[~found.mask] != 0).any()):
                raise ValueError(
                    f"{type(self.optimizer).__name__} moved weights of {name} that had neither gradient nor state, so it cannot "
                    "keep them at zero; take one such as SGD or AdamW"
                )
            for key, value in self.optimizer.state.get(found.parameter, {}).items():
                plain = value is None or isinstance(value, (int, float)) or getattr(value, "numel", lambda: 0)() == 1
                if not plain and getattr(value, "shape", None) != found.parameter.shape:
                    raise ValueError(
                        f"{type(self.optimizer).__name__} keeps {key} of another shape than its parameter {name}, so its state "
                        "cannot be masked; take one that keeps a value a weight, such as SGD or AdamW"
                    )


def _check_pattern(name: str, mask: Tensor, n_m: tuple[int, int]) -> None:
    n, m = n_m
    if m == 0:
        return
    if mask.shape[-1] % m:
        raise ValueError(f"n_m={n_m}: {m} does not divide the last axis of {name}, {tuple(mask.shape)}")
    if not bool((mask.view(-1, m).sum(-1) == n).all()):
        raise ValueError(f"n_m={n_m}: the mask of {name} does not have {n} active of every {m}; draw it with draw_mask")
