"""The layer that rooms build on: a gate, experts, and what every token gets besides.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mixtura.core.gates import Routing

__all__ = ["MixtureLayer", "MixtureOutput"]


@dataclass(frozen=True)
class MixtureOutput:
    """What a mixture computed, and how the tokens went; from ``routing`` come balance losses and statistics."""

    hidden: Tensor  # shape of the input
    routing: Routing  # tokens flattened


class MixtureLayer(nn.Module):
    """Mixture of experts in place of a feed-forward layer, (..., D) -> (..., D).

    Calling it returns the tensor alone, so that it drops in for any layer; ``mix`` returns the routing with it. A hook
    on ``layer.gate`` sees each routing, too, where the call is deep inside a foreign model.

    Args:
        gate: x (..., D) -> `Routing`.
        experts: called as ``experts(x, routing)`` with x (T, D).
        shared: layer that every token goes through, added with weight 1.
    Example:
        >>> import torch
        >>> from mixtura.core.experts import Experts, ExpertsConfig
        >>> from mixtura.core.gates import Gate, GateConfig
        >>> layer = MixtureLayer(Gate(8, 4, GateConfig(k=2)), Experts(ExpertsConfig(width=8, hidden=16, n_experts=4)))
        >>> out = layer.mix(torch.randn(2, 3, 8))
        >>> out.hidden.shape, out.routing.indices.shape
        (torch.Size([2, 3, 8]), torch.Size([6, 2]))
    """

    def __init__(self, gate: nn.Module, experts: nn.Module, *, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.shared = shared

    def mix(self, x: Tensor) -> MixtureOutput:
        """The layer's output with its routing."""
        x_TD = x.reshape(-1, x.shape[-1])
        routing: Routing = self.gate(x_TD)
        y_TD: Tensor = self.experts(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return MixtureOutput(y_TD.reshape(x.shape), routing)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x).hidden
