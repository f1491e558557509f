"""Sparse layers of equal cost in language models: any causal model of transformers in, one that saves and loads out.

``parallel``, ``factorized`` and ``doped`` replace the linear layers between the embeddings and the head. ``wide`` builds the
model anew from its config: width, heads (of the same size) and hidden units times k; embeddings, norms and head stay dense,
and what they and the attention scores cost more is taken off the density of the rest.

GPT-2's transposed layers become plain linear ones where they are replaced. Stacked experts can only be widened; each expert
has a mask of its own.

Source: Saxena et al. 2023 (2303.11525), sec. 2.3 and 3.3.
"""

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace as changed
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from mixtura.core.flops import FlopReport, count_flops
from mixtura.core.isoflop import IsoFlop, add_masks, scaled_width, widening
from mixtura.core.isoflop import convert as convert_layers
from mixtura.core.sparse_layers import Between, mask_parameter
from mixtura.lm.anatomy import find_moe
from mixtura.lm.sparse_checkpoint import describe

__all__ = ["BETWEEN", "FAMILIES", "convert", "count", "plain_layers", "widened_config"]

log = logging.getLogger(__name__)

# Inside a block of a transformer values have both signs and no batch norm is near.
BETWEEN = Between(norm="rms", activation="none")
FAMILIES = ("gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen3")
# Grouped products of experts want rows of a multiple of 16 bytes.
EXPERT_UNITS = 8
# A row of one number a token: what they weigh has no width to gain.
SKIP = ("*.gate", "*_gate", "*router*")


def convert(
    model: Any,
    transform: IsoFlop,
    *,
    length: int = 128,
    multiple_of: int = 1,
    seed: int = 0,
    fresh: bool = False,
) -> Any:
    """Turn a dense language model into a sparse one of the same forward cost.

    Args:
        model: a causal model of transformers; it is left as it is.
        transform: member and sparsity; see :class:`~mixtura.core.isoflop.IsoFlop`.
        length: tokens of the text for which the costs are equal; attention scores grow with it.
        multiple_of: hidden units of a widened model are a multiple of this; of a mixture also of 8.
        seed: of new weights and masks.
        fresh: start doped layers anew too, without a warning for the others.
    Returns:
        A model in evaluation mode that ``save_pretrained`` keeps and, after ``import mixtura``, ``from_pretrained`` loads. A wide
        one has wholly new weights; so have the replaced layers of a parallel or factorized one. A doped one keeps what its
        rank and density can hold. With sparsity 0, the model as it was.
    Raises:
        ValueError: a model that is quantized or sparse already, a family that cannot be widened, or what
            :func:`mixtura.core.isoflop.convert` and :func:`~mixtura.core.isoflop.widen` name.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
        >>> dense = LlamaForCausalLM(tiny)
        >>> sparse = convert(dense, IsoFlop("doped", 0.5), length=16)
        >>> abs(count(sparse, 16).total / count(dense, 16).total - 1) < 0.001
        True
    """
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("the model is quantized or sparse already; convert the dense one")
    if transform.sparsity == 0:
        return copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    transform = changed(transform, skip=(*transform.skip, *SKIP))
    if transform.member == "wide":
        return _widen(model, transform, length=length, multiple_of=multiple_of, seed=seed)
    made = copy.deepcopy(model).eval()
    plain_layers(made)
    if find_moe(made):
        log.info("stacked experts stay dense; member 'wide' masks them")
    spread = float(getattr(model.config, "initializer_range", 0.02))

    def init(layer: nn.Module, generator: torch.Generator | None) -> None:
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=spread, generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    with _countable(made):
        convert_layers(
            made,
            transform,
            example_input=_example(made, length),
            generator=generator,
            fresh=fresh,
            inplace=True,
            init=init,
        )
    describe(made, transform)
    return made


def count(model: Any, length: int = 128) -> FlopReport:
    """Forward multiply-adds of a language model for one text of ``length`` tokens."""
    with _countable(model):
        return count_flops(model, _example(model, length))


