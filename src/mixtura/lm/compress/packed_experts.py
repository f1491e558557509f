"""Feed-forward experts whose weights are packed, each with its own width.

Called like every experts module of transformers: hidden (T, D), indices (T, K), weights (T, K) -> (T, D). Only the experts
that some token visits are unpacked, one at a time. A token whose index is E visits nobody there.

Shapes: T tokens, D width, H hidden, E experts, K experts a token visits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.lm.compress.packed import PackedMatrices

__all__ = ["PackedExperts", "expert_matrices"]


class PackedExperts(nn.Module):
    """Gated experts with packed weights."""

    mixtura_experts = True

    def __init__(
        self,
        bits: Sequence[int],
        width: int,
        hidden: int,
        *,
        up_group: int,
        down_group: int,
        activation: Callable[[Tensor], Tensor],
    ):
        super().__init__()
        self.num_experts = len(bits)
        self.hidden_dim, self.intermediate_dim = width, hidden
        self.act_fn = activation
        self.up = PackedMatrices(bits, 2 * hidden, width, up_group)
        self.down = PackedMatrices(bits, width, hidden, down_group)

    @classmethod
    def like(cls, experts: nn.Module, bits: Sequence[int], *, up_group: int, down_group: int) -> "PackedExperts":
        """Empty packed experts of the shape of a float module, on its device."""
        reason = why_not(experts)
        if reason is not None:
            raise ValueError(f"{type(experts).__name__} cannot be packed: {reason}")
        found: Any = experts
        E, rows, width = found.gate_up_proj.shape
        if len(bits) != E:
            raise ValueError(f"bits must name a width for each of {E} experts, got {len(bits)}")
        made = cls(bits, width, rows // 2, up_group=up_group, down_group=down_group, activation=found.act_fn)
        return made.to(found.gate_up_proj.device)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D), (T, K), (T, K) -> (T, D)."""
        out_TD = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        order_S = top_k_index.flatten().argsort(stable=True)
        counts = top_k_index.flatten().bincount(minlength=self.num_experts + 1).tolist()
        k, first = top_k_index.shape[1], 0
        for expert, count in enumerate(counts[: self.num_experts]):
            if count:
                places = order_S[first : first + count]
                tokens = places // k
                y = self.down.product(expert, self.inner(expert, hidden_states[tokens]))
                out_TD.index_add_(0, tokens, y.float() * top_k_weights.flatten()[places, None].float())
            first += count
        return out_TD.to(hidden_states.dtype)

    def inner(self, expert: int, x: Tensor) -> Tensor:
        """What the down projection of an expert reads, (M, D) -> (M, H)."""
        gate, up = self.up.product(expert, x).chunk(2, dim=-1)
        return self.act_fn(gate) * up

    @property
    def bits(self) -> Tensor:
        """Width of each expert, uint8, shape (E,)."""
        return torch.tensor(self.up.bits, dtype=torch.uint8)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights, scales and zero points."""
        return self.up.nbytes + self.down.nbytes


def why_not(experts: nn.Module) -> str | None:
    """Reason why an experts module cannot be packed, or None."""
    if getattr(experts, "mixtura_experts", False):
        return "it is packed already"
    for name in ("gate_up_proj", "down_proj"):
        if not isinstance(getattr(experts, name, None), nn.Parameter):
            return f"it has no stacked {name}"
    if getattr(experts, "is_transposed", False):
        return "its weights are stored transposed"
    if getattr(experts, "has_bias", False):
        return "its experts have biases"
    if not getattr(experts, "has_gate", True):
        return "its experts are not gated"
    if getattr(getattr(type(experts), "_apply_gate", None), "__name__", "") != "_default_apply_gate":
        return "its gate and up parts combine in a way of their own"
    return None


def expert_matrices(experts: Any, expert: int) -> tuple[Tensor, Tensor]:
    """Float weights of one expert: gate and up rows (2H, D), down (D, H)."""
    return experts.gate_up_proj[expert].detach(), experts.down_proj[expert].detach()
