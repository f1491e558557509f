"""Tells transformers about mixtura's models and quantizers, as soon as transformers is there and no sooner."""

from types import ModuleType

import wrapt

__all__ = ["when_transformers_is_imported"]


def when_transformers_is_imported() -> None:
    """Register with transformers now where it is loaded, else when it gets loaded.

    In three places, because transformers loads them lazily and apart. Registering twice does nothing.
    """
    wrapt.register_post_import_hook(_config, "transformers.models.auto.configuration_auto")
    wrapt.register_post_import_hook(_model, "transformers.models.auto.modeling_auto")
    wrapt.register_post_import_hook(_quantizers, "transformers.quantizers.auto")


def _config(auto: ModuleType) -> None:
    from mixtura.lm.attention.late import placeholders
    from mixtura.lm.model.config import MixturaConfig
    from mixtura.lm.model.multitask_config import MultitaskMoEConfig

    auto.AutoConfig.register("mixtura", MixturaConfig, exist_ok=True)
    auto.AutoConfig.register("mixtura_multitask", MultitaskMoEConfig, exist_ok=True)
    for kind, placeholder in placeholders().items():
        auto.AutoConfig.register(kind, placeholder, exist_ok=True)


def _model(auto: ModuleType) -> None:
    from mixtura.lm.model.config import MixturaConfig
    from mixtura.lm.model.late import MixturaForCausalLM, MultitaskMoEForConditionalGeneration
    from mixtura.lm.model.multitask_config import MultitaskMoEConfig

    auto.AutoModelForCausalLM.register(MixturaConfig, MixturaForCausalLM, exist_ok=True)
    auto.AutoModelForSeq2SeqLM.register(MultitaskMoEConfig, MultitaskMoEForConditionalGeneration, exist_ok=True)


def _quantizers(auto: ModuleType) -> None:
    from mixtura.lm.compress import channel_quantizer, quantizer

    quantizer.register()
    channel_quantizer.register()
    import mixtura.lm.sparse_checkpoint  # noqa: F401 (registers itself, since it may be what imports transformers)
