"""The claim of mixed channels over a whole model, on a real language model and Python's standard library."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.core.quantize import nearest
from mixtura.data.models import smollm2
from mixtura.data.texts import corpus
from mixtura.lm.compress.channel_salience import allocate, channel_matrices, channel_salience, group_sizes
from mixtura.lm.compress.mixed_channels import MixedChannelConfig, convert, export_dense, high_share_for, stored_bits
from mixtura.lm.evaluate import perplexity
from mixtura.lm.loading import load
from mixtura.lm.tokens import blocks, byte_pair_tokenizer

__all__ = ["CLAIM"]

GROUP, HIGH = 64, 8
AVERAGES = {3.5: 3, 4.4: 4}  # bits on average -> width of most channels
SCOPES = {3.5: ("global", "layer", "random"), 4.4: ("global", "layer")}
KINDS = ("v_proj", "down_proj", "k_proj", "o_proj", "q_proj", "up_proj", "gate_proj")


@dataclass(frozen=True)
class Size:
    """Amounts of text of a scale; blocks are of so many tokens."""

    calibration: int
    held_out: int
    length: int
    characters: int


SIZES: dict[Scale, Size] = {
    "smoke": Size(2, 2, 32, 40_000),
    "cpu": Size(8, 16, 256, 6_000_000),
    "gpu": Size(64, 128, 1024, 30_000_000),
}


def run(scale: Scale, seed: int, scratch: Path) -> dict[str, Any]:
    """Figures of one seed, which draws the calibration blocks: perplexities, and ratios of what they lie above float."""
    size = SIZES[scale]
    code = corpus("code", characters=size.characters)
    model, tokenizer = _tiny(code.train) if scale == "smoke" else load(smollm2(), dtype=torch.float32)
    model.to("cuda" if scale == "gpu" and torch.cuda.is_available() else "cpu").eval()
    pool = blocks(tokenizer, code.train, size.length, limit=64 * size.calibration)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    calibration = pool[order[: size.calibration]]
    held_out = blocks(tokenizer, code.held_out, size.length)
    held_out = held_out[torch.linspace(0, len(held_out) - 1, size.held_out).long()]

    def measured(model: Any) -> float:
        return perplexity(model, held_out, batch_size=4)

    matrices = channel_matrices(model)
    kept = {name: weight.detach().clone() for name, weight in matrices.items()}
    figures: dict[str, Any] = {"float": measured(model)}
    saliences: dict[int, dict[str, Tensor]] = {}
    detail: dict[str, Any] = {}
    for average, low in AVERAGES.items():
        saliences[low] = channel_salience(model, calibration, bits=low, group_size=GROUP)
        for scope, chosen in _choices(average, low, saliences[low], kept, seed).items():
            _put(matrices, _rounded(kept, chosen, low))
            figures[f"{scope}_{average}"] = measured(model)
            if scope == "global":
                detail[f"shares_{average}"] = _shares(chosen)
        excess = {scope: figures[f"{scope}_{average}"] - figures["float"] for scope in SCOPES[average]}
        for rival in SCOPES[average][1:]:
            figures[f"over_{rival}_{average}"] = excess["global"] / excess[rival]
        if seed == 0:
            _put(matrices, _rounded(kept, dict.fromkeys(kept), low))
            detail[f"nearest_{low}"] = measured(model)
        _put(matrices, kept)
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in kept.items()}
    shares = detail["shares_of_channels"] = _shares(allocate(saliences[4], shapes, 0.1, budget="channels"))
    figures["value_and_down_lead"] = float(set(sorted(shares, key=shares.__getitem__)[-2:]) == set(KINDS[:2]))
    if seed == 0:
        detail |= _as_it_ships(model, calibration, saliences[4], measured)
    return figures | {"detail": detail}


def _choices(
    average: float, low: int, salience: Mapping[str, Tensor], kept: Mapping[str, Tensor], seed: int
) -> dict[str, dict[str, Tensor]]:
    """Every way to spend the same bits: scope -> which rows of each matrix get the larger width."""
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in kept.items()}
    share = high_share_for(average, low, HIGH)
    generator = torch.Generator().manual_seed(seed)
    return {
        scope: allocate(salience, shapes, share, scope=scope, generator=generator)  # type: ignore[arg-type]
        for scope in SCOPES[average]
    }


def _shares(chosen: Mapping[str, Tensor]) -> dict[str, float]:
    """Share of the channels of each kind of layer that get the larger width."""
    return {
        kind: float(torch.cat([mask.float() for name, mask in chosen.items() if name.endswith(kind)]).mean())
        for kind in KINDS
    }


def _rounded(kept: Mapping[str, Tensor], chosen: Mapping[str, Tensor | None], low: int) -> dict[str, Tensor]:
    groups, found = group_sizes(kept, GROUP), {}
    for name, weight in kept.items():
        found[name], high = nearest(weight, low, groups[name]).dequantize(), chosen[name]
        if high is not None and bool(high.any()):
            rows = high.to(weight.device)
            found[name][rows] = nearest(weight[rows], HIGH, groups[name], symmetric=True).dequantize()
    return found


@torch.no_grad()
def _put(matrices: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, weight in matrices.items():
        weight.copy_(values[name])


def _as_it_ships(
    model: Any, calibration: Tensor, salience: Mapping[str, Tensor], measured: Callable[[Any], float]
) -> dict[str, float]:
    """Rounded by GPTQ and packed: all channels at 4 bits, and a tenth of the weights at 8; activations kept and at 8 bits."""
    found = {}
    for name, share in (("gptq_4", 0.0), ("gptq_4.4", high_share_for(4.4))):
        config = MixedChannelConfig(high_share=share, group_size=GROUP)
        small = convert(model, calibration, config, salience=salience)
        found[f"{name}_activations_8"] = measured(small)
        found[f"{name}_bits_stored"] = stored_bits(small)
        found[name] = measured(export_dense(small, torch.float32).to(model.device))
    return found


def _tiny(texts: list[str]) -> tuple[Any, Any]:
    """A model of random weights, for checking that the run goes through."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_pair_tokenizer(texts, 300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config), tokenizer


