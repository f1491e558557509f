"""Stands in for the models where transformers must know their classes before they can be imported.

transformers imports its Auto classes in the middle of importing its own layers, on which the models rest. What is registered
at that moment are these classes, which import a model when it is wanted.
"""

from typing import Any

from mixtura.lm.model.config import MixturaConfig
from mixtura.lm.model.multitask_config import MultitaskMoEConfig

__all__ = ["MixturaForCausalLM", "MultitaskMoEForConditionalGeneration"]


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


class MultitaskMoEForConditionalGeneration:
    """The same for the encoder-decoder."""

    config_class = MultitaskMoEConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """The encoder-decoder's own ``from_pretrained``."""
        from mixtura.lm.model import encoder_decoder

        return encoder_decoder.MultitaskMoEForConditionalGeneration.from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, config: MultitaskMoEConfig, **kwargs: Any) -> Any:
        from mixtura.lm.model import encoder_decoder

        return encoder_decoder.MultitaskMoEForConditionalGeneration._from_config(config, **kwargs)
