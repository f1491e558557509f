"""Data, models and trainings of the claim of multilingual-moe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.core.training import TrainConfig, fit
from mixtura.data.package_pairs import package_pairs
from mixtura.lm.model import MultitaskMoEConfig, MultitaskMoEForConditionalGeneration
from mixtura.lm.multitask import TaskMixture, multitask_tokenizer
from mixtura.lm.token_loss import IGNORED

__all__ = [
    "QUARTERS",
    "SIZES",
    "Batch",
    "Data",
    "Drops",
    "Sizes",
    "fit_model",
    "load_data",
    "nats",
    "new_model",
    "trained",
    "tuned",
]

QUARTERS = 4  # of a sequence
TENTHS = 10  # of a training; places are counted in the last, since gates are far from even before
MADE_UP = {"a": "abcdefghij", "b": "klmnopqrst", "c": "uvwxyzABCD"}

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of one scale.

    Attributes:
        languages: translated from English and repaired, English too; none: made-up text.
        train, held: largest number of pairs a language, to train on and of each held-out part.
        vocabulary, width, hidden, heads, encoder, decoder, experts: the model.
        length, batch, steps: longest row in tokens, rows a step, steps.
        grid, grid_steps: learning rates of dense and of experts, and the steps after which one is chosen.
        shares: of the steps, of the mixture's shorter runs, until one is below the dense model.
        related, continued: steps of each branch (ancestor included), and of what is trained on after joining.
        keep, language: experts that pruning keeps, and the language that it is for.
        device: where it runs.
    """

    languages: tuple[str, ...] = ("da", "it", "fr", "de", "sk", "pt_BR", "ja", "uk", "pl", "ru", "es")
    train: int = 4000
    held: int = 40
    vocabulary: int = 2048
    width: int = 96
    hidden: int = 256
    heads: int = 4
    encoder: int = 4
    decoder: int = 2
    experts: int = 16
    length: int = 64
    batch: int = 16
    steps: int = 1500
    grid: tuple[float, ...] = (3e-3, 6e-3, 1.2e-2)
    grid_steps: int = 400
    shares: tuple[float, ...] = (0.7, 0.85)
    related: int = 400
    continued: int = 80
    keep: int = 4
    language: str = "de"
    device: str = "cpu"


SIZES: Mapping[str, Sizes] = {
    "smoke": Sizes(
        languages=(),
        held=4,
        vocabulary=300,
        width=16,
        hidden=16,
        heads=2,
        encoder=2,
        experts=4,
        length=16,
        batch=4,
        steps=4,
        grid=(3e-3,),
        grid_steps=2,
        shares=(0.5,),
        related=4,
        continued=2,
        keep=2,
        language="b",
    ),
    "cpu": Sizes(),
    "gpu": Sizes(
        train=50_000,
        held=200,
        vocabulary=8192,
        width=512,
        hidden=1376,
        heads=8,
        encoder=6,
        decoder=3,
        length=128,
        batch=128,
        steps=2000,
        grid=(5e-4, 1e-3, 2e-3),
        grid_steps=300,
        related=1300,
        continued=260,
        device="cuda",
    ),
}


@dataclass(frozen=True)
class Data:
    """Rows to train on, and batches to choose a learning rate and to measure on."""

    tokenizer: Any
    train: TaskMixture
    choose: list[Batch]
    test: list[Batch]
    language: list[Batch]  # of the language that is pruned for, to measure on


@dataclass
class Drops:
    """Tokens that came and that found no place, by quarter of the sequence, both halves of the model together."""

    came: Tensor
    lost: Tensor

    @classmethod
    def none(cls) -> "Drops":
        return cls(torch.zeros(QUARTERS), torch.zeros(QUARTERS))

    def add(self, out: Any, batch: Batch, length: int) -> None:
        """Count the tokens of a training pass."""
        halves = (
            (out.encoder_routing, batch["attention_mask"].bool()),
            (out.decoder_routing, batch["labels"] != IGNORED),
        )
        for routings, real_BL in halves:
            quarter_L = torch.arange(real_BL.shape[1], device=real_BL.device) * QUARTERS // length
            quarter_BL = quarter_L.expand_as(real_BL)
            for routing in routings:
                lost_BL = real_BL & (routing.indices.view(real_BL.shape) == routing.n_experts)
                self.came += torch.bincount(quarter_BL[real_BL], minlength=QUARTERS).cpu()
                self.lost += torch.bincount(quarter_BL[lost_BL], minlength=QUARTERS).cpu()

    def shares(self) -> list[float]:
        """Share of the lost by quarter."""
        return [float(x) for x in self.lost / self.came.clamp(min=1)]


def load_data(sizes: Sizes, seed: int) -> Data:
    """The texts of a seed, cut into tokens by a tokenizer made of those to train on."""
    train, choose, test = _texts(sizes, seed)
    languages = sorted({language for pair in train for language in pair})
    some = [text for part in train.values() for pair in part[:400] for text in pair]
    tokenizer = multitask_tokenizer(some, sizes.vocabulary, languages)

    def mixture(pairs: Any) -> TaskMixture:
        return TaskMixture(tokenizer, pairs, batch_size=sizes.batch, length=sizes.length, seed=seed)

    held = mixture(test)
    return Data(
        tokenizer,
        mixture(train),
        _batches(mixture(choose), sizes),
        _batches(held, sizes),
        _batches(held.only([sizes.language]), sizes),
    )


