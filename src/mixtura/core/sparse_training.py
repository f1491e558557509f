"""Training that keeps a model sparse: static masks, or masks that move (SET, RigL).

After every ``every`` steps the smallest active weights are dropped and as many others grown: where the gradient is largest
(RigL) or at random (SET). The number of active weights of a layer never changes. Grown weights and their optimizer state
start at zero.

Order within a step, as in the authors' code: masked gradients, the optimizer's step, then the masks move by the weights after
that step and the gradient, unmasked, of that same step.

Parameters that FSDP2 cuts in rows have masks that are cut likewise, and moves are those of one process, to the unit
(:mod:`~mixtura.core.mask_moves`).

Source: Evci et al. 2020 (1911.11134), sec. 3, alg. 1; SET: Mocanu et al. 2018 (1707.04780); the masks' union over training:
Liu et al. 2021 (2102.02887), sec. 2.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixtura.core.joint_decay import JointDecay
from mixtura.core.mask_moves import drop_share, moved_mask
from mixtura.core.masks import Masked, Rows, cut_mask, input_axis, local, masked_parameters, rows_of

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
        n_m: (N, M) for masks with N active of every M neighbours along the axis of the inputs, which moves then keep: what
            drops is decided over the layer, and grows in the group that it dropped from. (0, 0): none.
        seed: where SET grows.
        joint_decay: the optimizer's weight decay acts on the product V U of doped layers, and of factorized ones with nothing
            between, and not on U and V (:mod:`~mixtura.core.joint_decay`). What is masked stays so, and growth does not see it.
    """

    method: Literal["rigl", "set", "static"] = "rigl"
    drop: float = 0.3
    every: int = 100
    end: float = 0.75
    n_m: tuple[int, int] = (0, 0)
    seed: int = 0
    joint_decay: bool = False

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


