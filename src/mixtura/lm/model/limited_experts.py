"""Experts of which each takes a limited number of tokens, and padding none of the places.

Shapes: B batch, L positions, T = B L tokens, D width, E experts.
Source: 2109.10465, sec. 3 (capacity, random token selection).
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtura.core.capacity import CapacityPolicy, capacity, capacity_select
from mixtura.core.gates import Routing
from mixtura.lm.model.multitask_config import MultitaskMoEConfig
from mixtura.lm.model.parts import ExpertsBlock, MixturaRouter

__all__ = ["LimitedExpertsBlock", "WideRouter", "wide"]


class WideRouter(MixturaRouter):
    """Softmax gate in float32, also under autocast; in training its input may be jittered."""

    def __init__(self, config: MultitaskMoEConfig, num_experts: int):
        super().__init__(config, num_experts)
        self.jitter = config.router_jitter

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]  # `mix` knows of padding
        """(T, D) -> logits (T, E), float32, weights (T, 1) in the dtype of x, indices (T, 1)."""
        x_TD = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            wide_TD = wide(x_TD)
            if self.training and self.jitter:
                wide_TD = wide_TD * torch.empty_like(wide_TD).uniform_(1 - self.jitter, 1 + self.jitter)
            logits_TE = F.linear(wide_TD, self.weight.to(wide_TD.dtype))
        # The lowest index of equal logits, as in `top_k`; `max` promises the first on every device.
        probs_TE = logits_TE.softmax(-1)
        indices_T1 = logits_TE.detach().max(-1, keepdim=True).indices
        return logits_TE, probs_TE.gather(-1, indices_T1).to(x.dtype), indices_T1


class LimitedExpertsBlock(ExpertsBlock):
    """Experts of which each takes a limited number of tokens; padding takes no place."""

    def __init__(self, config: MultitaskMoEConfig, n_experts: int):
        super().__init__(config, n_experts)
        self.gate = WideRouter(config, n_experts)
        # Tells transformers' engines that an index equal to the number of experts marks a pair to be passed over.
        cast(Any, self.experts)._is_expert_parallel = True
        self.config, self.n_experts = config, n_experts
        self.generator: torch.Generator | None = None  # of random selection; None: torch's own

    def mix(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """(B, L, D) and a mask (B, L), false at padding -> (B, L, D) and the routing of its tokens, batch-major."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE, weights_T1, indices_T1 = self.gate(x_TD)
        if mask is not None:
            indices_T1 = indices_T1.masked_fill(~mask.reshape(-1, 1), self.n_experts)
        n_tokens = len(x_TD) if mask is None else int(mask.sum())
        dropped_T1 = ~self._kept(indices_T1, weights_T1, n_tokens, hidden_states.shape[:2])
        indices_T1 = indices_T1.masked_fill(dropped_T1, self.n_experts)
        weights_T1 = weights_T1.masked_fill(dropped_T1, 0.0)
        y_TD = self.experts(x_TD, indices_T1, weights_T1)
        routing = Routing(weights=weights_T1, indices=indices_T1, logits=logits_TE, probs=logits_TE.softmax(-1))
        return y_TD.reshape(hidden_states.shape), routing

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.mix(hidden_states, mask)[0]

    @torch.no_grad()
    def _kept(self, indices_T1: Tensor, weights_T1: Tensor, n_tokens: int, shape: torch.Size) -> Tensor:
        config = self.config
        factor = config.capacity_factor if self.training else config.eval_capacity_factor
        if not factor:
            return indices_T1 < self.n_experts
        limit = capacity(n_tokens, self.n_experts, factor, minimum=config.min_capacity)
        policy = cast(CapacityPolicy, config.capacity_policy if self.training else "prefix")
        turned = config.layout == "sequence_major"

        def laid_out(values_T1: Tensor) -> Tensor:
            return values_T1.view(shape).T.reshape(-1, 1) if turned else values_T1

        kept_T1 = capacity_select(
            laid_out(indices_T1),
            self.n_experts,
            limit,
            policy=policy,
            probs=laid_out(weights_T1) if policy == "probs" else None,
            groups=config.capacity_groups if policy == "group" else 1,
            generator=self.generator if policy == "random" else None,
        )
        return kept_T1.view(shape[1], shape[0]).T.reshape(-1, 1) if turned else kept_T1


def wide(x: Tensor) -> Tensor:
    """Float32, or float64 where it came so."""
    return x if x.dtype == torch.float64 else x.float()
