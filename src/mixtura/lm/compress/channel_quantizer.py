"""How transformers loads what :func:`mixtura.lm.compress.mixed_channels.convert` made: quant_method ``mixtura-mixed-channels``.

transformers imports this module while it is still importing itself, so nothing of its models is imported at the top.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixtura.lm.compress.quantizer import MixedExpertsConfig, MixedExpertsQuantizer, register_method

__all__ = ["METHOD", "ChannelsConfig", "ChannelsQuantizer", "describe", "register"]

METHOD = "mixtura-mixed-channels"


class ChannelsConfig(QuantizationConfigMixin):
    """What stands in ``config.json`` of a checkpoint with mixed channels.

    Attributes:
        settings: fields of :class:`~mixtura.lm.compress.mixed_channels.MixedChannelConfig`.
        layers: path of each mixed layer -> how many of its rows have the larger width.
        experts: path of each stack of mixed experts -> two such lists, of the up and of the down matrices.
        packed: the config of experts that :mod:`mixtura.lm.compress.mixed_experts` had packed before, or None.
    """

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        layers: dict[str, int] | None = None,
        experts: dict[str, list[list[int]]] | None = None,
        packed: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.settings = settings or {}
        self.layers = layers or {}
        self.experts = experts or {}
        self.packed = packed


class ChannelsQuantizer(MixedExpertsQuantizer):
    """Puts empty mixed layers in place before the weights arrive; nothing is unpacked on the way."""

    quantization_config: ChannelsConfig  # type: ignore[assignment]

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from mixtura.lm.anatomy import find_moe
        from mixtura.lm.compress.mixed_channel_experts import MixedChannelExperts

        config = self.quantization_config
        if config.packed is not None:
            before = MixedExpertsConfig.from_dict(config.packed)
            MixedExpertsQuantizer(before, pre_quantized=True)._process_model_before_weight_loading(model)
        modules = dict(model.named_modules())
        if missing := [name for name in config.layers if not isinstance(modules.get(name), nn.Linear)]:
            raise ValueError(f"the checkpoint quantizes {missing[0]}, which {type(model).__name__} does not have")
        for name, n_high in config.layers.items():
            linear = modules[name]
            made = self._empty(linear.in_features, linear.out_features, n_high, linear.bias is not None, linear.weight)
            model.set_submodule(name, made)
        blocks = {block.experts_name: block for block in find_moe(model)} if config.experts else {}
        if missing := [name for name in config.experts if name not in blocks]:
            raise ValueError(f"the checkpoint quantizes {missing[0]}, which {type(model).__name__} does not have")
        for name, counts in config.experts.items():
            float_experts: Any = blocks[name].experts
            packed = MixedChannelExperts(len(counts[0]), float_experts.act_fn)
            for part, weight, each in zip(
                (packed.up, packed.down), (float_experts.gate_up_proj, float_experts.down_proj), counts, strict=True
            ):
                for n_high in each:
                    part.append(self._empty(weight.shape[2], weight.shape[1], n_high, False, weight))
            model.set_submodule(name, packed)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        pruning = (self.quantization_config.packed or {}).get("pruning")
        if pruning is not None:
            from mixtura.lm.compress.dynamic_pruning import attach

            attach(model, pruning)
        return model

    def _empty(self, width: int, rows: int, n_high: int, bias: bool, like: torch.Tensor) -> nn.Module:
        from mixtura.lm.compress.mixed_channel_linear import MixedChannelLinear
        from mixtura.lm.compress.packed import group_size_for

        settings = self.quantization_config.settings
        return MixedChannelLinear(
            width,
            rows,
            n_high=n_high,
            low_bits=settings["low_bits"],
            high_bits=settings["high_bits"],
            act_bits=settings["act_bits"],
            group_size=group_size_for(width, settings["group_size"]),
            bias=bias,
            dtype=like.dtype,
        ).to(like.device)


def register() -> None:
    """Make the method known to transformers; a second call does nothing."""
    register_method(METHOD, ChannelsConfig, ChannelsQuantizer)


def describe(model: Any, settings: Any) -> None:
    """Write into the model's config what its mixed layers are, so that saving and loading find them."""
    from mixtura.lm.compress.mixed_channel_experts import MixedChannelExperts
    from mixtura.lm.compress.mixed_channel_linear import MixedChannelLinear

    layers: dict[str, int] = {}
    experts: dict[str, list[list[int]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MixedChannelExperts):
            experts[name] = [[len(m.high.codes) for m in part] for part in (module.up, module.down)]
        elif isinstance(module, MixedChannelLinear) and not any(name.startswith(f"{e}.") for e in experts):
            layers[name] = len(module.high.codes)
    before: Any = getattr(model.config, "quantization_config", None)
    packed = before if before is None or isinstance(before, Mapping) else before.to_dict()
    config = ChannelsConfig(
        asdict(settings) | {"skip": list(settings.skip)}, layers, experts, None if packed is None else dict(packed)
    )
    model.config.quantization_config = config
    model.hf_quantizer = ChannelsQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