def plot(record: Record, figure: Any) -> None:
    """Perplexity above float for every way to spend the bits, one point a seed, and where the 8-bit channels are."""
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    seeds = record["seeds"]
    colors = {"global": "#2b6cb0", "layer": "#c05621", "random": "#718096"}
    words = {"global": "one list", "layer": "a list a layer", "random": "at random"}
    for i, average in enumerate(AVERAGES):
        for j, scope in enumerate(SCOPES[average]):
            values = [seed[f"{scope}_{average}"] - seed["float"] for seed in seeds]
            mean = sum(values) / len(values)
            left.bar(i + 0.26 * (j - 1), mean, 0.24, color=colors[scope], label=words[scope] if i == 0 else None)
            left.plot([i + 0.26 * (j - 1)] * len(values), values, ".", color="black", markersize=4)
            left.annotate(
                f"{mean:.2f}", (i + 0.26 * (j - 1), max(values)), (0, 4), textcoords="offset points", ha="center"
            )
    left.set_yscale("log")
    left.margins(y=0.15)
    left.set_xticks(range(len(AVERAGES)), [f"{a} bits on average\n{low} and 8" for a, low in AVERAGES.items()])
    left.set_ylabel("perplexity above float")
    left.legend(frameon=False, title="the larger width goes by", loc="lower right", bbox_to_anchor=(1, 0.62))
    places = range(len(KINDS))
    for j, (name, label, color) in enumerate(
        (
            ("shares_of_channels", "10 % of all channels, as in the paper", colors["random"]),
            ("shares_4.4", "10 % of all weights", colors["global"]),
        )
    ):
        means = [100 * sum(seed["detail"][name][kind] for seed in seeds) / len(seeds) for kind in KINDS]
        right.barh([i + 0.4 * j - 0.2 for i in places], means, 0.38, color=color, label=label)
    right.set_yticks(list(places), [kind.removesuffix("_proj") for kind in KINDS])
    right.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    right.invert_yaxis()
    right.set_xlabel("channels at 8 bits, %")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


CLAIM = Claim(
    system="mixllm",
    sentence=(
        "Giving more bits to the output channels whose rounding would move the loss of the whole model most, sorted in one "
        "list over all layers, loses much less than giving every layer the same share."
    ),
    paper=(
        "Llama 3.1 8B, Wikitext2 / C4 perplexity: fp16 6.24 / 8.95, 4 bits everywhere 6.54 / 9.62, a tenth of the channels at 8 "
        "bits 6.42 / 9.33, 8 bits 6.25 / 8.97, all with 8-bit activations (Table 1); 71 % of value and 54 % of down channels "
        "get 8 bits, 1 % of gate and up (Table 7)"
    ),
    metric="Perplexity above the float model on held-out code, as a ratio to that of a rival at equal bits; lower is better.",
    baseline=(
        "The same salience and rounding with the same share in every layer, and the same share of channels drawn at random; 4 "
        "bits by rounding to nearest and by GPTQ are reported."
    ),
    checks=(
        Check(
            figure="over_layer_3.5", at_most=0.80, why="excess over that of equal shares, 3 and 8 bits, 3.5 on average"
        ),
        Check(figure="over_random_3.5", at_most=0.50, why="excess over that of random channels, 3.5 on average"),
        Check(
            figure="over_layer_4.4", at_most=0.85, why="excess over that of equal shares, 4 and 8 bits, 4.4 on average"
        ),
        Check(
            figure="value_and_down_lead",
            at_least=1.0,
            over="every",
            why="value and down projections have the largest shares of 8-bit channels, a tenth of all channels as in Table 7",
        ),
    ),
    run=run,
    plot=plot,
    limits=(
        "SmolLM2-135M, code only, weights rounded to nearest in groups of 64. The shipped file lies on a 4-bit grid of groups of "
        "32 itself, which is why 3 bits are judged as well. GPTQ and 8-bit activations are measured on the first seed "
        "only, and not judged. The paper counts channels, which down projections, with the longest rows, win by; the "
        "comparisons are at equal bits, a share of the weights, where value and key projections lead. "
        "The check on kinds was first made at equal bits and failed there (down 7 %); it now counts channels. "
        "No kernel is timed here."
    ),
)
