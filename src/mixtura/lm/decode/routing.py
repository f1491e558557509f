"""Rules that choose other experts than the gate would: fewer, more, a lesser one, a random one.

Shapes: B rows of a batch, T tokens (B times the positions), E experts, K experts that the gate chooses.
Source: SCMoE (2405.14507), eq. 3-4 and sec. 3.1; dynamic routing: Huang et al. 2024 (2403.07652), eq. 4.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from mixtura.core.gates import Routing
from mixtura.lm.anatomy import MoEBlock, find_moe, rerouted

__all__ = ["Renorm", "RoutingRule", "routed"]

Renorm = bool | Literal["as_model"]
Kind = Literal["default", "top", "ranks", "random", "threshold"]


@dataclass(frozen=True)
class RoutingRule:
    """Which experts a token visits instead of the gate's choice; made by the methods below.

    Example:
        >>> RoutingRule.rank(2)
        RoutingRule(kind='ranks', values=(2,))
    """

    kind: Kind
    values: tuple[float, ...] = ()

    @classmethod
    def default(cls) -> "RoutingRule":
        """What the gate decides, weights and all."""
        return cls("default")

    @classmethod
    def top(cls, k: int) -> "RoutingRule":
        """The k experts that the gate ranks highest."""
        if k < 1:
            raise ValueError(f"top(k) needs k >= 1, got {k}")
        return cls("top", (int(k),))

    @classmethod
    def rank(cls, k: int) -> "RoutingRule":
        """Exactly one expert, the k-th from the top; the best is 1."""
        return cls.ranks([k])

    @classmethod
    def ranks(cls, ks: Sequence[int]) -> "RoutingRule":
        """The experts at these ranks; the best is 1."""
        ranks = tuple(int(k) for k in ks)
        if not ranks or min(ranks) < 1 or len(set(ranks)) < len(ranks):
            raise ValueError(f"ranks must be different from each other and at least 1, got {list(ks)}")
        return cls("ranks", ranks)

    @classmethod
    def random(cls, n: int = 1) -> "RoutingRule":
        """n different experts drawn evenly, anew for every token and layer."""
        if n < 1:
            raise ValueError(f"random(n) needs n >= 1, got {n}")
        return cls("random", (int(n),))

    @classmethod
    def threshold(cls, tau: float) -> "RoutingRule":
        """The fewest best experts whose probabilities sum to more than tau (dynamic routing)."""
        if not 0 < tau < 1:
            raise ValueError(f"threshold(tau) needs 0 < tau < 1, got {tau}")
        return cls("threshold", (float(tau),))

    def check(self, blocks: Sequence[MoEBlock]) -> None:
        """Raise a ValueError where a layer has too few experts for this rule."""
        if self.kind in ("default", "threshold"):
            return
        wanted = int(max(self.values))
        for block in blocks:
            if wanted > block.n_experts:
                raise ValueError(f"{self} needs {wanted} experts, and {block.name} has {block.n_experts}")

    def choose(
        self, block: MoEBlock, routing: Routing, renorm: Renorm, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Weights and indices of T tokens, each (T, K'); a place without an expert has weight 0."""
        if self.kind == "default":
            return routing.weights, routing.indices
        indices_TK, kept_TK = self._places(block, routing, generator)
        sums_to_one = renorm is True or (renorm == "as_model" and bool(block.scoring.renormalises))
        if sums_to_one and indices_TK.shape[1] == 1:
            # Exactly 1, also where the probability underflows to 0.
            weights_TK = routing.weights.new_ones(indices_TK.shape)
        else:
            weights_TK = block.probabilities(routing).gather(-1, indices_TK)
            if kept_TK is not None:
                weights_TK = weights_TK * kept_TK
            if sums_to_one:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        if kept_TK is not None:
            # The row's own first expert again, with weight 0: engines that loop over the experts hit read nothing new.
            indices_TK = torch.where(kept_TK, indices_TK, indices_TK[:, :1])
        if block.scale != 1:
            weights_TK = weights_TK * block.scale
        if block.expert_scale is not None:
            weights_TK = weights_TK * block.expert_scale[indices_TK]
        return weights_TK.to(routing.weights.dtype), indices_TK

    def _places(
        self, block: MoEBlock, routing: Routing, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        T, E = routing.logits.shape
        if self.kind == "random":
            drawn = torch.rand(T, E, generator=generator, device=routing.logits.device)
            return drawn.topk(int(self.values[0]), dim=-1).indices, None
        order_TE = block.scores(routing).argsort(dim=-1, descending=True, stable=True)
        if self.kind == "top":
            return order_TE[:, : int(self.values[0])], None
        if self.kind == "ranks":
            return order_TE[:, [int(k) - 1 for k in self.values]], None
        probs_TE = block.probabilities(routing).gather(-1, order_TE)
        probs_TE = probs_TE / probs_TE.sum(-1, keepdim=True)
        before_TE = probs_TE.cumsum(-1) - probs_TE
        kept_TE = before_TE <= self.values[0]
        most = int(kept_TE.sum(-1).max())
        return order_TE[:, :most], kept_TE[:, :most]


@contextmanager
def routed(
    model: nn.Module | Sequence[MoEBlock],
    rule: RoutingRule | Sequence[RoutingRule],
    *,
    renorm: Renorm = True,
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Apply a rule to every mixture layer and every position of the forward passes inside the block.

    Args:
        model: any mixture of experts, or its blocks where they are known; it is left as it was, also after an exception.
        rule: one rule, or one for each row of the batch.
        renorm: make the chosen weights sum to 1 (times the gate's scaling factor): a single expert then has weight 1, as in
            eq. 4. ``False`` keeps the gate's scores; ``"as_model"`` does what the gate does, which is what the authors'
            DeepSeek code ran.
        generator: draws of ``RoutingRule.random``.
    Raises:
        ValueError: a dense model (its class is named), a rank beyond the experts, rules that do not fit the batch, or
            ``"as_model"`` for a gate whose weights are neither its scores nor their shares.
    """
    if renorm not in (True, False, "as_model"):
        raise ValueError(f"renorm must be True, False or 'as_model', got {renorm!r}")
    rules = [rule] if isinstance(rule, RoutingRule) else list(rule)
    if not rules:
        raise ValueError("rule must name at least one rule, got none")
    blocks = find_moe(model) if isinstance(model, nn.Module) else list(model)
    for one in rules:
        one.check(blocks)
    if any(one.kind != "default" for one in rules):
        _check_gates(blocks, renorm)
    runs = _runs(rules)

    def change(block: MoEBlock, routing: Routing) -> tuple[Tensor, Tensor]:
        if len(runs) == 1 and (len(rules) == 1 or len(routing.logits) % len(rules) == 0):
            return runs[0][0].choose(block, routing, renorm, generator)
        return _by_row(runs, len(rules), block, routing, renorm, generator)

    with rerouted(blocks or model, change):
        yield


def _check_gates(blocks: Sequence[MoEBlock], renorm: Renorm) -> None:
    """Ask every gate what it does while no hook listens, and refuse what cannot be done."""
    for block in blocks:
        if block.scoring.renormalises is None and renorm == "as_model":
            raise ValueError(
                f"renorm='as_model' needs a gate whose weights are its scores or their shares, and those of {block.name} "
                f"({type(block.gate).__name__}) are neither; use True or False"
            )


def _runs(rules: Sequence[RoutingRule]) -> list[tuple[RoutingRule, int]]:
    """Neighbouring rows with the same rule, which are chosen for together: (rule, number of rows)."""
    return [(rule, len(list(same))) for rule, same in groupby(rules)]


def _by_row(
    runs: Sequence[tuple[RoutingRule, int]],
    n_rows: int,
    block: MoEBlock,
    routing: Routing,
    renorm: Renorm,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    T = len(routing.logits)
    if T % n_rows:
        raise ValueError(f"{n_rows} rules were given, one a row, for a batch whose {T} tokens they do not divide")
    parts, first = [], 0
    for rule, rows in runs:
        last = first + rows * (T // n_rows)
        part = Routing(
            routing.weights[first:last],
            routing.indices[first:last],
            routing.logits[first:last],
            routing.probs[first:last],
        )
        parts.append(rule.choose(block, part, renorm, generator))
        first = last
    width = max(weights.shape[1] for weights, _ in parts)
    # A place without an expert: its own first expert with weight 0 is right in every engine; the index E costs nothing
    # where the engine skips it.
    sentinel = block.n_experts if _skips_sentinels(block) else None
    weights = [nn.functional.pad(w, (0, width - w.shape[1])) for w, _ in parts]
    indices = [_widened(i, width, sentinel) for _, i in parts]
    return torch.cat(weights), torch.cat(indices)


def _widened(indices: Tensor, width: int, sentinel: int | None) -> Tensor:
    missing = width - indices.shape[1]
    if missing == 0:
        return indices
    if sentinel is not None:
        return nn.functional.pad(indices, (0, missing), value=sentinel)
    return torch.cat([indices, indices[:, :1].expand(-1, missing)], dim=1)


def _skips_sentinels(block: MoEBlock) -> bool:
    config = getattr(block.experts, "config", None)
    return bool(getattr(block.experts, "mixtura_experts", False)) or (
        getattr(config, "_experts_implementation", None) == "mixtura"
    )
