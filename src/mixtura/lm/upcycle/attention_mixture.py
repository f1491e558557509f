"""The attention of upcycled branches; it lives with the decoder's other parts."""

from mixtura.lm.model.attention import AttentionMixture

__all__ = ["AttentionMixture"]
