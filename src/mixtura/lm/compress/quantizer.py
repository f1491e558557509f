"""How transformers loads what :func:`mixtura.lm.compress.mixed_experts.convert` made: quant_method ``mixtura-mixed-experts``.

transformers imports this module while it is still importing itself, so nothing of its models is imported at the top.
"""

import copy
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["METHOD", "MixedExpertsConfig", "MixedExpertsQuantizer", "describe", "register", "unpacked"]

METHOD = "mixtura-mixed-experts"


class MixedExpertsConfig(QuantizationConfigMixin):
    """What stands in ``config.json`` of a compressed checkpoint.

    Attributes:
        allocation: bits of every expert, one list a mixture layer.
        blocks: path of each mixture layer.
        linears: path of each packed linear layer -> its bits.
        group_size: largest group; every width takes its largest divisor up to it that is a multiple of 16.
        pruning: settings of :func:`mixtura.lm.compress.dynamic_pruning.prune_dynamically`, or None.
    """

    def __init__(
        self,
        allocation: list[list[int]] | None = None,
        blocks: list[str] | None = None,
        linears: dict[str, int] | None = None,
        group_size: int = 128,
        pruning: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.allocation = allocation or []
        self.blocks = blocks or []
        self.linears = linears or {}
        self.group_size = group_size
        self.pruning = pruning
        if len(self.allocation) != len(self.blocks):
            raise ValueError(f"allocation has {len(self.allocation)} rows for {len(self.blocks)} mixture layers")


class MixedExpertsQuantizer(HfQuantizer):
    """Puts empty packed modules in place before the weights arrive; nothing is unpacked on the way."""

    requires_calibration = True
    quantization_config: MixedExpertsConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from mixtura.lm.anatomy import find_moe
        from mixtura.lm.compress.layers import unstack_attention
        from mixtura.lm.compress.packed import PackedLinear, group_size_for
        from mixtura.lm.compress.packed_experts import PackedExperts

        config = self.quantization_config
        if any(name.endswith("_stack") for name in config.linears):
            unstack_attention(model)
        blocks = {block.name: block for block in find_moe(model)}
        if missing := [name for name in config.blocks if name not in blocks]:
            raise ValueError(
                f"the checkpoint packs the experts of {missing[0]}, which {type(model).__name__} does not have"
            )
        for name, bits in zip(config.blocks, config.allocation, strict=True):
            block, experts = blocks[name], blocks[name].experts
            up, down = (getattr(experts, part).shape[2] for part in ("gate_up_proj", "down_proj"))
            packed = PackedExperts.like(
                experts,
                bits,
                up_group=group_size_for(up, config.group_size),
                down_group=group_size_for(down, config.group_size),
            )
            place = next(child for child, module in block.module.named_children() if module is experts)
            setattr(block.module, place, packed)
        for name, width in config.linears.items():
            linear = model.get_submodule(name)
            made = PackedLinear(
                linear.in_features,
                linear.out_features,
                bits=width,
                group_size=group_size_for(linear.in_features, config.group_size),
                bias=linear.bias is not None,
                dtype=linear.weight.dtype,
            ).to(linear.weight.device)
            model.set_submodule(name, made)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.quantization_config.pruning is not None:
            from mixtura.lm.compress.dynamic_pruning import attach

            attach(model, self.quantization_config.pruning)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return unpacked(model, dtype or torch.bfloat16)


def register() -> None:
    """Make the method known to transformers; a second call does nothing."""
    register_method(METHOD, MixedExpertsConfig, MixedExpertsQuantizer)


def register_method(method: str, config: type[Any], quantizer: type[Any]) -> None:
    """Make a way to quantize known to transformers by its name; a second call does nothing."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(method)(config)
    if method not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(method)(quantizer)


def describe(model: Any, *, blocks: list[str], allocation: list[list[int]], group_size: int) -> None:
    """Write into the model's config what its packed modules are, so that saving and loading find them."""
    from mixtura.lm.compress.packed import PackedLinear

    linears = {name: m.packed.bits[0] for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    config = MixedExpertsConfig(allocation=allocation, blocks=blocks, linears=linears, group_size=group_size)
    model.config.quantization_config = config
    model.hf_quantizer = MixedExpertsQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD


def unpacked(model: Any, dtype: torch.dtype) -> Any:
    """A plain float model with the values of a packed one; the packed one is left as it is."""
    from transformers import AutoModelForCausalLM

    from mixtura.lm.anatomy import find_moe
    from mixtura.lm.compress.mixed_channel_linear import MixedChannelLinear
    from mixtura.lm.compress.packed import PackedLinear
    from mixtura.lm.compress.packed_experts import PackedExperts

    config = copy.deepcopy(model.config)
    for name in ("quantization_config", "_is_quantized"):
        if hasattr(config, name):
            delattr(config, name)
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = plain.state_dict()
    for name, value in model.state_dict().items():
        if name in state:
            state[name].copy_(value)
    stacks = []
    for block, target in zip(find_moe(model), find_moe(plain), strict=True):
        stacks.append(f"{block.experts_name}.")
        experts: Any = target.experts
        if isinstance(block.experts, PackedExperts):
            for e in range(block.n_experts):
                experts.gate_up_proj.data[e] = block.experts.up.dequantize(e).to(dtype)
                experts.down_proj.data[e] = block.experts.down.dequantize(e).to(dtype)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            _put_back(plain, name, module.packed.dequantize(0))
        elif isinstance(module, MixedChannelLinear) and not name.startswith(tuple(stacks)):
            _put_back(plain, name, module.weight())
    return plain.eval()


def _put_back(plain: Any, name: str, weight: torch.Tensor) -> None:
    if not name.endswith("_stack"):
        plain.get_submodule(name).weight.data.copy_(weight)
        return
    attention, _, part = name.rpartition(".")
    stacked = getattr(plain.get_submodule(attention), part.replace("_stack", "_proj"))
    n, rows, columns = stacked.shape
    stacked.data.copy_(
        weight.view(rows, n, columns).transpose(0, 1) if part == "o_stack" else weight.view(n, rows, columns)
    )
