"""Claim of ``moe-x``: hidden units of wide sparse experts stand for single facts more often than those of a dense layer.

Three tasks. *Concepts* are made up and known: one layer is trained on them. *Chess* is played by a simple player; a small decoder
reads the games, and its units are asked about the board. *Text* is Python's own sources and reference: rules in words are
asked where units fire.

All arms have equal active parameters, equal data and steps, and each has the best of the same learning rates, chosen by its loss
on data that nothing is measured on. Probes are fitted on one half of the held-out data and measured on the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.claims._moe_x_decoders import DECODERS, DecoderSizes, chess, text
from mixtura.claims.framework import Check, Claim, Figures, Record, Scale
from mixtura.core.balance import load_statistics
from mixtura.core.dispatch import ACTIVATIONS
from mixtura.core.gates import Routing
from mixtura.core.training import TrainConfig, fit
from mixtura.data.superposed_concepts import SuperposedConcepts
from mixtura.lm.sparse_autoencoder import fit_autoencoder
from mixtura.lm.unit_probes import BoardProbe
from mixtura.lm.wide_sparse import WideSparseMoE

__all__ = ["ARMS", "CLAIM", "SIZES", "Sizes"]

EXPERTS, ACTIVE = 8, 2
CHOOSE, FIT, TEST = -1, -2, -3  # steps whose batches are never trained on
PRECISION = 0.9  # of a classifier, for reconstruction; the chess probes take the paper's 0.95

# name -> activation and gate of a mixture, or activation and width of a dense layer in units of the model's width
ARMS: Mapping[str, tuple[str, str | int]] = {
    "dense_gelu": ("gelu", 4),
    "dense_relu": ("relu", 4),
    "switch": ("gelu", "linear"),
    "router_only": ("gelu", "sparsity"),
    "relu_only": ("relu", "linear"),
    "moe_x": ("relu", "sparsity"),
}
WIDE = ("relu", 16)  # the control: as many units as all experts together, four times the arithmetic

CHESS = DecoderSizes()
TEXT = DecoderSizes(arms=("dense_gelu", "moe_x"), steps=240)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a scale trains, and on what.

    Attributes:
        width, batch, steps: of the layer that learns concepts, and of its training.
        grid, grid_steps: learning rates of every arm, and the steps after which one is chosen.
        rows: inputs of each held-out part.
        sparsity: active latents of the autoencoder; the best by the fitting half is taken.
        chess, text: the decoders.
    """

    width: int = 64
    batch: int = 512
    steps: int = 1500
    grid: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    grid_steps: int = 400
    rows: int = 6000
    sparsity: tuple[int, ...] = (8, 16, 32)
    chess: DecoderSizes = CHESS
    text: DecoderSizes = TEXT


SIZES: Mapping[str, Sizes] = {
    "smoke": Sizes(
        batch=64,
        steps=20,
        grid=(3e-3,),
        grid_steps=0,
        rows=400,
        sparsity=(8,),
        chess=DecoderSizes(games=40, width=32, layers=2, heads=2, length=64, batch=4, steps=3, grid_steps=0, upcycle=True),
        text=DecoderSizes(
            arms=("dense_gelu", "moe_x"), characters=60_000, width=32, layers=2, heads=2, length=32, batch=4, steps=3,
            grid_steps=0, vocabulary=300, rows=16,
        ),
    ),
    "cpu": Sizes(),
    "gpu": Sizes(
        chess=DecoderSizes(
            games=40_000, policy="stockfish", width=512, layers=8, heads=8, length=256, batch=100, steps=1200,
            grid=(3e-4, 6e-4, 1.2e-3), grid_steps=200, rows=400, upcycle=True, device="cuda", init_std=0.02,
        ),
        text=DecoderSizes(
            arms=("dense_gelu", "moe_x"), characters=8_000_000, width=512, layers=8, heads=8, length=256, batch=64,
            steps=1200, grid=(3e-4, 6e-4, 1.2e-3), grid_steps=200, rows=200, upcycle=True, device="cuda", vocabulary=8192,
            init_std=0.02,
        ),
    ),
}  # fmt: skip


def run(scale: Scale, seed: int, scratch: Path) -> Figures:
    """All tasks with one seed."""
    sizes = SIZES[scale]
    parts = {"concepts": _concepts(sizes, seed), "chess": chess(sizes.chess, seed), "text": text(sizes.text, seed)}
    figures: Figures = {}
    for part in parts.values():
        figures |= part.pop("figures")
    return {**figures, "detail": parts}


