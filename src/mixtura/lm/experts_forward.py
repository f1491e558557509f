"""``experts_implementation="mixtura"``: mixtura's experts forward in any mixture-of-experts family of transformers.

Importing this module registers the word with transformers' experts interface; nothing else changes:

    import mixtura.lm.experts_forward
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="mixtura")
    model.set_experts_implementation("mixtura")          # or later

It serves whatever the interface describes: experts with a gate or without, with biases, transposed, with a gate
function of their own (`_apply_gate`), with a norm after each expert, and expert parallelism, where an index equal to
the number of local experts marks a pair that lives on another process: it is skipped before any product.

Results equal transformers' ``eager`` up to rounding, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mixtura.core.dispatch import ExpertStack, dispatch

__all__ = ["NAME", "expert_stack", "experts_forward"]

NAME = "mixtura"


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The interface's signature: tokens (T, D), indices (T, K) in [0, E], weights (T, K) -> (T, D)."""
    return dispatch(hidden_states, expert_stack(self), top_k_index, top_k_weights)


def expert_stack(experts: nn.Module) -> ExpertStack:
    """What an experts module of transformers computes.

    Args:
        experts: a module whose class carries ``use_experts_implementation``.
    Raises:
        TypeError: it doesn't.
    """
    if not hasattr(experts, "has_gate"):
        raise TypeError(
            f"experts must be a module of transformers' experts interface, got {type(experts).__name__}, "
            "which does not carry use_experts_implementation"
        )
    module: Any = experts
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    up_bias, down_bias = (getattr(module, f"{name}_bias"), module.down_proj_bias) if module.has_bias else (None, None)
    trained = experts.parameters() if torch.is_grad_enabled() else ()
    return ExpertStack(
        up=up,
        down=down,
        inner=module._apply_gate if module.has_gate else module.act_fn,
        up_bias=up_bias,
        down_bias=down_bias,
        finish=module.post_expert_norm if module.has_post_expert_norm else None,
        transposed=module.is_transposed,
        # Whatever else the module owns, its gate function or its norm may read.
        parameters=tuple(p for p in trained if not any(p is own for own in (up, down, up_bias, down_bias))),
    )


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
