"""The claim of attention spans head by head: lines to look up, half and a quarter of the cache, and lengths not profiled."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.data.models import smollm2
from mixtura.data.registers import Lookup, lookups
from mixtura.data.texts import corpus
from mixtura.lm.attention.span_model import convert
from mixtura.lm.attention.span_plan import plan_spans
from mixtura.lm.attention.span_profile import AnswerSample, Pool, answer_samples, profile_spans
from mixtura.lm.attention.span_rules import SpanPlan, uniform_plan
from mixtura.lm.evaluate import perplexity
from mixtura.lm.loading import load
from mixtura.lm.tokens import blocks

__all__ = ["CLAIM"]

BLOCK = 16
DENSITIES = (50, 25)


@dataclass(frozen=True)
class Size:
    """How much a scale runs.

    Attributes:
        length: tokens of record, questions and answers.
        short, long: the other length that is profiled, and the one that is not.
        items: calibration items of each length.
        records, questions: looked up, and questions a record.
        blocks: of code that is read besides.
    """

    length: int
    short: int
    long: int
    items: int
    records: int
    questions: int
    blocks: int


SCALES: dict[Scale, Size] = {
    "smoke": Size(400, 256, 608, 1, 1, 2, 1),
    "cpu": Size(528, 256, 768, 16, 20, 6, 6),
    "gpu": Size(4096, 2048, 8192, 16, 20, 6, 8),
}

LIMITS = (
    "One model of 135 M parameters, whose 90 key/value heads stand in 30 layers, and one task; questions follow one record, so "
    "later ones see earlier answers. Answers are scored with the right ones before them. Influence is pooled by block before its "
    "absolute value is taken; by value, as the authors' code has it, is reported without a bar (value_50, value_25). So is the "
    "perplexity of code, which looks back little and on which the plans were not made. Plans differ by what was drawn to "
    "calibrate on, and whole answers more than losses, since five digits in a row multiply what a tenth of a nat a digit costs: "
    "half the cache keeps 1.00, 0.76 and 0.94 of them by seed, and a first record, with 8 answers to calibrate on and 60 "
    "questions a seed instead of 16 and 120, kept 0.77 in the mean and failed. One shuffled plan of half the cache came out "
    "well: 2.1 times our excess, where the others are at 19 and 7. At half the cache one span a layer does as well in two seeds."
)


def examples(tokenizer: Any, count: int, length: int, questions: int, rng: np.random.Generator) -> list[Lookup]:
    """Records with questions, in tokens of the model."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return lookups(encode, count=count, length=length, questions=questions, rng=rng)