class DenseLayer(nn.Module):
    """The dense twin: one hidden layer with input biases, as the experts have them."""

    def __init__(self, width: int, hidden: int, activation: str, generator: torch.Generator) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(hidden, width, generator=generator) * START)
        self.down = nn.Parameter(torch.randn(width, hidden, generator=generator) * START)
        self.up_bias, self.down_bias = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(width))
        self.activation = ACTIVATIONS[activation]

    def wide(self, x: Tensor) -> Tensor:
        """Hidden units (N, H)."""
        return self.activation(F.linear(x, self.up, self.up_bias))

    def read(self, units: Tensor) -> Tensor:
        """Output of given hidden units, (N, D)."""
        return F.linear(units, self.down, self.down_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.wide(x))


START = 0.15  # standard deviation of every matrix at the start, in every arm


def _layer(sizes: Sizes, arm: tuple[str, str | int], seed: int) -> DenseLayer | WideSparseMoE:
    draw = torch.Generator().manual_seed(seed)
    activation, kind = arm
    if isinstance(kind, int):
        return DenseLayer(sizes.width, kind * sizes.width, activation, draw)
    return WideSparseMoE(
        sizes.width,
        2 * sizes.width,
        EXPERTS,
        ACTIVE,
        activation=activation,
        gate="linear" if kind == "linear" else "sparsity",
        bias=True,
        init_std=START,
        generator=draw,
    )


def _concepts(sizes: Sizes, seed: int) -> dict[str, Any]:
    task = SuperposedConcepts(width=sizes.width, seed=seed)
    arms: dict[str, dict[str, Any]] = {}
    layers = {}
    for name, arm in ARMS.items():
        layers[name], arms[name] = _tuned(sizes, task, arm, seed)
    wide = _trained(sizes, task, WIDE, arms["dense_relu"]["lr"], seed)
    arms["wide"] = {"lr": arms["dense_relu"]["lr"]} | _measured(wide, task, sizes)
    arms["autoencoder"] = _autoencoder(sizes, task, layers["dense_gelu"], seed)
    ours, dense, switch = arms["moe_x"], arms["dense_gelu"], arms["switch"]
    figures: Figures = {
        f"concept_{k}_{name}": arm[k] for name, arm in arms.items() for k in ("error", "coverage", "boards")
    }
    figures |= {
        "concept_coverage_gain": ours["coverage"] - dense["coverage"],
        "concept_boards_gain": ours["boards"] - dense["boards"],
        "concept_error_ratio": ours["error"] / dense["error"],
        "concept_coverage_over_switch": ours["coverage"] - switch["coverage"],
        "concept_boards_over_switch": ours["boards"] - switch["boards"],
        "concept_shuffled": ours["shuffled"],
        "concept_agreement": ours["agreement"],
        "concept_agreement_learned": min(arms[name]["agreement"] for name in ("switch", "relu_only")),
        "concept_fires": ours["fires"],
        "concept_load": ours["load"],
    }
    return {"figures": figures, "arms": arms}


def _tuned(
    sizes: Sizes, task: SuperposedConcepts, arm: tuple[str, str | int], seed: int
) -> tuple[DenseLayer | WideSparseMoE, dict[str, Any]]:
    """The layer at the best rate of the grid, which is chosen after fewer steps, by error alone."""
    short = replace(sizes, steps=sizes.grid_steps)
    tried = {lr: _error(_trained(short, task, arm, lr, seed), task, CHOOSE, sizes) for lr in sizes.grid}
    lr = min(tried, key=lambda rate: tried[rate])
    layer = _trained(sizes, task, arm, lr, seed)
    return layer, {"lr": lr, "grid": {f"{r:g}": e for r, e in tried.items()}} | _measured(layer, task, sizes)


def _trained(
    sizes: Sizes, task: SuperposedConcepts, arm: tuple[str, str | int], lr: float, seed: int
) -> DenseLayer | WideSparseMoE:
    layer = _layer(sizes, arm, seed)
    unit = task.batch(CHOOSE, sizes.rows)[1].var(0, correction=0).mean()

    def loss_at(step: int) -> Tensor:
        x, y, _ = task.batch(step, sizes.batch)
        if isinstance(layer, DenseLayer):
            return F.mse_loss(layer(x), y) / unit
        out = layer.mix(x)
        return F.mse_loss(out.hidden, y) / unit + out.aux_loss

    fit(layer, loss_at, TrainConfig(steps=sizes.steps, lr=lr, weight_decay=0.0, seed=seed), label=f"{arm[0]} {arm[1]}")
    return layer.eval()


