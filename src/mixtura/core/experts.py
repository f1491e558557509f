"""Experts: what a mixture weighs.

Every module of experts is called as ``experts(x, routing)`` with tokens flattened, x (T, ...), and returns the weighted
sum of the visited experts' outputs, same shape as x (for `ConvExperts`, with its own channels).

- `Experts`: stacked feed-forward experts, the layout that transformers uses (``gate_up_proj``, ``down_proj``).
- `FeedForward`: one such expert for every token; the shared expert of DeepSeekMoE.
- `split_feed_forward`: one feed-forward network as m narrower ones whose sum is the same function.
- `ResidualExperts`: a fixed feed-forward network beside a mixture, for pyramids whose layers differ in experts.
- `ConvExperts`: stacked convolutions; a token is a whole sample.

Shapes: T tokens, D width, H hidden, E experts, K experts a token visits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtura.core.dispatch import ACTIVATIONS, experts_forward
from mixtura.core.gates import Routing

__all__ = ["ConvExperts", "Experts", "ExpertsConfig", "FeedForward", "ResidualExperts", "split_feed_forward"]


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Shape of feed-forward experts."""

    width: int  # D
    hidden: int  # H, of one expert
    n_experts: int = 1
    activation: str = "silu"
    gated: bool = True  # activation(gate x) * (up x) in place of activation(up x)
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "n_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}")