def calibration(model: Any, tokenizer: Any, size: Size, length: int, rng: np.random.Generator) -> list[AnswerSample]:
    """What the model itself answers about records of its own, in its chat template."""
    room = min(40, length // 4)
    found = examples(tokenizer, size.items, length - room - 50, 1, rng)
    contexts = [tokenizer.decode(one.context) for one in found]
    names = [tokenizer.decode(one.questions[0]).split(" line ")[1].removesuffix(" is ") for one in found]
    questions = [f"What is the REGISTER_CONTENT in line {name}?" for name in names]
    return answer_samples(model, tokenizer, contexts, questions, max_new_tokens=room, length=length)


@torch.inference_mode()
def look_up(model: Any, found: Sequence[Lookup]) -> tuple[float, float]:
    """Mean negative log-likelihood of a digit, nats, and share of numbers that come out whole."""
    losses, hits = [], []
    for one in found:
        ids, at = one.sequence()
        row, places = torch.tensor([ids], device=model.device), torch.tensor(at, device=model.device)
        logits = model(row, use_cache=False, logits_to_keep=places - 1).logits[0].float()
        truth = row[0, places]
        losses.append(torch.nn.functional.cross_entropy(logits, truth).item())
        right = (logits.argmax(-1) == truth).split([len(answer) for answer in one.answers])
        hits += [bool(part.all()) for part in right]
    return float(np.mean(losses)), float(np.mean(hits))


def shuffled(plan: SpanPlan, rng: np.random.Generator) -> SpanPlan:
    """The same spans, dealt to the heads by chance."""
    order = rng.permutation(plan.shape[0] * plan.shape[1])
    alphas, betas = (np.array(t).ravel()[order].reshape(plan.shape).tolist() for t in (plan.alphas, plan.betas))
    return SpanPlan(alphas, betas, plan.block, plan.longest)


def model_of(scale: Scale) -> tuple[Any, Any]:
    """SmolLM2, or at smoke scale a model of two layers that knows nothing."""
    if scale != "smoke":
        return load(smollm2(), dtype=torch.float32, device="cuda" if scale == "gpu" else "cpu")
    from transformers import LlamaConfig, LlamaForCausalLM

    from mixtura.lm.tokens import byte_pair_tokenizer

    tokenizer = byte_pair_tokenizer(["line amber-apple: REGISTER_CONTENT is 0123456789\n" * 20], vocab_size=300)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def run(scale: Scale, seed: int, scratch: Path) -> dict[str, Any]:
    """Figures of one seed: plans for half and a quarter of the cache, and one for lengths that were not profiled."""
    size = SCALES[scale]
    model, tokenizer = model_of(scale)
    rng = np.random.default_rng(seed)
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    samples = calibration(model, tokenizer, size, size.length, rng)
    influence = profile_spans(model, samples, block=BLOCK)
    by_value = profile_spans(model, samples, block=BLOCK, pool=VALUE)
    found = examples(tokenizer, size.records, size.length, size.questions, rng)
    figures: dict[str, Any] = {}

    def measure(name: str, model: Any, found: Sequence[Lookup]) -> None:
        figures[f"{name}_loss"], figures[f"{name}_hits"] = look_up(model, found)

    measure("dense", model, found)
    held_out = corpus("code", characters=1_200_000).held_out
    text = blocks(tokenizer, held_out, size.length, limit=size.blocks)
    figures["dense_perplexity"] = perplexity(model, text, batch_size=1)
    detail: dict[str, Any] = {}
    for percent in DENSITIES:
        share = percent / 100
        plans = {
            "uniform": uniform_plan(shape, size.length, share, BLOCK),
            "layers": plan_spans(influence, share, max_rules_per_layer=1),
            "heads": plan_spans(influence, share),
            "value": plan_spans(by_value, share),
        }
        plans["shuffled"] = shuffled(plans["heads"], rng)
        for name, plan in plans.items():
            cut = convert(model, plan)
            measure(f"{name}_{percent}", cut, found)
            if name in ("uniform", "heads"):
                figures[f"{name}_{percent}_perplexity"] = perplexity(cut, text, batch_size=1)
            figures[f"{name}_{percent}_density"] = plan.density(size.length)
        detail[f"spans_{percent}"] = plans["heads"].spans(size.length).tolist()
    short = profile_spans(model, calibration(model, tokenizer, size, size.short, rng), block=BLOCK)
    elastic = plan_spans(influence | short, 0.5, extend=(size.long,))
    far = examples(tokenizer, size.records, size.long, size.questions, rng)
    level = elastic.density(size.long)
    measure("dense_long", model, far)
    measure("heads_long", convert(model, elastic), far)
    measure("uniform_long", convert(model, uniform_plan(shape, size.long, level, BLOCK)), far)
    figures["heads_long_density"] = level
    return figures | ratios(figures) | {"detail": detail}


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """What the checks judge: losses over the dense model's, against each other."""

    def excess(name: str, dense: str = "dense") -> float:
        return float(figures[f"{name}_loss"] - figures[f"{dense}_loss"])

    found: dict[str, float] = {}
    for percent in DENSITIES:
        mine = excess(f"heads_{percent}")
        found[f"over_uniform_{percent}"] = mine / excess(f"uniform_{percent}")
        found[f"over_layers_{percent}"] = mine / excess(f"layers_{percent}")
        # Where ours loses next to nothing, chance alone would make the ratio of the control infinite.
        found[f"shuffled_{percent}"] = excess(f"shuffled_{percent}") / max(mine, 0.02)
        found[f"kept_{percent}"] = figures[f"heads_{percent}_hits"] / max(figures["dense_hits"], 1e-9)
        found[f"uniform_kept_{percent}"] = figures[f"uniform_{percent}_hits"] / max(figures["dense_hits"], 1e-9)
    found["over_uniform_long"] = excess("heads_long", "dense_long") / excess("uniform_long", "dense_long")
    return found


def plot(record: Record, figure: Any) -> None:
    """Loss and whole answers by way of cutting, and the spans of one seed's plan."""
    seeds = record["seeds"]
    figure.set_size_inches(11.0, 4.2)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1.0))
    ways = {"uniform": "#c05621", "shuffled": "#dd9b6a", "layers": "#76a9d8", "heads": "#2b6cb0", "value": "#a0aec0"}
    names = {"uniform": "uniform window", "shuffled": "ours, shuffled", "layers": "one span a layer", "heads": "ours"}
    for axes, what, scale in ((left, "loss", 1.0), (middle, "hits", 100.0)):
        for i, (way, color) in enumerate(ways.items()):
            values = np.array([[row[f"{way}_{p}_{what}"] for p in DENSITIES] for row in seeds]) * scale
            at = np.arange(len(DENSITIES)) + (i - 2) * 0.16
            axes.bar(at, values.mean(0), 0.16, color=color, label=names.get(way, "ours, pooled by value"))
            axes.vlines(at, values.min(0), values.max(0), color="black", linewidth=0.8)
        dense = np.mean([row[f"dense_{what}"] for row in seeds]) * scale
        axes.axhline(dense, color="gray", linestyle="--", linewidth=1, label="everything kept")
        axes.set_xticks(range(len(DENSITIES)), [f"{p} % of the cache" for p in DENSITIES])
        axes.spines[["top", "right"]].set_visible(False)
    left.set_title("loss of a digit, nats", fontsize=9)
    middle.set_title("numbers found whole, %", fontsize=9)
    middle.set_ylim(top=1.6 * middle.get_ylim()[1])
    middle.legend(frameon=False, fontsize=7, loc="upper right", ncols=2)
    spans = np.array(seeds[0]["detail"][f"spans_{DENSITIES[-1]}"])
    image = right.imshow(spans.T, aspect="auto", cmap="viridis")
    right.set(xlabel="layer", ylabel="key/value head", yticks=range(spans.shape[1]))
    right.set_title(f"tokens kept, {DENSITIES[-1]} %, one seed", fontsize=9)
    figure.colorbar(image, ax=right)


