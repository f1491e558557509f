"""Two widths for the output channels of a whole model: the larger one where the loss would move most.

1. Salience of every row of every linear layer and expert (:mod:`mixtura.lm.compress.channel_salience`).
2. One list over the whole model; its top gets ``high_bits`` until ``high_share`` of the weights is spent.
3. Layer after layer, each fed by the layers already quantized: the rows of each width are rounded by GPTQ on their own, with
   the layer's Hessian in common, groups in descending order of their inputs, ranges clipped where that lowers the error.

Embeddings, head, norms and gates stay as they are; a head tied to the embedding stays tied.

Source: MixLLM (2412.14590), sec. 3; storage and products in :mod:`mixtura.lm.compress.mixed_channel_linear`.
"""

import contextlib
import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixtura.core.gptq import NonFiniteHessian, gptq
from mixtura.core.progress import progress
from mixtura.core.quantize import Quantized, nearest, split
from mixtura.lm.anatomy import MoEBlock, find_moe, idle_experts
from mixtura.lm.compress.channel_salience import Batch, allocate, channel_matrices, channel_salience, group_sizes
from mixtura.lm.compress.factors import as_batches
from mixtura.lm.compress.layers import LayerInputs, gram, linear_inputs, other_linears
from mixtura.lm.compress.mixed_channel_experts import MixedChannelExperts
from mixtura.lm.compress.mixed_channel_linear import MixedChannelLinear
from mixtura.lm.compress.mixed_experts import BLOCK_SHARE
from mixtura.lm.compress.packed_experts import expert_matrices, why_not

__all__ = ["MixedChannelConfig", "average_bits", "convert", "export_dense", "high_share_for", "stored_bits"]

log = logging.getLogger(__name__)

WIDTHS = (2, 3, 4, 6, 8)


