"""Mixed-precision experts: an integer program gives each expert its bits, GPTQ rounds with the tokens routed to it.

1. Factors of every expert from one float pass (:mod:`mixtura.lm.compress.factors`).
2. Bits: minimise sum frequency^a * weight^b * error^g under an average, per block or over the whole model.
3. Layer after layer, each fed by the layers already quantized: attention and shared experts at 4 bits, then every expert
   with the Hessian of its own tokens. An expert with fewer tokens than its width gets those of the whole block besides, at a
   hundredth of the weight: its Hessian would be singular, and skipping it would leave it unrounded.

Router, norms, embeddings and head stay as they are.

Shapes: T tokens, D width, E experts, L mixture layers.
Source: MC-MoE (2410.06270), sec. 3.2, eq. 4-6.
"""

import contextlib
import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import LongTensor, Tensor

from mixtura.core import assign
from mixtura.core.gptq import NonFiniteHessian, gptq
from mixtura.core.progress import progress
from mixtura.core.quantize import Quantized, nearest, split
from mixtura.lm.anatomy import MoEBlock, idle_experts
from mixtura.lm.compress.factors import ExpertFactors, as_batches, expert_factors, mixture_blocks
from mixtura.lm.compress.layers import LayerInputs, gram, linear_inputs, other_linears, unstack_attention
from mixtura.lm.compress.packed import PackedLinear, group_size_for
from mixtura.lm.compress.packed_experts import PackedExperts, expert_matrices

__all__ = ["PAPER", "RELEASED", "allocate_bits", "convert", "export_dense"]

log = logging.getLogger(__name__)

PAPER = (1.0, 1.0, 2.0)  # exponents of frequency, weight and error
RELEASED = (1.0, 1.5, 1.0)  # what the authors' allocations are the optimum for
BITS = (1, 2, 3)
BLOCK_SHARE = 1e-2  # weight of the whole block's tokens in the Hessian of an expert with few of its own

Rounding = Literal["gptq", "nearest"]


def allocate_bits(
    factors: ExpertFactors,
    average: float,
    *,
    exponents: tuple[float, float, float] = PAPER,
    at_least: Mapping[int, int] | None = None,
    equality: bool = False,
    scope: Literal["block", "model"] = "block",
) -> LongTensor:
    """Bits of every expert, (L, E).

    Args:
        factors: what the experts matter.
        average: bits an expert on average; scales not counted.
        exponents: of frequency, weight and error.
        at_least: width -> least number of experts of each block that get it; ``{3: 1, 2: 1}`` by default.
        equality: spend the budget exactly.
        scope: ``"block"``: one program a block, every block the same average; ``"model"``: one over all blocks.
    Raises:
        ValueError: an average that no allocation meets; the range that can be met is named.
    """
    at_least = {3: 1, 2: 1} if at_least is None else at_least
    at_least = {width: count for width, count in at_least.items() if width in factors.bits}
    if scope not in ("block", "model"):
        raise ValueError(f"scope must be 'block' or 'model', got {scope!r}")
    a, b, g = exponents
    n_blocks, n_experts = factors.frequency.shape
    # An expert that no token chose counts as chosen once: its bits are then decided like any other's.
    frequency = factors.frequency.clamp(min=1 / factors.tokens).double()
    weight = factors.weight.double()
    weight = torch.where(weight > 0, weight, weight[weight > 0].min() if bool((weight > 0).any()) else 1.0)
    error = factors.error.double()
    # Normalised over the experts of a block, as the authors' code does.
    frequency, weight = frequency / frequency.sum(1, keepdim=True), weight / weight.sum(1, keepdim=True)
    cost = (frequency**a * weight**b)[:, :, None] * error**g
    if scope == "block":
        budget = _whole(average * n_experts, equality)
        found = [
            assign.allocate_bits(block.numpy(), factors.bits, budget, at_least=at_least, equality=equality)
            for block in cost
        ]
        return torch.from_numpy(np.stack(found))  # type: ignore[return-value]
    budget = _whole(average * n_experts * n_blocks, equality)
    together = {width: count * n_blocks for width, count in at_least.items()}
    flat = assign.allocate_bits(cost.flatten(0, 1).numpy(), factors.bits, budget, at_least=together, equality=equality)
    return torch.from_numpy(flat).view(n_blocks, n_experts)  # type: ignore[return-value]