class MaskOptimizer:
    """An optimizer that keeps masked weights masked, and moves the masks.

    Call ``step()`` in place of the optimizer's. Learning-rate schedulers stay on the inner optimizer. Under DDP every process
    makes one of these after wrapping: masks are taken from rank 0 at the start and after every move, and gradients are averaged
    by DDP before growth looks at them. Under FSDP2 too, after ``fully_shard``: masks are taken from rank 0 and each process keeps
    the rows that it has of the parameter, from then on a DTensor in the module; moves are collective.

    Args:
        model: has masked weights (:func:`~mixtura.core.sparse_layers.masked_parameters`).
        optimizer: any whose state is tensors of the parameter's shape and scalars: SGD, Adam, AdamW, RMSprop and the like.
        config: how masks move.
        total_steps: length of the training.
    Raises:
        ValueError: no masked weight, ``every`` not below ``total_steps``, masks that do not have the pattern ``n_m``, nothing
            that ``joint_decay`` could act on, or, at the first step, an optimizer with state of another layout or one that moves
            weights without a gradient (it is named).
        TypeError: a parameter (DTensor) that is cut otherwise than in rows over one axis of processes.
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
        found = {n: m for n, m in masked_parameters(model).items() if id(m.parameter) in trained}
        if not found:
            raise ValueError(f"{type(model).__name__} has no masked weight that is trained; convert or widen it first")
        if config.method != "static" and config.every >= total_steps:
            raise ValueError(f"every={config.every} must be below total_steps={total_steps}, or the masks never move")
        self._rows: dict[str, Rows] = {name: rows_of(name, one.parameter) for name, one in found.items()}
        for name, one in found.items():
            _check_pattern(name, one.mask, config.n_m)
        self._joint = JointDecay(model, optimizer) if config.joint_decay else None
        _share(one.mask for one in found.values() if not hasattr(one.mask, "placements"))
        self.masked: Mapping[str, Masked] = {n: cut_mask(n, one, self._rows[n]) for n, one in found.items()}
        self.steps_done = 0
        self._dense: dict[str, Tensor] = {}
        self._ready = False
        self._union = {name: found.mask.clone() for name, found in self.masked.items()}
        # A product with bools takes five times as long as one with floats.
        self._factors = {name: local(one.mask).to(one.parameter.dtype) for name, one in self.masked.items()}
        self._settle(self.masked)

    @property
    def explored(self) -> float:
        """Share of the maskable weights that were active at some time; the density at first, and it only grows. Collective
        where parameters lie in several processes."""
        active = sum(int(self._rows[name].sum(local(union).sum())) for name, union in self._union.items())
        return active / sum(union.numel() for union in self._union.values())

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
            gradient = local(found.parameter.grad)
            if moves and self.config.method == "rigl":
                self._dense[name] = gradient.clone()
            gradient.mul_(self._factors[name])
        self._ready = True

    @torch.no_grad()
    def step(self) -> None:
        """The optimizer's step on the active weights; then, where it is time, the masks move."""
        if not self._ready:
            self.mask_gradients()
        with self._joint.instead() if self._joint else nullcontext():
            self.optimizer.step()
        if self.steps_done == 0:
            self._check_state()
        # Without gradient and state an inactive weight stays at zero, so only a move has to put weights there.
        self._settle(self._move() if self._moves() else ())
        self._dense, self._ready = {}, False
        self.steps_done += 1

    def state_dict(self) -> dict[str, Any]:
        """Masks, their union, the number of steps and the inner optimizer's state; cut as the parameters are."""
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
        """Take masks, their union and the number of steps, and leave the inner optimizer as it is.

        Masks may be whole, also where the parameters are not, or cut as they are.
        """
        self.steps_done = steps_done
        for name, found in self.masked.items():
            for mine, given in ((found.mask, masks[name]), (self._union[name], union[name])):
                local(mine).copy_(local(given) if hasattr(given, "placements") else self._rows[name].of(given))
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
                self._factors[name].copy_(local(self.masked[name].mask))
                local(self.masked[name].parameter).mul_(self._factors[name])
        for found in self.masked.values():
            found.settle()

    def _move(self) -> Iterable[str]:
        """Move the masks; names of the parameters whose mask moved."""
        share = drop_share(self.steps_done, self.config.end * self.total_steps, self.config.drop)
        # A stream for each step, so that a resumed run grows what an unbroken one grew.
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.steps_done)
        grown: dict[str, Tensor] = {}
        for name, found in self.masked.items():
            rows, mask = self._rows[name], local(found.mask)
            if self.config.method == "rigl":
                # Without a gradient (an expert that saw no token, a part out of use) a layer has nothing to grow by.
                if name not in self._dense:
                    continue
                score = self._dense[name].abs()
            else:
                score = rows.of(torch.rand(found.mask.shape, generator=generator)).to(mask.device)
            new, grown[name] = self._moved(found, mask, score, share, rows)
            mask.copy_(new)
        _share(found.mask for found in self.masked.values() if not hasattr(found.mask, "placements"))
        for name, new_ones in grown.items():
            found, rows = self.masked[name], self._rows[name]
            mask = local(found.mask)
            for copies in rows.copies:
                _share([mask], copies, rows.device)
            local(self._union[name]).logical_or_(mask)
            local(found.parameter).masked_fill_(new_ones, 0)
            for value in self.optimizer.state.get(found.parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == found.mask.shape:
                    local(value).mul_(mask & ~new_ones)
        return grown

    def _moved(self, found: Masked, mask: Tensor, score: Tensor, share: float, rows: Rows) -> tuple[Tensor, Tensor]:
        weight, n_m = local(found.parameter), self.config.n_m
        if found.layers == 1:
            return moved_mask(weight, mask, score, share, n_m=n_m, axis=input_axis(mask.shape), rows=rows)
        new, grown = torch.empty_like(mask), torch.empty_like(mask)
        for e in range(len(mask)):
            new[e], grown[e] = moved_mask(weight[e], mask[e], score[e], share, n_m=n_m)
        return new, grown

    def _check_state(self) -> None:
        for name, found in self.masked.items():
            if bool((local(found.parameter)[~local(found.mask)] != 0).any()):
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


def _share(masks: Iterable[Tensor], group: Any = None, device: str | None = None) -> None:
    """Take the masks of the first process of a group; of all processes, if there are any, by default."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        source = torch.distributed.get_global_rank(group, 0) if group is not None else 0
        for mask in masks:
            # As bytes: gloo has no broadcast of bools.
            sent = mask.to(device or mask.device, torch.uint8)
            torch.distributed.broadcast(sent, src=source, group=group)
            mask.copy_(sent)


def _check_pattern(name: str, mask: Tensor, n_m: tuple[int, int]) -> None:
    n, m = n_m
    if m == 0:
        return
    axis = input_axis(mask.shape)
    if mask.shape[axis] % m:
        raise ValueError(f"n_m={n_m}: {m} does not divide the {mask.shape[axis]} inputs of {name}, {tuple(mask.shape)}")
    if not bool((local(mask).movedim(axis, -1).reshape(-1, m).sum(-1) == n).all()):
        raise ValueError(
            f"n_m={n_m}: the mask of {name} does not have {n} active of every {m} inputs; convert with IsoFlop(..., n_m={n_m}) "
            "or draw it with draw_mask"
        )