@dataclass(frozen=True, kw_only=True)
class MixedChannelConfig:
    """How a model is quantized.

    Attributes:
        high_share: share of the weights (or rows) that get the larger width, in [0, 1]. With widths of 4 and 8 the default is
            4.4 bits on average, scales not counted.
        low_bits, high_bits: the widths, of 2, 3, 4, 6 and 8. Products run in 8-bit integers for 4 and 8.
        act_bits: 8: activations become 8-bit integers at run time, a scale for every token and group; None: they keep 15 bits.
        group_size: largest group; every width takes its largest divisor up to it that is a multiple of 16.
        budget: what ``high_share`` is a share of, ``"parameters"`` or, as in the paper, ``"channels"``.
        scope: ``"global"``: one list over the model; ``"layer"`` and ``"random"`` are baselines.
        rounding: ``"gptq"`` or ``"nearest"``.
        clip: search a narrower range for every group.
        skip: endings of names of layers to leave as they are.
    """

    high_share: float = 0.10
    low_bits: int = 4
    high_bits: int = 8
    act_bits: int | None = 8
    group_size: int = 128
    budget: Literal["parameters", "channels"] = "parameters"
    scope: Literal["global", "layer", "random"] = "global"
    rounding: Literal["gptq", "nearest"] = "gptq"
    clip: bool = True
    skip: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        if not 0 <= self.high_share <= 1:
            raise ValueError(f"high_share must lie in [0, 1], got {self.high_share:g}")
        for name in ("low_bits", "high_bits"):
            if getattr(self, name) not in WIDTHS:
                raise ValueError(f"{name} must be one of {list(WIDTHS)}, got {getattr(self, name)}")
        if self.high_bits <= self.low_bits:
            raise ValueError(f"high_bits={self.high_bits} must be larger than low_bits={self.low_bits}")
        if self.act_bits not in (None, 8):
            raise ValueError(f"act_bits must be 8 or None, got {self.act_bits}")
        if self.group_size < 16:
            raise ValueError(f"group_size must be at least 16, got {self.group_size}")
        for name, known in (
            ("budget", ("parameters", "channels")),
            ("scope", ("global", "layer", "random")),
            ("rounding", ("gptq", "nearest")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")


def high_share_for(bits: float, low_bits: int = 4, high_bits: int = 8) -> float:
    """Share of the weights that must get the larger width for an average of ``bits``, scales not counted.

    Raises:
        ValueError: an average that these widths cannot reach; the range is named.
    Example:
        >>> round(high_share_for(4.4), 3)
        0.1
    """
    if not low_bits <= bits <= high_bits:
        raise ValueError(
            f"bits={bits:g} cannot be reached: with channels of {low_bits} and {high_bits} bits the average lies between "
            f"{low_bits} and {high_bits}"
        )
    return (bits - low_bits) / (high_bits - low_bits)


def convert(
    model: Any,
    calibration: Tensor | Iterable[Batch],
    config: MixedChannelConfig | None = None,
    *,
    salience: Mapping[str, Tensor] | None = None,
    inplace: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    """Quantize the linear layers and experts of a model, a few output channels to more bits than the rest.

    Args:
        model: a causal language model in float: Llama, Mistral, Qwen, Gemma, Mixtral, OLMoE, DeepSeek and others made of linear
            layers and stacked experts. One whose experts :mod:`mixtura.lm.compress.mixed_experts` packed and nothing else
            (``other_bits=None``) is taken too: what is left in float is quantized.
        calibration: token ids (N, length), or batches of them, or of dictionaries with ``input_ids``.
        config: widths, share, groups and rounding.
        salience: measured before by :func:`~mixtura.lm.compress.channel_salience.channel_salience`.
        inplace: change the model itself instead of a copy.
        generator: of ``scope="random"``.
    Returns:
        The quantized model in evaluation mode; ``save_pretrained`` writes packed weights, and ``from_pretrained`` loads them
        after ``import mixtura``.
    Raises:
        ValueError: a model quantized already, no calibration batch, samples of one token, a width that no group divides (the
            layer is named), a gradient or input that is not finite (the layer is named).
        TypeError: a model whose output has no logits.
    """
    config = config or MixedChannelConfig()
    _refuse_quantized(model)
    batches = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    if not inplace:
        model = copy.deepcopy(model)
    model.eval()
    matrices = channel_matrices(model, skip=config.skip)
    if not matrices:
        raise ValueError(f"{type(model).__name__} has no linear layer in float left to quantize")
    groups = group_sizes(matrices, config.group_size)
    told = {groups[n] for n in groups} - {config.group_size}
    if told:
        log.info("widths that %d does not divide take groups of %s", config.group_size, sorted(told))
    if salience is None:
        given = calibration if isinstance(calibration, Tensor) else batches
        salience = channel_salience(model, given, bits=config.low_bits, group_size=config.group_size)
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in matrices.items()}
    chosen = allocate(
        {name: salience[name] for name in matrices},
        shapes,
        config.high_share,
        budget=config.budget,
        scope=config.scope,
        generator=generator,
    )
    ids = [b if isinstance(b, Tensor) else b["input_ids"] for b in batches]
    rows = as_batches(torch.cat(ids)) if len({i.shape[1] for i in ids}) == 1 else ids
    # no_grad and not inference_mode: its tensors could not be written to afterwards, by load_state_dict for one.
    with torch.no_grad():
        _quantize_layers(model, rows, chosen, groups, config)
    from mixtura.lm.compress.channel_quantizer import describe

    describe(model, config)
    return model


def export_dense(model: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A plain float copy of a quantized model, for engines that know no channels of two widths (vLLM does not)."""
    from mixtura.lm.compress.quantizer import unpacked

    with torch.inference_mode():
        return unpacked(model, dtype)


def average_bits(model: nn.Module) -> float:
    """Bits of a quantized weight by its code alone, over all mixed layers of a model."""
    layers = _mixed(model)
    codes = sum(8 * part.codes.numel() for layer in layers for part in (layer.low, layer.high))
    return codes / sum(layer.in_features * layer.out_features for layer in layers)


def stored_bits(model: nn.Module) -> float:
    """Bits of a quantized weight with its share of scales, zero points and order, over all mixed layers of a model."""
    layers = _mixed(model)
    return 8 * sum(layer.nbytes for layer in layers) / sum(layer.in_features * layer.out_features for layer in layers)


def _mixed(model: nn.Module) -> list[MixedChannelLinear]:
    layers = [module for module in model.modules() if isinstance(module, MixedChannelLinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer with mixed channels; convert it first")
    return layers


def _refuse_quantized(model: Any) -> None:
    from mixtura.lm.compress.quantizer import METHOD

    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    left = channel_matrices(model)
    if method != METHOD or not left:
        raise ValueError(
            f"the model is quantized already ({getattr(method, 'value', method)}); start from the checkpoint in float"
        )


def _quantize_layers(
    model: Any,
    batches: Sequence[Tensor],
    chosen: Mapping[str, Tensor],
    groups: dict[str, int],
    config: MixedChannelConfig,
) -> None:
    inputs = LayerInputs(model, batches)
    blocks = [block for block in find_moe(model) if why_not(block.experts) is None]
    weighed = config.rounding == "gptq" or config.clip
    made: dict[int, MixedChannelLinear] = {}  # a weight that two layers share is quantized once
    for path, layer in progress(inputs.layers, desc="quantize", unit="layer"):
        mine = [block for block in blocks if f"{block.name}.".startswith(f"{path}.")]
        linears = {n: m for n, m in other_linears(layer).items() if f"{path}.{n}" in chosen or id(m.weight) in made}
        alike: list[tuple[list[str], Tensor | None]] = []
        if weighed:
            with contextlib.ExitStack() as idle:
                for block in mine:
                    if not any(f"{path}.{name}".startswith(f"{block.name}.") for name in linears):
                        idle.enter_context(idle_experts(block))
                alike += linear_inputs(inputs, layer, linears)
        alike += [([name], None) for name in linears if name not in {n for names, _ in alike for n in names}]
        for names, hessian in alike:
            fresh = [name for name in names if id(linears[name].weight) not in made]
            weights = [linears[name].weight.detach() for name in fresh]
            masks = [chosen[f"{path}.{name}"].to(linears[name].weight.device) for name in fresh]
            if fresh:
                where = f"{path}.{fresh[0]}"
                for name, (low, high) in zip(
                    fresh, _rounded(weights, masks, hessian, groups[where], config, where), strict=True
                ):
                    linear, mask = linears[name], masks[fresh.index(name)]
                    made[id(linear.weight)] = MixedChannelLinear.of(
                        low, high, mask, bias=linear.bias, act_bits=config.act_bits
                    )
            for name in names:
                layer.set_submodule(name, made[id(linears[name].weight)])
        for block in mine:
            if f"{block.experts_name}.gate_up_proj" in chosen:
                packed = _experts(block, inputs, layer, chosen, groups, config, weighed)
                setattr(block.module, block.experts_name.rpartition(".")[2], packed)
        inputs.advance(layer)


def _experts(
    block: MoEBlock,
    inputs: LayerInputs,
    layer: nn.Module,
    chosen: Mapping[str, Tensor],
    groups: dict[str, int],
    config: MixedChannelConfig,
    weighed: bool,
) -> MixedChannelExperts:
    experts: Any = block.experts
    x_TD, indices_TK = inputs.routed(layer, block)
    names = [f"{block.experts_name}.{part}" for part in ("gate_up_proj", "down_proj")]
    up_masks, down_masks = (chosen[name].to(x_TD.device).chunk(block.n_experts) for name in names)
    up_group, down_group = (groups[name] for name in names)
    packed = MixedChannelExperts(block.n_experts, experts.act_fn)
    whole = gram(x_TD) if weighed else None
    for e in range(block.n_experts):
        up, down = expert_matrices(experts, e)
        mine_MD = x_TD[(indices_TK == e).any(-1)]
        name = f"{block.name}, expert {e}"
        hessian = None
        if whole is not None:
            hessian = gram(mine_MD)
            if len(mine_MD) < up.shape[1]:
                hessian = hessian + BLOCK_SHARE * whole
        (parts,) = _rounded([up], [up_masks[e]], hessian, up_group, config, name)
        packed.up.append(MixedChannelLinear.of(*parts, up_masks[e], act_bits=config.act_bits))
        if whole is not None:
            hessian = gram(packed.inner(e, mine_MD))
            if len(mine_MD) < down.shape[1]:
                hessian = hessian + BLOCK_SHARE * gram(packed.inner(e, x_TD))
        (parts,) = _rounded([down], [down_masks[e]], hessian, down_group, config, name)
        packed.down.append(MixedChannelLinear.of(*parts, down_masks[e], act_bits=config.act_bits))
    return packed


def _rounded(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    hessian: Tensor | None,
    group: int,
    config: MixedChannelConfig,
    name: str,
) -> list[tuple[Quantized, Quantized]]:
    """Low and high rows of matrices that read the same inputs, rounded together: rows do not know of each other."""
    parts = []
    for wanted, bits, symmetric in ((False, config.low_bits, False), (True, config.high_bits, True)):
        rows = [weight[mask == wanted].float() for weight, mask in zip(weights, masks, strict=True)]
        together = torch.cat(rows)
        try:
            if config.rounding == "gptq" and hessian is not None and len(together):
                found = gptq(together, hessian, bits, group, symmetric=symmetric, clip=config.clip, reorder=True)
            else:
                found = nearest(together, bits, group, symmetric=symmetric, clip=config.clip, hessian=hessian)
        except NonFiniteHessian as error:
            raise NonFiniteHessian(f"{name}: {error}") from error
        parts.append(split(found, [len(part) for part in rows]))
    return list(zip(*parts, strict=True))