@torch.no_grad()
def _error(layer: nn.Module, task: SuperposedConcepts, step: int, sizes: Sizes) -> float:
    """Squared error over the variance of the target."""
    x, y, _ = task.batch(step, sizes.rows)
    return float(F.mse_loss(layer(x), y) / y.var(0, correction=0).mean())


@torch.no_grad()
def _measured(layer: DenseLayer | WideSparseMoE, task: SuperposedConcepts, sizes: Sizes) -> dict[str, Any]:
    (fit_x, _, fit_shown), (x, _, shown) = task.batch(FIT, sizes.rows), task.batch(TEST, sizes.rows)
    row = _probed(layer.wide(fit_x), fit_shown, layer.wide(x), shown)
    row["error"] = _error(layer, task, TEST, sizes)
    if isinstance(layer, WideSparseMoE):
        row |= _routed(layer, layer.route(x), x)
    return row


def _probed(fit_units: Tensor, fit_shown: Tensor, units: Tensor, shown: Tensor) -> dict[str, Any]:
    """Coverage and reconstruction, and coverage where the labels of the fitting half are dealt out at random."""
    probe = BoardProbe(precision=PRECISION).fit(fit_units, fit_shown)
    order = torch.randperm(len(fit_shown), generator=torch.Generator().manual_seed(0))
    chance = BoardProbe(precision=PRECISION).fit(fit_units, fit_shown[order])
    return {
        "coverage": probe.coverage(units, shown),
        "boards": probe.reconstruction(units, shown),
        "fitted": sum(r["f1"] for r in probe.table()) / len(probe.table()),
        "shuffled": chance.coverage(units, shown),
        "alive": len(probe.alive_),
        "units": probe.n_units_,
        "active": float((units > 0).float().sum(1).mean()),
    }


def _routed(layer: WideSparseMoE, routing: Routing, x: Tensor) -> dict[str, float]:
    """Correlation of score and true active share over (token, expert), share that chosen experts fire, and the load."""
    experts: Any = layer.experts
    fires_TE = ((torch.einsum("td,ehd->teh", x, experts.up_proj) + experts.up_proj_bias) > 0).float().mean(-1)
    together = torch.stack((routing.logits.flatten(), fires_TE.flatten()))
    return {
        "agreement": float(torch.corrcoef(together)[0, 1]),
        "fires": float(fires_TE.gather(1, routing.indices).mean() / fires_TE.mean()),
        "load": load_statistics(routing.indices, EXPERTS).max_over_mean,
    }


def _autoencoder(
    sizes: Sizes, task: SuperposedConcepts, dense: DenseLayer | WideSparseMoE, seed: int
) -> dict[str, Any]:
    """A sparse autoencoder of the dense layer's units: as many latents as all experts have units, as many steps and inputs."""
    assert isinstance(dense, DenseLayer)
    latents = 2 * sizes.width * EXPERTS
    (fit_x, _, fit_shown), (x, y, shown) = task.batch(FIT, sizes.rows), task.batch(TEST, sizes.rows)

    def units_at(step: int) -> Tensor:
        with torch.no_grad():
            return dense.wide(task.batch(step, sizes.batch)[0])

    def trained(k: int, steps: int) -> tuple[nn.Module, dict[str, Any]]:
        config = TrainConfig(steps=steps, lr=3e-3, weight_decay=0.0, seed=seed)
        made = fit_autoencoder(units_at, latents, k, config, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return made, _probed(made.encode(dense.wide(fit_x)), fit_shown, made.encode(dense.wide(x)), shown)

    tried = {k: trained(k, sizes.grid_steps)[1]["fitted"] for k in sizes.sparsity} if len(sizes.sparsity) > 1 else {}
    k = max(tried, key=lambda width: tried[width]) if tried else sizes.sparsity[0]
    made, row = trained(k, sizes.steps)
    with torch.no_grad():
        # What the layer answers when the autoencoder's copy of its units stands in for them.
        error = F.mse_loss(dense.read(made(dense.wide(x))), y) / y.var(0, correction=0).mean()
    return row | {"k": k, "grid": {str(width): value for width, value in tried.items()}, "error": float(error)}


def plot(record: Record, figure: Any) -> None:
    """Coverage and reconstruction of the concepts by arm, and of the chess boards."""
    figure.set_size_inches(11.0, 4.4)
    left, middle, right = figure.subplots(1, 3)
    names = [*ARMS, "wide", "autoencoder"]
    for axes, kind, title in ((left, "coverage", "concepts: coverage"), (middle, "boards", "concepts: reconstruction")):
        _bars(axes, record, f"concept_{kind}_", names)
        axes.set_title(title)
    _bars(right, record, "chess_boards_", [n for n in DECODERS if f"chess_boards_{n}" in record["seeds"][0]])
    right.set_title("chess: reconstruction")


def _bars(axes: Any, record: Record, prefix: str, names: list[str]) -> None:
    for i, name in enumerate(names):
        values = [row[f"{prefix}{name}"] for row in record["seeds"]]
        axes.bar(i, sum(values) / len(values), color="tab:orange" if "moe_x" in name else "tab:gray", alpha=0.6)
        axes.plot([i] * len(values), values, "k.", markersize=4)
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], rotation=60, ha="right", fontsize=7)
    axes.set_ylim(bottom=0)