@torch.inference_mode()
def convert(
    model: Any,
    calibration: Tensor | Sequence[Tensor],
    *,
    average_bits: float = 2.5,
    other_bits: int | None = 4,
    allocation: Tensor | None = None,
    exponents: tuple[float, float, float] = PAPER,
    scope: Literal["block", "model"] = "block",
    group_size: int = 128,
    rounding: Rounding = "gptq",
    intra_block: bool = True,
    factors: ExpertFactors | None = None,
    inplace: bool = False,
) -> Any:
    """Compress the experts of a model to a few bits.

    Args:
        model: a mixture of experts in float; Mixtral, OLMoE, Qwen2/3-MoE, DeepSeek, mixtura's own and others whose experts are
            stacked, gated and without bias.
        calibration: token ids, (N, length), or batches of them.
        average_bits: of an expert's weight, scales not counted; between 1 and 3.
        other_bits: bits of attention and shared experts; ``None`` leaves them as they are.
        allocation: bits of every expert, (L, E), instead of the program's.
        exponents, scope: see :func:`allocate_bits`.
        group_size: largest group; each width takes its largest divisor up to it that is a multiple of 16.
        rounding: ``"gptq"`` or ``"nearest"``.
        intra_block: see :func:`mixtura.core.gptq.gptq`; ``False`` is what the authors released.
        factors: measured before, so that they are not measured again.
        inplace: change the model itself instead of a copy.
    Returns:
        The compressed model in evaluation mode; ``save_pretrained`` writes packed weights.
    Raises:
        ValueError: a dense or packed model, an average that cannot be met (its range is named), an allocation of another
            shape, a width without a usable group.
    """
    if rounding not in ("gptq", "nearest"):
        raise ValueError(f"rounding must be 'gptq' or 'nearest', got {rounding!r}")
    blocks = mixture_blocks(model)
    batches = as_batches(calibration)
    shape = (len(blocks), blocks[0].n_experts)
    if any(block.n_experts != shape[1] for block in blocks):
        raise ValueError(
            f"layers have {sorted({block.n_experts for block in blocks})} experts, and one program over experts needs equal "
            "numbers; method='mixllm' takes any model"
        )
    if allocation is None:
        # Refused before any work: the program alone would only notice after the calibration pass.
        _check_average(average_bits, blocks[0].n_experts)
        if factors is None:
            factors = expert_factors(model, batches, bits=BITS, group_size=group_size)
        _warn_of_idle(factors)
        allocation = allocate_bits(factors, average_bits, exponents=exponents, scope=scope)
    if tuple(allocation.shape) != shape:
        raise ValueError(f"allocation must have shape {shape} (layers, experts), got {tuple(allocation.shape)}")
    if not inplace:
        model = copy.deepcopy(model)
        blocks = mixture_blocks(model)
    model.eval()
    _quantize_layers(model, blocks, batches, allocation, other_bits, group_size, rounding, intra_block)
    from mixtura.lm.compress.quantizer import describe

    describe(model, blocks=[block.name for block in blocks], allocation=allocation.tolist(), group_size=group_size)
    return model


