"""Recordings taken apart: what a text or a picture asks for, out of a mixture.

>>> from mixtura.audio import separate     # doctest: +SKIP

Heavy imports wait until a name is used.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

# Loaded before the verb of the same name is defined: Python binds a subpackage to its parent once, at its first import, so
# from here on `mixtura.audio.separate` is the verb and `from mixtura.audio.separate import ...` still finds the package.
import mixtura.audio.separate  # noqa: F401
from mixtura._lazy import lazy_names

if TYPE_CHECKING:
    from torch import Tensor

    from mixtura.audio.embed import ClipEmbedding, NamedSounds, SmallClip
    from mixtura.audio.separate.noise_invariant import NoiseInvariantLoss
    from mixtura.audio.separate.query import QuerySeparator

__all__ = ["ClipEmbedding", "NamedSounds", "NoiseInvariantLoss", "QuerySeparator", "SmallClip", "separate"]


def separate(wave: "Tensor", queries: "Sequence[str] | Tensor", *, model: Any = None, **options: Any) -> "Tensor":
    """What each query asks for; see :meth:`mixtura.audio.separate.query.QuerySeparator.separate`.

    Args:
        wave: recording, shape (N,) or (R, N).
        queries: texts, or vectors of the model's embedding.
        model: a separator, or a directory that one was saved in; by default the one that comes with the package, which knows
            instruments by name (``mixtura.audio.separate.SOUNDS``).
        options: ``sample_rate``, ``resample``, ``mask`` and what else the method takes.
    Returns:
        Shape (U, R, N).
    """
    from mixtura.audio.separate import QuerySeparator, default_separator

    if model is None:
        model = default_separator()
    elif not isinstance(model, QuerySeparator):
        model = QuerySeparator.from_pretrained(model)
    return model.separate(wave, queries, **options)


__getattr__ = lazy_names(
    __name__,
    {
        "ClipEmbedding": "mixtura.audio.embed",
        "NamedSounds": "mixtura.audio.embed",
        "NoiseInvariantLoss": "mixtura.audio.separate.noise_invariant",
        "QuerySeparator": "mixtura.audio.separate.query",
        "SmallClip": "mixtura.audio.embed",
    },
)