VALUE: Pool = "value"

CLAIM = Claim(
    system="sparse-attention-mix",
    sentence=(
        "Spans chosen head by head, from what a cut would cost the answers of the model itself, keep nearly all of a model's "
        "power to look things up in half or a quarter of the cache, where a uniform window of the same size loses it; rules "
        "that grow with the length hold at lengths that were not profiled."
    ),
    paper=(
        "Half the cache, Vicuna-7B, retrieval at 4k / 8k / 16k: dense 1.00 / 0.98 / 0.62, MoA 1.00 / 0.97 / 0.57, StreamingLLM "
        "0.43 / 0.16 / 0.08. A quarter, 8k / 16k: uniform 0.25 / 0.15, by layers 0.31 / 0.26, by heads 0.95 / 0.41 (tables 3, 4)"
    ),
    metric="Negative log-likelihood a digit of numbers that are looked up, less that of the model with its whole cache.",
    baseline=(
        "A uniform window with the same sink at the same mean share of the cache; one span a layer from the same program; "
        "the same spans dealt to the heads by chance."
    ),
    checks=(
        Check(
            figure="over_uniform_50", at_most=0.25, why="excess loss over that of the uniform window, half the cache"
        ),
        Check(figure="kept_50", at_least=0.85, why="share of the dense model's whole answers, half the cache"),
        Check(figure="uniform_kept_50", at_most=0.6, why="the same of the uniform window"),
        Check(figure="over_uniform_25", at_most=0.25, why="excess loss over that of the uniform window, a quarter"),
        Check(figure="over_layers_25", at_most=0.6, why="excess loss over that of one span a layer, a quarter"),
        Check(figure="shuffled_50", at_least=4.0, why="excess loss of the same spans dealt by chance, over ours, half"),
        Check(figure="shuffled_25", at_least=4.0, why="the same, a quarter"),
        Check(
            figure="over_uniform_long",
            at_most=0.6,
            why="excess loss over the uniform window's at a length not profiled",
        ),
    ),
    run=run,
    plot=plot,
    limits=LIMITS,
)
