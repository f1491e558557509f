"""Stands in for the decoder where transformers must know its class before it can be imported.

transformers imports its Auto classes in the middle of importing its own layers, on which the decoder rests. What is registered
at that moment is this class, which imports the decoder when a model is wanted.
"""

from typing import Any

from mixtura.lm.model.config import MixturaConfig

__all__ = ["MixturaForCausalLM"]


class MixturaForCausalLM:
    """The two doors through which the Auto classes build a model."""

    config_class = MixturaConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The decoder's own ``from_pretrained``."""
        from mixtura.lm.model import decoder

        return decoder.MixturaForCausalLM.from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, config: MixturaConfig, **kwargs: Any) -> Any:
        from mixtura.lm.model import decoder

        return decoder.MixturaForCausalLM._from_config(config, **kwargs)
