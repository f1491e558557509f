"""The claim of mixed-precision experts and of dynamic pruning, on a small mixture trained in the run."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.core import assign
from mixtura.core.gates import Routing
from mixtura.core.training import TrainConfig, fit
from mixtura.data.texts import corpus
from mixtura.lm.anatomy import MoEBlock, rerouted
from mixtura.lm.compress.dynamic_pruning import prune_dynamically, pruned_share, pruned_weights
from mixtura.lm.compress.factors import ExpertFactors, expert_factors
from mixtura.lm.compress.mixed_experts import allocate_bits, convert
from mixtura.lm.evaluate import perplexity
from mixtura.lm.tokens import blocks, byte_pair_tokenizer, mixed_batch_at
from mixtura.lm.training import language_loss

__all__ = ["CLAIM"]

AVERAGES = (2.5, 2.0, 1.625)
EXPERTS = 8
SHARES = {"code": 0.50, "dictionary": 0.25, "arithmetic": 0.15, "glosses": 0.10}
# Where no system package may be needed.
SMOKE_SHARES = {"code": 0.6, "prose": 0.25, "arithmetic": 0.15}


@dataclass(frozen=True)
class Size:
    """Model, budget and amounts of text of a scale."""

    width: int
    layers: int
    hidden: int
    vocabulary: int
    steps: int
    batch: int
    length: int
    characters: int
    held_out: int  # blocks in all
    calibration: int
    random: int  # random allocations


SIZES: dict[Scale, Size] = {
    "smoke": Size(32, 2, 32, 300, 10, 4, 32, 60_000, 8, 8, 2),
    "cpu": Size(96, 3, 128, 1024, 600, 16, 128, 2_000_000, 64, 64, 10),
    "gpu": Size(512, 8, 1024, 8192, 4000, 64, 256, 20_000_000, 256, 128, 10),
}


def run(scale: Scale, seed: int, scratch: Path) -> dict[str, Any]:
    """Figures of one seed: perplexities, excesses over the float model, and ratios of excesses."""
    size = SIZES[scale]
    device = "cuda" if scale == "gpu" and torch.cuda.is_available() else "cpu"
    model, held_out, calibration = _trained(size, SMOKE_SHARES if scale == "smoke" else SHARES, seed, device)
    plain = perplexity(model, held_out)
    figures: dict[str, Any] = {"float": plain, "detail": {}}
    factors = expert_factors(model, calibration)

    def excess(allocation: Tensor) -> float:
        small = convert(model, calibration, allocation=allocation, other_bits=None)
        return perplexity(small, held_out) - plain

    for average in AVERAGES:
        figures |= _at(average, factors, excess, size, seed, figures["detail"])
    figures |= _pruning(model, held_out, calibration, plain, seed)
    figures["load_spread"] = float((factors.frequency.std(1) / factors.frequency.mean(1)).mean())
    return figures


def _at(
    average: float, factors: ExpertFactors, excess: Any, size: Size, seed: int, detail: dict[str, Any]
) -> dict[str, Any]:
    """All allocations at one average; every one spends the whole budget under the same constraints."""
    ours = excess(allocate_bits(factors, average, equality=True))
    model_scope = excess(allocate_bits(factors, average, equality=True, scope="model"))
    draw = random.Random(f"{seed} {average}")
    layers = len(factors.frequency)
    rivals = [excess(_random_allocation(draw, layers, average)) for _ in range(size.random)]
    by_chance = sum(rivals) / len(rivals)
    found = {
        f"excess_{average}": ours,
        f"excess_model_scope_{average}": model_scope,
        f"excess_random_{average}": by_chance,
        f"excess_frequency_{average}": excess(_frequency_only(factors, average)),
        f"excess_error_{average}": excess(allocate_bits(factors, average, exponents=(0.0, 0.0, 2.0), equality=True)),
        f"ratio_{average}": ours / by_chance,
        f"model_over_block_{average}": model_scope / ours,
    }
    if average == int(average):
        found[f"excess_uniform_{average}"] = excess(torch.full_like(factors.frequency, average, dtype=torch.long))
    detail[f"random_{average}"] = rivals
    return found


def _random_allocation(draw: random.Random, layers: int, average: float) -> Tensor:
    """Bits drawn evenly among those that spend the budget with at least one expert of 3 and one of 2 bits a block."""
    rows: list[list[int]] = []
    while len(rows) < layers:
        row = [draw.randint(1, 3) for _ in range(EXPERTS)]
        if sum(row) == round(average * EXPERTS) and 3 in row and 2 in row:
            rows.append(row)
    return torch.tensor(rows)


def _frequency_only(factors: ExpertFactors, average: float) -> Tensor:
    """Bits by how often an expert is chosen; a bit more is taken to quarter the squared error, as for uniform noise."""
    cost = factors.frequency.double()[:, :, None] * torch.tensor([4.0**-b for b in factors.bits])
    budget = round(average * EXPERTS)
    rows = [
        assign.allocate_bits(block.numpy(), factors.bits, budget, at_least={3: 1, 2: 1}, equality=True)
        for block in cost
    ]
    return torch.tensor([row.tolist() for row in rows])


def _pruning(model: Any, held_out: Tensor, calibration: Tensor, plain: float, seed: int) -> dict[str, Any]:
    """Second experts skipped by the rule, against the same share skipped at random, on the float model."""
    pruned = prune_dynamically(model, calibration, protect=0.0)
    share = pruned_share(pruned, held_out)
    by_rule = perplexity(pruned, held_out) - plain
    protected = perplexity(prune_dynamically(model, calibration, protect=0.02), held_out) - plain
    generator = torch.Generator().manual_seed(seed)

    def at_random(part: float) -> float:
        def change(block: MoEBlock, routing: Routing) -> tuple[Tensor, Tensor]:
            spared = torch.rand(len(routing.weights), generator=generator).to(routing.weights.device) >= part
            return pruned_weights(routing.weights, routing.indices, block.n_experts, [2.0], spared)

        model.set_experts_implementation("mixtura")
        with rerouted(model, change):
            return perplexity(model, held_out) - plain

    by_chance = at_random(share)
    return {
        "pruned_share": share,
        "excess_pruned": by_rule,
        "excess_pruned_protected": protected,
        "excess_pruned_random": by_chance,
        "excess_pruned_all": at_random(1.0),
        "pruning_ratio": by_rule / by_chance,
    }


def _trained(size: Size, shares: dict[str, float], seed: int, device: str) -> tuple[Any, Tensor, Tensor]:
    """The mixture, held-out blocks and calibration blocks, in the shares of the domains."""
    from transformers import MixtralConfig, MixtralForCausalLM

    parts = {name: corpus(name, characters=round(size.characters * share), seed=seed) for name, share in shares.items()}
    tokenizer = byte_pair_tokenizer([text for part in parts.values() for text in part.train], size.vocabulary)
    train = {name: blocks(tokenizer, part.train, size.length) for name, part in parts.items()}
    held_out = torch.cat(
        [
            blocks(tokenizer, part.held_out, size.length, limit=max(1, round(size.held_out * shares[name])))
            for name, part in parts.items()
        ]
    )
    torch.manual_seed(seed)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.width,
            intermediate_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=EXPERTS,
            num_experts_per_tok=2,
            max_position_embeddings=size.length,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).to(device)

    def loss_at(step: int) -> Tensor:
        ids = mixed_batch_at(train, shares, step, size.batch, seed=seed).to(device)
        # A light hand on balance: experts that are used unequally are what the method lives on.
        return language_loss(model, ids, balance=0.001)

    fit(model, loss_at, TrainConfig(steps=size.steps, lr=3e-3, seed=seed), label="mixture")
    calibration = mixed_batch_at(train, shares, 10**6, size.calibration, seed=seed)
    return model.eval(), held_out, calibration


def plot(record: Record, figure: Any) -> None:
    """Excess perplexity over average bits for every way to allocate them, one line each, seeds as spread."""
    axes = figure.subplots()
    seeds = record["seeds"]
    lines = (
        ("program, per block", "excess_{}", "#2b6cb0"),
        ("program, whole model", "excess_model_scope_{}", "#2f855a"),
        ("error only", "excess_error_{}", "#6b46c1"),
        ("frequency only", "excess_frequency_{}", "#b83280"),
        ("random, mean of 10", "excess_random_{}", "#c05621"),
    )
    for label, name, color in lines:
        values = [[seed[name.format(average)] for seed in seeds] for average in AVERAGES]
        means = [sum(v) / len(v) for v in values]
        axes.plot(AVERAGES, means, "o-", color=color, label=label, markersize=4)
        axes.fill_between(AVERAGES, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.12)
    axes.set_xlabel("average bits of an expert's weight")
    axes.set_ylabel("perplexity above float")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


CLAIM = Claim(
    system="mc-moe",
    sentence=(
        "Giving each expert 1, 2 or 3 bits by an integer program over how often it is used, how strongly and how much its "
        "rounding hurts loses much less than other allocations of the same bits; skipping second experts with small weights "
        "loses less than skipping as many at random."
    ),
    paper=(
        "Mixtral 8x7B, Wikitext2 perplexity, float 3.84: at 2.54 / 2.05 / 1.57 bits 5.09 / 5.91 / 8.50, allocated by Hessian "
        "5.41 / 6.65 / 14.20, uniform 2 bit 16.38 (Table 2)"
    ),
    metric="Perplexity above the float model on held-out text, as a ratio to that of a rival at equal bits; lower is better.",
    baseline=(
        "Mean of 10 random allocations under the same constraints, all rounded by the same GPTQ; frequency only, error only and "
        "uniform bits are reported; pruning against skipping the same share of second experts at random."
    ),
    checks=(
        Check(figure="ratio_2.5", at_most=0.5, why="excess over that of random allocations, 2.5 bits"),
        Check(figure="ratio_2.0", at_most=0.5, why="excess over that of random allocations, 2.0 bits"),
        Check(figure="ratio_1.625", at_most=0.75, why="excess over that of random allocations, 1.625 bits"),
        Check(
            figure="model_over_block_1.625", at_most=1.0, why="one program for the model over one a block, 1.625 bits"
        ),
        Check(figure="pruning_ratio", at_most=0.6, why="excess of pruning over that of as much random skipping"),
    ),
    run=run,
    plot=plot,
    limits=(
        "A model of 1.5 M parameters trained in the run. Uniform 2-bit GPTQ does not collapse on experts this small as it does "
        "on Mixtral, so beating it is reported and not required; protecting tokens by the attention they receive is checked for "
        "correctness and reported, since models this small have no attention sinks."
    ),
)
