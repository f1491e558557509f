"""How much attention each token receives from the tokens after it, beside any attention engine.

An attention function is registered with transformers under ``mixtura_<engine>``; it calls the engine and, where a whole
prompt is read, leaves the column means on the attention module. They are recomputed from queries and keys in blocks of
rows, since fused engines keep no weights: O(L²) operations, O(L) memory.

Shapes: B rows, H heads, L positions, C width of a head.
Source: MC-MoE (2410.06270), sec. 3.3, eq. 7.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["column_means", "observe"]

ROWS = 256  # query rows at a time
RECEIVED = "_mixtura_received"


def column_means(query: Tensor, key: Tensor, scaling: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean attention that each position receives from itself and the positions after it, averaged over heads.

    Args:
        query: shape (B, H, L, C).
        key: shape (B, H_kv, L, C), H a multiple of H_kv.
        scaling: factor of the products.
        mask: (B, 1, L, L), boolean (True: seen) or added to the products; None is causal.
    Returns:
        Means, float32, (B, L): sum over queries i >= j of A[i, j] / number of such queries; and which positions are real,
        boolean (B, L). Padding neither gives nor receives.
    """
    B, H, L, _ = query.shape
    key = key.repeat_interleave(H // key.shape[1], dim=1)
    seen = _seen(mask, B, L, query.device)
    real_BL = seen.diagonal(dim1=-2, dim2=-1)
    total_BL = torch.zeros(B, L, device=query.device)
    for first in range(0, L, ROWS):
        rows = slice(first, min(first + ROWS, L))
        scores = (query[:, :, rows].float() @ key.float().transpose(-1, -2)) * scaling
        scores = scores.masked_fill(~seen[:, None, rows], -torch.inf)
        if mask is not None and mask.is_floating_point():
            scores = scores + mask[:, :, rows, :L].float().clamp(min=-1e30)
        weights = scores.softmax(-1).nan_to_num(0.0).mean(1)  # a padded query sees nothing: its row is 0/0
        total_BL += (weights * real_BL[:, rows, None]).sum(1)
    later_BL = real_BL.flip(-1).cumsum(-1).flip(-1)
    return total_BL / later_BL.clamp(min=1), real_BL


def observe(model: Any) -> None:
    """Switch a model to the observing form of its attention engine."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    engine = model.config._attn_implementation or "sdpa"
    if engine.startswith("mixtura_"):
        return
    name = f"mixtura_{engine}"
    if engine == "eager" or engine not in ALL_ATTENTION_FUNCTIONS:
        engine, name = "sdpa", "mixtura_sdpa"
    inner = ALL_ATTENTION_FUNCTIONS[engine]

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        if query.shape[2] == key.shape[2] and query.shape[2] > 1:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            with torch.no_grad():
                setattr(module, RECEIVED, column_means(query, key, scaling, attention_mask))
        else:
            setattr(module, RECEIVED, None)
        return inner(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[engine])
    model.set_attn_implementation(name)


def _seen(mask: Tensor | None, B: int, L: int, device: torch.device) -> Tensor:
    causal = torch.ones(L, L, dtype=torch.bool, device=device).tril()
    if mask is None:
        return causal.expand(B, L, L)
    part = mask[:, 0, :, :L]
    allowed = part if part.dtype == torch.bool else part > -1e4
    return (allowed & causal).expand(B, L, L)