CLAIM = Claim(
    system="moe-x",
    sentence=(
        "At equal active parameters and no higher loss, the hidden units of wide sparse experts (ReLU, routed to where the "
        "fewest units would fire) stand for single facts more often than those of a dense layer."
    ),
    paper=(
        "Table 1 (chess, loss, coverage, reconstruction): GELU GPT-2 0.213 0.356 0.608, Switch 0.212 0.424 0.734, MoE-X 0.211 "
        "0.428 0.840. Table 3, reconstruction: neither 0.734, router only 0.740, ReLU only 0.829, both 0.840."
    ),
    metric=(
        "Concepts and chess: coverage (mean over properties of the best single unit's F1) and reconstruction (F1 of the board "
        "that all precise units predict together) on inputs that no threshold was chosen on; higher is better."
    ),
    baseline=(
        "A dense GELU layer of equal active parameters and Switch (GELU experts, learned gate), same data and steps, each at its "
        "own best of three learning rates by loss."
    ),
    checks=(
        Check(figure="concept_coverage_gain", at_least=0.07, why="concepts: coverage above the dense GELU layer's"),
        Check(figure="concept_boards_gain", at_least=0.12, why="concepts: reconstruction above the dense GELU layer's"),
        Check(figure="concept_error_ratio", at_most=1.0, why="concepts: error over the dense GELU layer's"),
        Check(figure="concept_boards_over_switch", at_least=0.02, why="concepts: reconstruction above Switch's"),
        Check(figure="concept_coverage_over_switch", at_least=-0.03, why="concepts: coverage not below Switch's"),
        Check(figure="concept_shuffled", at_most=0.1, why="concepts: coverage with labels dealt out at random"),
        Check(figure="concept_agreement", at_most=-0.7, why="concepts: correlation of score and active share"),
        Check(figure="concept_agreement_learned", at_least=-0.5, why="concepts: the same of the learned gates"),
        Check(
            figure="concept_fires",
            at_most=1.0,
            why="concepts: active share of chosen experts over the average expert's",
        ),
        Check(figure="concept_load", at_most=3.0, over="every", why="concepts: largest load over the mean"),
        Check(figure="chess_agreement", at_most=-0.7, why="chess: correlation of score and active share"),
        Check(figure="chess_agreement_learned", at_least=-0.5, why="chess: the same of Switch's gate"),
        Check(figure="chess_fires", at_most=1.0, why="chess: active share of chosen experts over the average expert's"),
        Check(figure="chess_load", at_most=3.0, over="every", why="chess: largest load over the mean"),
        Check(figure="chess_loss_gap", at_most=0.01, why="chess: nats a character above the dense GELU decoder"),
    ),
    run=run,
    plot=plot,
    limits=(
        "One check fails: in chess Switch's learned gate too sends tokens to experts that fire less (correlation -0.56, "
        "bar -0.5), which the paper's figure does not show; ours is at -0.96. The concepts are made up. The router's own "
        "effect is reported and not judged (router_only and relu_only against switch and moe_x): here as in the paper "
        "most comes from ReLU, and a dense ReLU layer covers slightly more than MoE-X (0.62, 0.59) but reconstructs less "
        "(0.39, 0.57). A sparse autoencoder of the dense layer's units, with as many latents, steps and inputs, is far "
        "ahead (0.96) and not judged: concepts that add up to an input are just what it is made for. Chess: games of a "
        "greedy player and a few hundred steps, after which a model hardly follows a board; coverage and reconstruction "
        "are reported and not judged, and ours is behind. Rates are chosen after 60 of 300 steps; with the best after "
        "all 300, on a seed that is not measured here (10), its loss was 0.019 above the dense decoder's, where 0.01 is "
        "asked for. Text: rules fit its units better (0.76 against 0.70, autoencoder 0.86), at 0.1 nats more loss than "
        "the dense decoder. The paper's headline on chess needs the gpu scale."
    ),
)