def widened_config(config: Any, sparsity: float, *, multiple_of: int = 1) -> Any:
    """The config of a model k = 1 / sqrt(1 - sparsity) times as wide, a copy.

    Key and value heads are rounded to whole ones, query heads follow in the same ratio, and the width follows the heads, whose
    size stays; hidden units are rounded to ``multiple_of``.

    Raises:
        ValueError: a family whose widths are not known (the known ones are listed).
    Example:
        >>> from transformers import LlamaConfig
        >>> wide = widened_config(LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4), 0.75)
        >>> wide.hidden_size, wide.intermediate_size, wide.num_attention_heads, wide.head_dim
        (128, 256, 8, 16)
    """
    if config.model_type not in FAMILIES:
        raise ValueError(f"only {', '.join(FAMILIES)} can be widened, got {config.model_type}; take another member")
    made = copy.deepcopy(config)
    if sparsity == 0:
        return made
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    new_groups = scaled_width(groups, sparsity)
    new_heads = new_groups * heads // groups
    if config.hidden_size * new_heads % heads:
        raise ValueError(f"hidden_size={config.hidden_size} does not widen evenly from {heads} to {new_heads} heads")
    made.num_attention_heads = new_heads
    made.hidden_size = config.hidden_size * new_heads // heads
    if hasattr(config, "num_key_value_heads"):
        made.num_key_value_heads = new_groups
    for name in ("intermediate_size", "n_inner"):
        if isinstance(getattr(config, name, None), int):
            setattr(made, name, scaled_width(getattr(config, name), sparsity, multiple_of=multiple_of))
    return made


def _widen(model: Any, transform: IsoFlop, *, length: int, multiple_of: int, seed: int) -> Any:
    budget = count(model, length).total
    if find_moe(model):
        multiple_of = math.lcm(multiple_of, EXPERT_UNITS)

    def build(sparsity: float) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = widened_config(model.config, sparsity, multiple_of=multiple_of)
            made = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
        for block in find_moe(made):
            for name, parameter in block.experts.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    mask_parameter(block.experts, name)
        for module in made.modules():
            if isinstance(module, Conv1D):
                if transform.n_m[1]:
                    raise ValueError(
                        f"n_m={transform.n_m} groups the inputs of a row, and {made.config.model_type} holds its matrices the "
                        "other way round; take another member, whose layers are plain, or another family"
                    )
                mask_parameter(module, "weight")
        if find_moe(made):
            made.set_experts_implementation("eager")  # plain products, which can be counted
        return made

    made = build(transform.sparsity)
    add_masks(
        made,
        transform,
        budget,
        example_input=_example(made, length),
        generator=torch.Generator().manual_seed(seed),
        rebuild=build,
    )
    heads, wanted = made.config.num_attention_heads, model.config.num_attention_heads * widening(transform.sparsity)
    if abs(heads / wanted - 1) > 0.02:
        log.warning("%.3g heads are rounded to %d, so the model is not as wide as its sparsity says", wanted, heads)
    if find_moe(made):
        made.set_experts_implementation(model.config._experts_implementation)
    made.generation_config = copy.deepcopy(model.generation_config)
    describe(made, transform)
    return made.to(model.device)


def plain_layers(model: nn.Module) -> None:
    """Linear layers in the place of GPT-2's, which hold their matrix the other way round."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            made = nn.Linear(inputs, outputs, device=module.weight.device, dtype=module.weight.dtype)
            with torch.no_grad():
                made.weight.copy_(module.weight.T)
                made.bias.copy_(module.bias)
            model.set_submodule(name, made)


def _example(model: Any, length: int) -> dict[str, Any]:
    longest = getattr(model.config, "max_position_embeddings", None) or math.inf
    if not 1 <= length <= longest:
        raise ValueError(f"length must be between 1 and the model's {longest} positions, got {length}")
    return {"input_ids": torch.zeros(1, length, dtype=torch.long, device=model.device), "use_cache": False}


@contextmanager
def _countable(model: Any) -> Iterator[None]:
    """Experts one by one, which are plain products that the counter knows."""
    before = getattr(model.config, "_experts_implementation", None)
    if find_moe(model):
        model.set_experts_implementation("eager")
    try:
        yield
    finally:
        if find_moe(model) and before is not None:
            model.set_experts_implementation(before)
