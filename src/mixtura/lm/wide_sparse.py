"""A mixture of experts as one wide, sparse hidden layer whose units can be read: the layer of MoE-X.

The hidden units of all experts are stacked into one vector z of E H units, in which those of unchosen experts are zero:

    z = [w_1 relu(W_1 x + b_1); ...; w_E relu(W_E x + b_E)],  y = [V_1 ... V_E] z,  w_e = 0 for an expert that is not chosen

That z is what interpretability is measured on: unit i means the same thing on every token, whichever experts were chosen. ReLU
makes the chosen blocks sparse too, and the gate (:mod:`mixtura.core.sparsity_gate`) sends a token to the experts that would
fire the fewest units on it.

Shapes: T tokens, D width, H hidden units of one expert, E experts, K experts a token visits.
Source: MoE-X (2503.07639), sec. 3-4; equal active parameters: H = 2 D with K = 2 where the dense layer has 4 D hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtura.core.balance import balance_loss
from mixtura.core.dispatch import ACTIVATIONS, BACKENDS
from mixtura.core.experts import Experts, ExpertsConfig
from mixtura.core.gates import Gate, GateConfig, Routing
from mixtura.core.mixture import MixtureLayer
from mixtura.core.sparsity_gate import SparsityAwareGate, Statistics
from mixtura.lm.fine_grained import BalancedOutput

__all__ = ["WideMlp", "WideSparseMoE", "as_wide_mlp", "wide_units"]

GATES = ("linear", "sparsity")


@dataclass(frozen=True)
class WideMlp:
    """The experts of a layer as one dense feed-forward network, expert after expert. Views of the layer's parameters."""

    up: Tensor  # (E H, D)
    down: Tensor  # (D, E H)
    up_bias: Tensor | None  # (E H,)
    down_bias: Tensor | None  # (E, D): added once an expert, times its weight


def as_wide_mlp(layer: nn.Module) -> WideMlp:
    """The dense layer that a mixture of one-matrix experts is a part of: y = down z, with z as :func:`wide_units` gives it.

    Args:
        layer: a `WideSparseMoE`, or a mixture layer of a model whose ``experts`` hold ``up_proj`` and ``down_proj``.
    Raises:
        ValueError: gated experts, whose unit is a product of two maps, or experts that are not stacked.
    """
    experts: Any = getattr(layer, "experts", layer)
    up, down = getattr(experts, "up_proj", None), getattr(experts, "down_proj", None)
    if not isinstance(up, Tensor) or not isinstance(down, Tensor):
        raise ValueError(
            f"{type(layer).__name__} has no stacked up_proj and down_proj: gated or packed experts are not one wide layer"
        )
    bias = getattr(experts, "up_proj_bias", None)
    return WideMlp(
        up=up.flatten(0, 1),
        down=down.transpose(0, 1).flatten(1),
        up_bias=None if bias is None else bias.flatten(),
        down_bias=getattr(experts, "down_proj_bias", None),
    )