class Experts(nn.Module):
    """E feed-forward experts in two stacks: ``gate_up_proj`` (E, 2H, D), gate rows first, and ``down_proj`` (E, D, H).

    Without a gate the first is ``up_proj`` (E, H, D). Biases, if any, are ``gate_up_proj_bias`` (E, 2H) or
    ``up_proj_bias`` (E, H), and ``down_proj_bias`` (E, D). Weights start normal with standard deviation fan_in^-1/2,
    biases at 0.

    Args:
        config: see `ExpertsConfig`.
        backend: one of `dispatch.BACKENDS`.
        generator: source of chance for the start.
    """

    def __init__(
        self, config: ExpertsConfig, *, backend: str = "grouped", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        e, d, h = config.n_experts, config.width, config.hidden
        rows = 2 * h if config.gated else h
        self._up_name = "gate_up_proj" if config.gated else "up_proj"
        self.register_parameter(self._up_name, nn.Parameter(torch.randn(e, rows, d, generator=generator) * d**-0.5))
        self.down_proj = nn.Parameter(torch.randn(e, d, h, generator=generator) * h**-0.5)
        self.register_parameter(f"{self._up_name}_bias", nn.Parameter(torch.zeros(e, rows)) if config.bias else None)
        self.down_proj_bias = nn.Parameter(torch.zeros(e, d)) if config.bias else None

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return experts_forward(
            x,
            getattr(self, self._up_name),
            self.down_proj,
            routing.indices,
            routing.weights,
            activation=self.config.activation,
            gate_up_bias=getattr(self, f"{self._up_name}_bias"),
            down_bias=self.down_proj_bias,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        c = self.config
        return f"n_experts={c.n_experts}, width={c.width}, hidden={c.hidden}, {c.activation}, gated={c.gated}"


class FeedForward(nn.Module):
    """One feed-forward network, (..., D) -> (..., D). n shared experts of hidden size h are one of hidden size n h."""

    def __init__(self, config: ExpertsConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if config.n_experts != 1:
            raise ValueError(f"n_experts must be 1 for a FeedForward, got {config.n_experts}; widen `hidden` instead")
        self.config = config
        d, h = config.width, config.hidden
        rows = 2 * h if config.gated else h
        self.up_proj = nn.Linear(d, rows, bias=config.bias)
        self.down_proj = nn.Linear(h, d, bias=config.bias)
        with torch.no_grad():
            self.up_proj.weight.copy_(torch.randn(rows, d, generator=generator) * d**-0.5)
            self.down_proj.weight.copy_(torch.randn(d, h, generator=generator) * h**-0.5)
            for layer in (self.up_proj, self.down_proj) if config.bias else ():
                layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.config.activation]
        up = self.up_proj(x)
        if self.config.gated:
            gate, up = up.chunk(2, dim=-1)
            return self.down_proj(activation(gate) * up)  # type: ignore[no-any-return]
        return self.down_proj(activation(up))  # type: ignore[no-any-return]


def split_feed_forward(gate_up: Tensor, down: Tensor, m: int, *, gated: bool = True) -> tuple[Tensor, Tensor]:
    """Feed-forward networks cut along their hidden units into m segments each; the segments' sum is the network.

    Segment s of expert e becomes expert e * m + s and takes hidden units s H/m to (s+1) H/m.

    Args:
        gate_up: shape (E, 2H, D), gate rows first; (E, H, D) when not gated.
        down: shape (E, D, H).
        m: segments, a divisor of H.
    Returns:
        Stacks (E m, 2H/m, D) or (E m, H/m, D), and (E m, D, H/m). Copies.
    Raises:
        ValueError: m does not divide H, or shapes that do not fit.
    Source:
        DeepSeekMoE (2401.06066), sec. 3.1. An expert-output bias has no unique split and is not handled.
    """
    n_experts, width, hidden = down.shape
    parts = 2 if gated else 1
    if gate_up.shape != (n_experts, parts * hidden, width):
        raise ValueError(f"gate_up must have shape {(n_experts, parts * hidden, width)}, got {tuple(gate_up.shape)}")
    if m < 1 or hidden % m:
        raise ValueError(f"m must divide the hidden size {hidden}, got {m}")
    segment = hidden // m
    up = gate_up.reshape(n_experts, parts, m, segment, width).transpose(1, 2)  # (E, m, parts, H/m, D)
    cut = down.reshape(n_experts, width, m, segment).movedim(2, 1)  # (E, m, D, H/m)
    return up.reshape(-1, parts * segment, width).clone(), cut.reshape(-1, width, segment).clone()


class ResidualExperts(nn.Module):
    """A fixed network for every token beside the experts, so that each expert learns a correction.

    Args:
        experts: called as ``experts(x, routing)``.
        fixed: (T, D) -> (T, D).
        width: D.
        combine: "sum" adds the two; "coefficient" weights them, routed first, by the softmax over the two of a linear
            map of the token, which starts at one half each.
    Source:
        DeepSpeed-MoE (2201.05596), sec. 4.1 (residual MoE); the coefficient is in its released code only.
    """

    def __init__(
        self,
        experts: nn.Module,
        fixed: nn.Module,
        width: int,
        *,
        combine: Literal["sum", "coefficient"] = "coefficient",
    ) -> None:
        super().__init__()
        if combine not in ("sum", "coefficient"):
            raise ValueError(f"combine must be one of ['coefficient', 'sum'], got {combine!r}")
        self.experts = experts
        self.fixed = fixed
        self.coefficient = nn.Linear(width, 2) if combine == "coefficient" else None
        if self.coefficient is not None:
            nn.init.zeros_(self.coefficient.weight)
            nn.init.zeros_(self.coefficient.bias)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        fixed_TD, routed_TD = self.fixed(x), self.experts(x, routing)
        if self.coefficient is None:
            return fixed_TD + routed_TD  # type: ignore[no-any-return]
        share_T2 = self.coefficient(x).float().softmax(-1).to(x.dtype)
        return share_T2[:, :1] * routed_TD + share_T2[:, 1:] * fixed_TD  # type: ignore[no-any-return]


class ConvExperts(nn.Module):
    """E convolutions in one stack; each sample visits K of them: (T, C_in, h, w) -> (T, C_out, h', w').

    Args:
        n_experts: E.
        in_channels, out_channels, kernel_size, stride, padding: as in ``nn.Conv2d``.
        generator: source of chance for the start: normal, standard deviation fan_in^-1/2; biases 0.
    """

    def __init__(
        self,
        n_experts: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        shape = (n_experts, out_channels, in_channels, kernel_size, kernel_size)
        if min(shape) < 1:
            raise ValueError(f"experts, channels and kernel must be at least 1, got {shape}")
        self.stride, self.padding = stride, padding
        fan_in = in_channels * kernel_size**2
        self.weight = nn.Parameter(torch.randn(shape, generator=generator) * fan_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(n_experts, out_channels))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        indices, n_experts = routing.indices, len(self.weight)
        pairs = []
        for e in range(n_experts):
            sample, place = torch.where(indices == e)
            y = F.conv2d(x[sample], self.weight[e], self.bias[e], stride=self.stride, padding=self.padding)
            pairs.append((sample, routing.weights[sample, place].to(y.dtype).view(-1, 1, 1, 1) * y))
        samples, outputs = torch.cat([s for s, _ in pairs]), torch.cat([y for _, y in pairs])
        return outputs.new_zeros(len(x), *outputs.shape[1:]).index_add(0, samples, outputs)