def _texts(sizes: Sizes, seed: int) -> tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]]:
    if not sizes.languages:  # so that smoke needs no system package: numbers, their digits written in three alphabets
        numbers = [
            [3 * str(i * 7919 + seed * 101 + part) for i in range(n)]
            for part, n in ((0, 40), (1, sizes.held), (2, sizes.held))
        ]
        alphabets = {name: str.maketrans("0123456789", letters) for name, letters in MADE_UP.items()}
        made = [
            {("en", name): [(n, n.translate(alphabet)) for n in part] for name, alphabet in alphabets.items()}
            for part in numbers
        ]
        return made[0], made[1], made[2]
    found = package_pairs(sizes.languages, seed=seed)
    characters = 8 * sizes.length  # more than a row can hold
    parts = []
    for name in ("train", "choose", "test"):
        limit = sizes.train if name == "train" else sizes.held
        parts.append(
            {
                ("en", language): [(a[:characters], b[:characters]) for a, b in getattr(pairs, name)[:limit]]
                for language, pairs in found.items()
            }
        )
    return parts[0], parts[1], parts[2]


def _batches(mixture: TaskMixture, sizes: Sizes) -> list[Batch]:
    """All rows to translate and, in equal number a language, to repair; of like length together."""
    rows = [row for pair in mixture.pairs for row in mixture.rows("mt", pair)]
    rows += [row for language in mixture.mono for row in mixture.rows("dae", language)[: sizes.held]]
    rows.sort(key=lambda row: len(row[1]))
    batches = [mixture.padded(rows[i : i + 32]) for i in range(0, len(rows), 32)]
    return [{name: t.to(sizes.device) for name, t in batch.items()} for batch in batches]


def new_model(
    sizes: Sizes, data: Data, experts: int, seed: int, selection: str
) -> MultitaskMoEForConditionalGeneration:
    """An untrained model, the same for a seed; without experts where there are to be none."""
    torch.manual_seed(seed)
    config = MultitaskMoEConfig(
        vocab_size=sizes.vocabulary,
        d_model=sizes.width,
        heads=sizes.heads,
        ffn=sizes.hidden,
        encoder_layers=sizes.encoder,
        decoder_layers=sizes.decoder,
        num_experts=experts,
        selection=selection,
        layout="sequence_major",
        initializer_range=sizes.width**-0.5,
        embed_scale=sizes.width**0.5,  # else what attention averages drowns the tokens, and gates see them all alike
        max_position_embeddings=sizes.length,
        pad_token_id=data.tokenizer.pad_token_id,
        eos_token_id=data.tokenizer.eos_token_id,
        decoder_start_token_id=data.tokenizer.eos_token_id,
    )
    model = MultitaskMoEForConditionalGeneration(config)
    model.set_experts_implementation("mixtura")
    return model.to(sizes.device)


def fit_model(
    sizes: Sizes,
    model: MultitaskMoEForConditionalGeneration,
    mixture: TaskMixture,
    steps: int,
    lr: float,
    seed: int,
    *,
    first: int = 0,
    out: Path | None = None,
    stop: int | None = None,
) -> list[Drops]:
    """Train on the mixture's batches from ``first`` on; what found no place in each tenth of the way."""
    drops = [Drops.none() for _ in range(TENTHS)]

    def loss_at(step: int) -> Tensor:
        batch = {name: t.to(sizes.device) for name, t in mixture.batch_at(first + step).items()}
        with torch.autocast(sizes.device, torch.bfloat16, enabled=sizes.device == "cuda"):
            result = model(**batch, use_cache=False)
        drops[step * TENTHS // steps].add(result, batch, sizes.length)
        loss: Tensor = result.loss
        return loss

    config = TrainConfig(steps=steps, lr=lr, final=0.05, seed=seed)
    fit(model, loss_at, config, label=f"{steps} x {lr:g}", out=out, stop=stop)
    return drops


def trained(
    sizes: Sizes, data: Data, experts: int, steps: int, lr: float, seed: int, selection: str = "random"
) -> tuple[MultitaskMoEForConditionalGeneration, list[Drops]]:
    """A new model after all its steps, and what found no place in each tenth of the way."""
    model = new_model(sizes, data, experts, seed, selection)
    return model, fit_model(sizes, model, data.train, steps, lr, seed)


@torch.inference_mode()
def nats(model: Any, batches: Sequence[Batch], sizes: Sizes, factor: float = 2.0) -> tuple[float, list[float]]:
    """Nats a label at a capacity factor (0: no limit), whole and by quarter of the target."""
    model.eval()
    before, model.config.eval_capacity_factor = model.config.eval_capacity_factor, factor
    total, count = torch.zeros(sizes.length, dtype=torch.float64), torch.zeros(sizes.length, dtype=torch.float64)
    for batch in batches:
        logits, labels = model(**batch, use_cache=False).logits.float(), batch["labels"]
        loss_BL = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        loss_BL = loss_BL.view(labels.shape).double().cpu()
        total[: labels.shape[1]] += loss_BL.sum(0)
        count[: labels.shape[1]] += (labels != IGNORED).sum(0).cpu()
    model.config.eval_capacity_factor = before
    model.train()
    quarters = (total.view(QUARTERS, -1).sum(1) / count.view(QUARTERS, -1).sum(1).clamp(min=1)).tolist()
    return float(total.sum() / count.sum()), quarters


def tuned(sizes: Sizes, data: Data, seed: int, experts: int) -> dict[str, Any]:
    """Learning rates of the grid with their losses after few steps, and the best."""
    grid = {
        lr: nats(trained(sizes, data, experts, sizes.grid_steps, lr, seed)[0], data.choose, sizes)[0]
        for lr in sizes.grid
    }
    return {"lr": min(grid, key=lambda lr: grid[lr]), "grid": {f"{lr:g}": loss for lr, loss in grid.items()}}