def wide_units(
    x: Tensor,
    up: Tensor,
    indices: Tensor,
    weights: Tensor,
    inner: Callable[[Tensor], Tensor],
    *,
    hidden: int,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Hidden units of all experts as one vector a token, scaled by the gate; exactly 0 for experts that are not chosen.

    Args:
        x: shape (T, D).
        up: input matrices, shape (E, O, D).
        indices, weights: shape (T, K); the index E means no expert.
        inner: (M, O) -> (M, H): the activation, gated or not.
        hidden: H.
        up_bias: shape (E, O).
    Returns:
        Shape (T, E H).
    """
    n_experts = up.shape[0]
    units_TEH = x.new_zeros(len(x), n_experts, hidden)
    for e in range(n_experts):
        token, place = torch.where(indices == e)
        z_MH = inner(F.linear(x[token], up[e], None if up_bias is None else up_bias[e]))
        units_TEH[token, e] = (weights[token, place, None] * z_MH).to(units_TEH.dtype)
    return units_TEH.flatten(1)


class WideSparseMoE(MixtureLayer):
    """Experts with few active hidden units in place of a feed-forward layer, (..., D) -> (..., D).

    Calling it returns the tensor; :meth:`mix` returns the routing and the balance loss with it, :meth:`wide` the hidden units.

    Args:
        d: width of the model, D.
        hidden: hidden units of one expert; 2 D where a dense layer of equal active parameters has 4 D, at ``top_k=2``.
        experts: E.
        top_k: experts a token visits.
        activation: of the hidden units; the score is exact in meaning for ``relu`` only.
        gate: ``"sparsity"`` (no parameters) or ``"linear"`` (learned; the chosen weights sum to 1 in both).
        statistics: of the sparsity gate.
        balance: factor of the load-balance loss on the output.
        bias: biases of both maps.
        backend: one of `dispatch.BACKENDS`.
        init_std: standard deviation of every matrix at the start; None: fan_in^-1/2.
        generator: source of chance for the start.
    Raises:
        ValueError: the argument is named.
    Source:
        MoE-X (2503.07639), eq. 4-11.
    Example:
        >>> layer = WideSparseMoE(16, 32)
        >>> x = torch.randn(2, 5, 16)
        >>> layer(x).shape, layer.wide(x).shape, sum(p.numel() for p in layer.gate.parameters())
        (torch.Size([2, 5, 16]), torch.Size([2, 5, 256]), 0)
    """

    def __init__(
        self,
        d: int,
        hidden: int,
        experts: int = 8,
        top_k: int = 2,
        *,
        activation: str = "relu",
        gate: Literal["sparsity", "linear"] = "sparsity",
        statistics: Statistics = "diagonal",
        balance: float = 0.01,
        bias: bool = False,
        backend: str = "grouped",
        init_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k must be between 1 and experts={experts}, got {top_k}")
        if gate not in GATES:
            raise ValueError(f"gate must be one of {list(GATES)}, got {gate!r}")
        if balance < 0:
            raise ValueError(f"balance must be >= 0, got {balance}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {sorted(BACKENDS)}, got {backend!r}")
        config = ExpertsConfig(width=d, hidden=hidden, n_experts=experts, activation=activation, gated=False, bias=bias)
        scores = (
            SparsityAwareGate(top_k, statistics=statistics)
            if gate == "sparsity"
            else Gate(d, experts, GateConfig(k=top_k), generator=generator)
        )
        super().__init__(scores, Experts(config, backend=backend, generator=generator))
        self.balance = balance
        if init_std is not None:
            self.start(init_std, generator)

    @torch.no_grad()
    def start(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw every matrix anew: normal with standard deviation ``std``; biases become 0."""
        for name, parameter in self.named_parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) * (0.0 if name.endswith("_bias") else std)
            )

    def route(self, x: Tensor) -> Routing:
        """What the gate decides for x (T, D)."""
        experts: Any = self.experts
        if isinstance(self.gate, SparsityAwareGate):
            return self.gate(x, experts.up_proj, experts.up_proj_bias)  # type: ignore[no-any-return]
        return self.gate(x)  # type: ignore[no-any-return]

    def mix(self, x: Tensor) -> BalancedOutput:
        """The layer's output with its routing and balance loss.

        Raises:
            ValueError: the sparsity gate's scores are NaN; the experts are named.
        """
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.route(x_TD)
        y_TD: Tensor = self.experts(x_TD, routing)
        aux = balance_loss(routing.probs[None], routing.indices[None], expert=self.balance)
        return BalancedOutput(y_TD.reshape(x.shape), routing, aux)

    def wide(self, x: Tensor, *, sparse: bool = False) -> Tensor:
        """Hidden units z (..., E H), scaled by the gate; as a CSR tensor (T, E H) with ``sparse``."""
        experts: Any = self.experts
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.route(x_TD)
        z_TU = wide_units(
            x_TD,
            experts.up_proj,
            routing.indices,
            routing.weights,
            ACTIVATIONS[experts.config.activation],
            hidden=experts.config.hidden,
            up_bias=experts.up_proj_bias,
        )
        return z_TU.to_sparse_csr() if sparse else z_TU.reshape(*x.shape[:-1], -1)
