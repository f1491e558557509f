"""The decoder made of parts. Importing it teaches transformers' Auto classes the model type ``mixtura``."""

from mixtura.lm.model.attention import Attention, AttentionMixture
from mixtura.lm.model.config import MixturaConfig
from mixtura.lm.model.decoder import MixturaForCausalLM, MixturaModel
from mixtura.lm.model.parts import ExpertsBlock, MixturaRouter

__all__ = [
    "Attention",
    "AttentionMixture",
    "ExpertsBlock",
    "MixturaConfig",
    "MixturaForCausalLM",
    "MixturaModel",
    "MixturaRouter",
]
