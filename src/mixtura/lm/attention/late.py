"""What transformers must know of models with spans before any can be imported: their model types.

A configuration of such a type makes the classes of its family when it is read.
"""

from typing import Any

from transformers import PreTrainedConfig

__all__ = ["FAMILIES", "PREFIX", "placeholders"]

PREFIX = "mixtura-spans-"

# Model type -> name of its classes. All hand keys and values from the cache to the attention as they are.
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "olmo": "Olmo",
    "olmo2": "Olmo2",
    "phi3": "Phi3",
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
}


def placeholders() -> dict[str, type[PreTrainedConfig]]:
    """Model type -> a class that turns into the right one when a configuration is read."""
    return {PREFIX + family.replace("_", "-"): _placeholder(family) for family in FAMILIES}


def _placeholder(family: str) -> type[PreTrainedConfig]:
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from mixtura.lm.attention.span_model import spans_classes

        return spans_classes(family)[0].from_dict(config_dict, **kwargs)

    kind = PREFIX + family.replace("_", "-")
    body = {"model_type": kind, "from_dict": classmethod(from_dict), "__module__": __name__}
    return type(f"Spans{FAMILIES[family]}Placeholder", (PreTrainedConfig,), body)
