"""More experts in deeper layers, and each beside a network that every token goes through: the layer of PR-MoE.

- *Residual*: a token goes through one fixed network M and one expert F of the same shape. The expert corrects M, which is as
  good as two routed experts and sends half the rows.
- *Pyramid*: experts help most in deep layers, so the last layers have more of them.

    p = softmax(W x) in float32;  e = argmax p;  the weight is p_e as it is, so the router learns from the loss
    sum:          y = M(x) + p_e F_e(x)                                          (the paper's text)
    coefficient:  y = a p_e F_e(x) + b M(x),  (a, b) = softmax(W_c x + b_c)      (its released code)

With ``drop`` an expert takes max(ceil(T/E * factor), least) of T tokens: random ones in training, the first in evaluation. The
others get nothing from it, and still have M. They are counted in ``routing.dropped``.

A decoder of such layers is a :class:`~mixtura.lm.model.MixturaForCausalLM` whose ``num_experts`` is a list; a dense one becomes
such a decoder by :mod:`mixtura.lm.upcycle.pyramid`.

Shapes: T tokens, D width, h hidden units, E experts.
Source: DeepSpeed-MoE (2201.05596), sec. 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mixtura.core.balance import load_balance_loss
from mixtura.core.dispatch import BACKENDS
from mixtura.core.experts import Experts, ExpertsConfig, FeedForward, ResidualExperts
from mixtura.core.gates import Gate, GateConfig, top_k
from mixtura.core.mixture import MixtureLayer
from mixtura.lm.fine_grained import BalancedOutput

if TYPE_CHECKING:
    from mixtura.lm.model import MixturaConfig

__all__ = ["PAPER", "PyramidResidualFFN", "by_layer", "expert_schedule", "paper_config"]

# The paper's models (its tables 1, 2 and 5): width, layers, heads, experts of the layers that have some, and whether residual.
# The sizes that it gives, in billions: 13, 4, 3.5 and 52, 31, 27.
PAPER: Mapping[str, tuple[int, int, int, tuple[int, ...], bool]] = {
    "350m-moe-128": (1024, 24, 16, (128,) * 12, False),
    "350m-pr-32-64": (1024, 24, 16, (32,) * 10 + (64,) * 2, True),
    "350m-pr-32-64-student": (1024, 21, 16, (32,) * 8 + (64,) * 2, True),
    "1.3b-moe-128": (2048, 24, 16, (128,) * 12, False),
    "1.3b-pr-64-128": (2048, 24, 16, (64,) * 10 + (128,) * 2, True),
    "1.3b-pr-64-128-student": (2048, 21, 16, (64,) * 8 + (128,) * 2, True),
}


def expert_schedule(num_moe_layers: int, base: int, top: int, num_top: int = 2) -> list[int]:
    """Experts of each layer that has some: ``base``, and ``top`` in the last ``num_top``.

    Raises:
        ValueError: a count below 1, ``top`` below ``base``, or more top layers than layers.
    Example:
        >>> expert_schedule(6, 32, 64)
        [32, 32, 32, 32, 64, 64]
    """
    for name, value in (("num_moe_layers", num_moe_layers), ("base", base)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if top < base:
        raise ValueError(f"top must be at least base={base} (deeper layers have more experts), got {top}")
    if not 0 <= num_top <= num_moe_layers:
        raise ValueError(f"num_top must be between 0 and num_moe_layers={num_moe_layers}, got {num_top}")
    return [base] * (num_moe_layers - num_top) + [top] * num_top


def by_layer(num_experts: int | Sequence[int], layers: int, *, every: int = 2, offset: int = 1) -> list[int]:
    """Experts of every layer, 0 for a dense one, from those of the layers that have experts.

    Args:
        num_experts: one number for each layer l (counted from 0) with ``l % every == offset``, or one for all of them.
        layers: of the decoder.
        every, offset: which layers have experts; by default every second one, the first dense.
    Raises:
        ValueError: ``num_experts`` of another length, a number below 1, or no layer that could have experts.
    Example:
        >>> by_layer([4, 8], 5)
        [0, 4, 0, 8, 0]
    """
    if every < 1 or not 0 <= offset < every:
        raise ValueError(f"every must be at least 1 and offset in [0, every), got {every} and {offset}")
    places = range(offset, layers, every)
    if not places:
        raise ValueError(f"with every={every} and offset={offset} none of {layers} layers would have experts")
    counts = [num_experts] * len(places) if isinstance(num_experts, int) else list(num_experts)
    if len(counts) != len(places):
        raise ValueError(
            f"num_experts must have one number for each of the {len(places)} layers with experts (layers "
            f"{places[0]}, {places[0] + every}, ... of {layers}), got {len(counts)}: {counts}"
        )
    if any(n < 1 for n in counts):
        raise ValueError(f"num_experts must be at least 1 in every layer that has experts, got {counts}")
    found = [0] * layers
    for place, n in zip(places, counts, strict=True):
        found[place] = n
    return found


def paper_config(name: str) -> MixturaConfig:
    """Config of one of the paper's models, :data:`PAPER`, for a ``MixturaForCausalLM``.

    A GPT whose every second layer has experts: two matrices of 4 D hidden units, top-1 gates, sum of expert and fixed network
    replaced by the learned coefficient of the released code. Positions are rotary, where GPT learns a table of 2048 rows.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    Example:
        >>> config = paper_config("350m-pr-32-64")
        >>> config.num_experts[-4:], config.dense_layers[:3]
        ([0, 64, 0, 64], [0, 2, 4])
    """
    from mixtura.lm.model import MixturaConfig

    if name not in PAPER:
        raise ValueError(f"name must be one of {list(PAPER)}, got {name!r}")
    width, layers, heads, experts, residual = PAPER[name]
    fields: dict[str, Any] = {"shared_expert_intermediate_size": 4 * width, "shared_combine": "coefficient"}
    return MixturaConfig(
        vocab_size=50304,  # 50257, padded for the hardware as usual
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act="gelu",
        max_position_embeddings=2048,
        initializer_range=0.014,
        tie_word_embeddings=True,
        norm="layer",
        norm_bias=True,
        mlp_gated=False,
        mlp_bias=True,
        qkv_bias=True,
        o_bias=True,
        num_experts=by_layer(experts, layers),
        num_experts_per_tok=1,
        norm_topk_prob=False,
        capacity_factor=1.0,
        eval_capacity_factor=1.0,
        router_float32=True,
        router_aux_loss_coef=0.01,
        router_z_loss_coef=0.0,
        **(fields if residual else {}),
    )


class PyramidResidualFFN(MixtureLayer):
    """A fixed network and one routed expert of the same shape in place of a feed-forward layer, (..., D) -> (..., D).

    Calling it returns the tensor; :meth:`mix` returns the routing and the balance loss with it. A pyramid is several of them
    with different ``num_experts`` (:func:`expert_schedule`) and the same ``hidden``.

    Args:
        d: width of the model, D.
        hidden: hidden units of the fixed network, and of each expert.
        num_experts: E.
        activation, gated: of all networks; see `ExpertsConfig`.
        combine: ``"coefficient"`` or ``"sum"``, see above.
        drop: limit what an expert takes.
        capacity_factor, eval_capacity_factor: factors of that limit in training and in evaluation.
        min_capacity: tokens that an expert takes in any case.
        aux_coef: factor of the balance loss E sum_e mean(p_e) mean(1[e chosen]), taken before any token is dropped.
        init: ``"independent"`` draws every network; ``"identical"`` makes all of them copies of one, as the released code does.
        backend: one of `dispatch.BACKENDS`.
        generator: source of chance for the start.
        name: of the layer, for messages.
    Raises:
        ValueError: the argument is named.
    Source:
        DeepSpeed-MoE (2201.05596), sec. 4.1; balance: Switch Transformers (2101.03961), eq. 4.
    Example:
        >>> layer = PyramidResidualFFN(16, 32, 4)
        >>> out = layer.mix(torch.randn(2, 5, 16))
        >>> out.hidden.shape, out.routing.indices.shape, out.routing.dropped
        (torch.Size([2, 5, 16]), torch.Size([10, 1]), 0)
    """

    def __init__(
        self,
        d: int,
        hidden: int,
        num_experts: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        combine: Literal["sum", "coefficient"] = "coefficient",
        drop: bool = False,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        aux_coef: float = 0.01,
        init: Literal["independent", "identical"] = "independent",
        backend: str = "grouped",
        generator: torch.Generator | None = None,
        name: str = "PyramidResidualFFN",
    ) -> None:
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        for key, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if not factor > 0:
                raise ValueError(f"{key} must be > 0, got {factor}; drop=False sets no limit")
        if aux_coef < 0:
            raise ValueError(f"aux_coef must be >= 0, got {aux_coef}")
        if init not in ("independent", "identical"):
            raise ValueError(f"init must be one of ['identical', 'independent'], got {init!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {sorted(BACKENDS)}, got {backend!r}")
        gate = GateConfig(
            k=1,
            renormalise=False,
            capacity_factor=capacity_factor if drop else 0.0,
            eval_capacity_factor=eval_capacity_factor if drop else 0.0,
            min_capacity=min_capacity,
        )
        shape = ExpertsConfig(width=d, hidden=hidden, n_experts=num_experts, activation=activation, gated=gated)
        one = ExpertsConfig(width=d, hidden=hidden, activation=activation, gated=gated)
        experts = Experts(shape, backend=backend, generator=generator)
        fixed = FeedForward(one, generator=generator)
        super().__init__(
            Gate(d, num_experts, gate, generator=generator), ResidualExperts(experts, fixed, d, combine=combine)
        )
        if init == "identical":
            with torch.no_grad():
                for stacked, single in zip(experts.parameters(), fixed.parameters(), strict=True):
                    stacked.copy_(single.expand_as(stacked))
        self.aux_coef, self.name = aux_coef, name

    def mix(self, x: Tensor, generator: torch.Generator | None = None) -> BalancedOutput:
        """The layer's output with its routing and balance loss.

        Args:
            x: shape (..., D).
            generator: draws who stays where tokens are dropped in training.
        Raises:
            ValueError: the router's logits are not finite; the layer is named.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.gate(x_TD, generator)
        if not bool(routing.logits.isfinite().all()):
            raise ValueError(
                f"router logits of {self.name} are not finite; the input or the router's weight has a NaN or inf"
            )
        y_TD: Tensor = self.experts(x_TD, routing)
        chosen = top_k(routing.logits, 1).indices if routing.dropped else routing.indices
        aux = self.aux_coef * load_balance_loss(routing.probs, chosen)
        return BalancedOutput(y_TD.reshape(x.shape), routing, aux)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x).hidden
