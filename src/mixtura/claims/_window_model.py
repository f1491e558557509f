"""A feed-forward language model for claims about feed-forward layers: five tokens in, the next one out.

After a few hundred steps a small transformer still sits in its early plateau, and ranks layers by how fast it leaves it. A
window model learns from the first step, so what differs between arms is what their feed-forward layers can hold.

Shapes: B windows, V vocabulary, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from mixtura.core.balance import load_balance_loss
from mixtura.core.experts import Experts, ExpertsConfig, FeedForward
from mixtura.core.gates import Gate, GateConfig
from mixtura.core.mixture import MixtureLayer
from mixtura.lm.pyramid import PyramidResidualFFN

__all__ = ["BALANCE", "Block", "Output", "Window", "WindowModel"]

BALANCE = 0.01  # factor of the balance loss, of every layer with experts
Kind = Literal["dense", "top1", "top2", "residual-sum", "residual-coefficient"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A residual block's feed-forward layer: its kind, and how many experts it has."""

    kind: Kind = "dense"
    experts: int = 0


@dataclass(frozen=True, kw_only=True)
class Window:
    """Shape of a window model.

    Attributes:
        blocks: feed-forward layers in order.
        vocabulary, context, width, hidden: V, tokens of a window, D, and hidden units of every network.
    """

    blocks: Sequence[Block] = field(default=(Block(), Block(), Block(), Block()))
    vocabulary: int = 512
    context: int = 5
    width: int = 64
    hidden: int = 128


@dataclass(frozen=True)
class Output:
    """Logits (B, V), the balance losses with their factors, and the experts that each layer's tokens visit (B, K)."""

    logits: Tensor
    aux: Tensor
    visits: list[Tensor]


class WindowModel(nn.Module):
    """Embedding of each place, one linear map to the width, residual feed-forward blocks, and the embedding as head."""

    def __init__(self, shape: Window, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.shape = shape
        d = shape.width
        self.embed = nn.Parameter(torch.randn(shape.vocabulary, d, generator=generator) * d**-0.5)
        inputs = shape.context * d
        self.read = nn.Parameter(torch.randn(d, inputs, generator=generator) * (d / inputs) ** 0.5)
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in range(len(shape.blocks) + 1))
        self.layers = nn.ModuleList(_layer(block, shape, generator) for block in shape.blocks)

    def forward(self, windows: Tensor) -> Output:
        """Token ids (B, context) -> what the next token is."""
        x = self.embed[windows].flatten(1) @ self.read.T
        aux, visits = x.new_zeros(()), []
        for norm, layer in zip(self.norms, self.layers, strict=False):
            if isinstance(layer, PyramidResidualFFN):
                out = layer.mix(norm(x))
                y, routing, aux = out.hidden, out.routing, aux + out.aux_loss
                visits.append(routing.indices)
            elif isinstance(layer, MixtureLayer):
                mixed = layer.mix(norm(x))
                y, routing = mixed.hidden, mixed.routing
                aux = aux + BALANCE * load_balance_loss(routing.probs, routing.indices)
                visits.append(routing.indices)
            else:
                y = layer(norm(x))
            x = x + y
        return Output(self.norms[-1](x) @ self.embed.T, aux, visits)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert."""
        return 3 * self.shape.width * self.shape.hidden


def _layer(block: Block, shape: Window, generator: torch.Generator) -> nn.Module:
    d, h = shape.width, shape.hidden
    if block.kind == "dense":
        return FeedForward(ExpertsConfig(width=d, hidden=h), generator=generator)
    if block.kind in ("top1", "top2"):
        k = 1 if block.kind == "top1" else 2
        # Two gates sum to 1, as in GShard; one gate must not, or the router would learn nothing.
        gate = Gate(d, block.experts, GateConfig(k=k, renormalise=k > 1), generator=generator)
        return MixtureLayer(
            gate, Experts(ExpertsConfig(width=d, hidden=h, n_experts=block.experts), generator=generator)
        )
    combine: Literal["sum", "coefficient"] = "sum" if block.kind == "residual-sum" else "coefficient"
    return PyramidResidualFFN(d, h, block.experts, combine=combine, aux_coef=BALANCE, generator=generator)
