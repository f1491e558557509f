"""How much each expert matters: how often it is chosen, how strongly it is weighted, and how much its rounding hurts.

One pass over calibration text in float. The error of expert i at j bits is the change of its block's output on the block's
float inputs when only that expert is quantized. Only tokens routed to i change, so it is computed over those:
|| w_i(t) (E_i(t) - E_i^j(t)) ||_F.

Shapes: T tokens, D width, E experts, K chosen, L mixture layers.
Source: MC-MoE (2410.06270), sec. 3.2, eq. 2-4.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mixtura.core.checkpoint import atomic_file
from mixtura.core.gates import Routing
from mixtura.core.progress import progress
from mixtura.core.quantize import nearest
from mixtura.lm.anatomy import MoEBlock, find_moe, rerouted, run_layers
from mixtura.lm.compress.packed import group_size_for
from mixtura.lm.compress.packed_experts import expert_matrices, why_not

__all__ = ["ExpertFactors", "as_batches", "expert_factors", "mixture_blocks"]


@dataclass(frozen=True)
class ExpertFactors:
    """What the integer program weighs.

    Attributes:
        frequency: share of the tokens whose choice contains the expert, (L, E); rows sum to K.
        weight: mean over all tokens of the expert's probability where it was chosen, before renormalisation, (L, E).
        error: change of the block's output by quantizing the expert alone to each width, (L, E, len(bits)).
        bits: the widths.
        tokens: calibration tokens.
    """

    frequency: Tensor
    weight: Tensor
    error: Tensor
    bits: tuple[int, ...]
    tokens: int

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        tensors = {name: getattr(self, name).contiguous() for name in ("frequency", "weight", "error")}
        with atomic_file(path) as beside:
            save_file(tensors, beside, {"bits": ",".join(map(str, self.bits)), "tokens": str(self.tokens)})

    @classmethod
    def load(cls, path: str | Path) -> "ExpertFactors":
        """Read what :meth:`save` wrote."""
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            if "bits" not in told:
                raise ValueError(f"{path} holds no expert factors")
            tensors = {name: file.get_tensor(name) for name in ("frequency", "weight", "error")}
        return cls(**tensors, bits=tuple(int(b) for b in told["bits"].split(",")), tokens=int(told["tokens"]))


@torch.inference_mode()
def expert_factors(
    model: Any,
    batches: Tensor | Iterable[Tensor],
    *,
    bits: Sequence[int] = (1, 2, 3),
    group_size: int = 128,
) -> ExpertFactors:
    """Measure the factors of every expert of a model.

    Args:
        model: a mixture of experts in float.
        batches: calibration token ids, (N, length), or batches of them.
        bits: widths to measure the error of, rounded to nearest.
        group_size: inputs a group; the largest divisor of each width that is at most this and a multiple of 16.
    Raises:
        ValueError: a dense model (its class is named), or experts that cannot be packed (the reason is given).
    """
    blocks = mixture_blocks(model)
    n_experts = blocks[0].n_experts
    index = {block.name: i for i, block in enumerate(blocks)}
    counts = torch.zeros(len(blocks), n_experts, dtype=torch.float64)
    weights = torch.zeros_like(counts)
    squares = torch.zeros(len(blocks), n_experts, len(bits), dtype=torch.float64)
    tokens = 0

    def measure(block: MoEBlock, routing: Routing) -> tuple[Tensor, Tensor]:
        i = index[block.name]
        probs_TK = block.probabilities(routing).gather(-1, routing.indices)
        for expert in range(n_experts):
            token, slot = (routing.indices == expert).nonzero(as_tuple=True)
            counts[i, expert] += len(token)
            weights[i, expert] += probs_TK[token, slot].double().sum()
            if len(token):
                gates = routing.weights[token, slot, None].float()
                off = _output_errors(block, expert, inputs[block.name][token].float(), bits, group_size)
                for j, changed in enumerate(off):
                    squares[i, expert, j] += (gates * changed).double().square().sum()
        return routing.weights, routing.indices

    inputs: dict[str, Tensor] = {}
    hooks = [block.experts.register_forward_pre_hook(_keep_input(inputs, block.name)) for block in blocks]
    try:
        with rerouted(blocks, measure):
            for batch in progress(as_batches(batches), desc="factors", unit="batch"):
                run_layers(model, batch)
                tokens += batch.numel()
    finally:
        for hook in hooks:
            hook.remove()
    return ExpertFactors(
        (counts / tokens).float(), (weights / tokens).float(), squares.sqrt().float(), tuple(bits), tokens
    )


def mixture_blocks(model: Any) -> list[MoEBlock]:
    """Mixture layers of a model whose experts can be packed.

    Raises:
        ValueError: a dense model, a model packed already, or another layout; the class and the reason are named.
    """
    blocks = find_moe(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} is a dense model and this compresses experts; upcycle it to a mixture first"
        )
    for block in blocks:
        if (reason := why_not(block.experts)) is not None:
            raise ValueError(f"the experts of {block.name} ({type(block.experts).__name__}) cannot be packed: {reason}")
    return blocks


def as_batches(batches: Tensor | Iterable[Tensor], tokens: int = 4096) -> list[Tensor]:
    """Batches of about ``tokens`` tokens, one row at least."""
    if isinstance(batches, Tensor):
        if batches.dim() != 2 or not len(batches):
            raise ValueError(f"calibration tokens must have shape (N, length) with N >= 1, got {tuple(batches.shape)}")
        return list(batches.split(max(1, tokens // batches.shape[1])))
    found = list(batches)
    if not found:
        raise ValueError("no calibration batch was given")
    return found


def _keep_input(inputs: dict[str, Tensor], name: str) -> Any:
    def hook(module: Any, args: tuple[Any, ...]) -> None:
        inputs[name] = args[0]

    return hook


def _output_errors(block: MoEBlock, expert: int, x: Tensor, bits: Sequence[int], group_size: int) -> list[Tensor]:
    """Output of the float expert minus that of each quantized one, (M, D) each."""
    up, down = (w.float() for w in expert_matrices(block.experts, expert))
    want = _run(block, x, up, down)
    found = []
    for b in bits:
        rough_up = nearest(up, b, group_size_for(up.shape[1], group_size)).dequantize()
        rough_down = nearest(down, b, group_size_for(down.shape[1], group_size)).dequantize()
        found.append(want - _run(block, x, rough_up, rough_down))
    return found


def _run(block: MoEBlock, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    experts: Any = block.experts
    gate, inner = F.linear(x, up).chunk(2, dim=-1)
    return F.linear(experts.act_fn(gate) * inner, down)
