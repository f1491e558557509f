"""The decoder made of parts, which transformers' Auto classes know as model type ``mixtura``, and the encoder-decoder made of the
same, ``mixtura_multitask``.

Names are looked up on first use: the config is registered while transformers itself is still being imported, when the
decoder cannot be imported yet.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtura.lm.model.attention import Attention, AttentionMixture
    from mixtura.lm.model.config import MixturaConfig
    from mixtura.lm.model.decoder import MixturaForCausalLM, MixturaModel
    from mixtura.lm.model.encoder_decoder import MultitaskMoEForConditionalGeneration
    from mixtura.lm.model.latent_attention import LatentAttention
    from mixtura.lm.model.multitask_config import MultitaskMoEConfig
    from mixtura.lm.model.parts import ExpertsBlock, MixturaRouter

__all__ = [
    "Attention",
    "AttentionMixture",
    "ExpertsBlock",
    "LatentAttention",
    "MixturaConfig",
    "MixturaForCausalLM",
    "MixturaModel",
    "MixturaRouter",
    "MultitaskMoEConfig",
    "MultitaskMoEForConditionalGeneration",
]

_HOMES = {
    "Attention": "attention",
    "AttentionMixture": "attention",
    "ExpertsBlock": "parts",
    "LatentAttention": "latent_attention",
    "MixturaConfig": "config",
    "MixturaForCausalLM": "decoder",
    "MixturaModel": "decoder",
    "MixturaRouter": "parts",
    "MultitaskMoEConfig": "multitask_config",
    "MultitaskMoEForConditionalGeneration": "encoder_decoder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