@torch.inference_mode()
def export_dense(model: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A plain float copy of a compressed model, for engines that know no packed experts; it takes the full memory."""
    from mixtura.lm.compress.quantizer import unpacked

    return unpacked(model, dtype)


def _quantize_layers(
    model: Any,
    blocks: Sequence[MoEBlock],
    batches: Sequence[Tensor],
    allocation: Tensor,
    other_bits: int | None,
    group_size: int,
    rounding: Rounding,
    intra_block: bool,
) -> None:
    inputs = LayerInputs(model, batches)
    if other_bits is not None:
        unstack_attention(model)
    for path, layer in progress(inputs.layers, desc="compress", unit="layer"):
        mine = [(i, block) for i, block in enumerate(blocks) if f"{block.name}.".startswith(f"{path}.")]
        if other_bits is not None:
            linears = other_linears(layer)
            alike: list[tuple[list[str], Tensor | None]] = []
            if rounding == "gptq":
                with contextlib.ExitStack() as idle:
                    for _, block in mine:
                        # Attention comes before the experts; what stands beside them may read what they give.
                        if not any(f"{path}.{name}".startswith(f"{block.name}.") for name in linears):
                            idle.enter_context(idle_experts(block))
                    alike += linear_inputs(inputs, layer, linears)
            alike += [([name], None) for name in linears.keys() - {name for names, _ in alike for name in names}]
            for names, hessian in alike:
                together = torch.cat([linears[name].weight for name in names])
                group = group_size_for(together.shape[1], group_size)
                matrix = _rounded(together, hessian, other_bits, group, intra_block, f"{path}.{names[0]}")
                for name, part in zip(names, split(matrix, [linears[n].out_features for n in names]), strict=True):
                    layer.set_submodule(name, PackedLinear.of(linears[name], part))
        for i, block in mine:
            routed = inputs.routed(layer, block)
            packed = _packed_experts(block, routed, allocation[i].tolist(), group_size, rounding, intra_block)
            _replace_experts(block, packed)
        inputs.advance(layer)


def _packed_experts(
    block: MoEBlock,
    routed: tuple[Tensor, Tensor],
    bits: list[int],
    group_size: int,
    rounding: Rounding,
    intra_block: bool,
) -> PackedExperts:
    experts: Any = block.experts
    x_TD, indices_TK = routed
    up_group = group_size_for(experts.gate_up_proj.shape[2], group_size)
    down_group = group_size_for(experts.down_proj.shape[2], group_size)
    packed = PackedExperts.like(experts, bits, up_group=up_group, down_group=down_group)
    whole = gram(x_TD)
    for expert, b in enumerate(bits):
        up, down = expert_matrices(experts, expert)
        mine_MD = x_TD[(indices_TK == expert).any(-1)]
        name = f"{block.name}, expert {expert}"
        if rounding == "nearest":
            packed.up.put(expert, nearest(up, b, up_group))
            packed.down.put(expert, nearest(down, b, down_group))
            continue
        hessian = gram(mine_MD)
        if len(mine_MD) < up.shape[1]:
            hessian = hessian + BLOCK_SHARE * whole
        packed.up.put(expert, _rounded(up, hessian, b, up_group, intra_block, name))
        # What the down projection reads comes from the rounded up projection.
        hessian = gram(packed.inner(expert, mine_MD))
        if len(mine_MD) < down.shape[1]:
            hessian = hessian + BLOCK_SHARE * gram(packed.inner(expert, x_TD))
        packed.down.put(expert, _rounded(down, hessian, b, down_group, intra_block, name))
    return packed


def _rounded(weight: Tensor, hessian: Tensor | None, bits: int, group: int, intra_block: bool, name: str) -> Quantized:
    try:
        if hessian is None:
            return nearest(weight, bits, group)
        return gptq(weight.float(), hessian, bits, group, intra_block=intra_block)
    except NonFiniteHessian as error:
        raise NonFiniteHessian(f"{name}: {error}") from error


def _replace_experts(block: MoEBlock, packed: PackedExperts) -> None:
    name = next(name for name, child in block.module.named_children() if child is block.experts)
    setattr(block.module, name, packed)


def _check_average(average: float, n_experts: int) -> None:
    low, _ = assign.feasible_range(n_experts, BITS, at_least={3: 1, 2: 1})
    if not low / n_experts <= average <= max(BITS):
        raise ValueError(
            f"average_bits={average:g} cannot be met: with one expert of 3 and one of 2 bits in every block of {n_experts}, "
            f"the average lies between {low / n_experts:.3g} and {max(BITS)}"
        )


def _warn_of_idle(factors: ExpertFactors) -> None:
    idle = (factors.frequency == 0).nonzero().tolist()
    if idle:
        shown = ", ".join(f"{expert} of block {block}" for block, expert in idle[:5])
        log.warning(
            "%d experts saw no calibration token (%s%s); they count as chosen once (give more calibration text)",
            len(idle),
            shown,
            ", ..." if len(idle) > 5 else "",
        )


def _whole(budget: float, equality: bool) -> int:
    if equality and abs(budget - round(budget)) > 1e-6:
        raise ValueError(f"an exact budget must be a whole number of bits, got {budget:g}")
    return int(np.floor(budget + 1e-6))
