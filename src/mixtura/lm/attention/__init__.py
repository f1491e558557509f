"""Attention of a trained model, each head with a span of its own: sparse-attention-mix (MoA, arXiv 2406.14909).

Profile what cutting attention would cost, plan spans under a budget, convert; the converted model keeps and reads only what
its plan says.
"""

from typing import TYPE_CHECKING

from mixtura._lazy import lazy_names

if TYPE_CHECKING:
    from mixtura.lm.attention.span_cache import SpanCache
    from mixtura.lm.attention.span_model import convert
    from mixtura.lm.attention.span_plan import plan_spans
    from mixtura.lm.attention.span_profile import answer_samples, profile_spans
    from mixtura.lm.attention.span_rules import SpanPlan

__all__ = ["SpanCache", "SpanPlan", "answer_samples", "convert", "plan_spans", "profile_spans"]

__getattr__ = lazy_names(
    __name__,
    {
        "SpanCache": "mixtura.lm.attention.span_cache",
        "SpanPlan": "mixtura.lm.attention.span_rules",
        "answer_samples": "mixtura.lm.attention.span_profile",
        "convert": "mixtura.lm.attention.span_model",
        "plan_spans": "mixtura.lm.attention.span_plan",
        "profile_spans": "mixtura.lm.attention.span_profile",
    },
)
