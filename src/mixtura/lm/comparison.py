"""Checkpoints side by side: quality on the same tokens, bytes, and speed, so that a person sees what compression cost.

The first checkpoint is the reference. All read the same blocks of text, so that losses are compared token by token and the
interval of a difference is that of the pairs, far narrower than that of either loss.

Shapes: N blocks, L positions.
"""

import gc
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mixtura.core.checkpoint import write_json
from mixtura.core.measure import Meter, resident_memory
from mixtura.core.page import figure_html, new_figure, table_html, write_page
from mixtura.core.progress import progress
from mixtura.lm.cost import model_size
from mixtura.lm.evaluate import token_losses_and_choices
from mixtura.lm.generation import generate, speed
from mixtura.lm.loading import directory_bytes, empty_model, load, load_config, load_tokenizer, same_vocabulary
from mixtura.lm.tokens import blocks

__all__ = ["Compared", "Comparison", "compare"]

COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#718096")
PROMPT = "The most important thing about a good tool is"
SPEED_RUNS = 3


@dataclass(frozen=True)
class Quality:
    """How one checkpoint does on one domain.

    Attributes:
        perplexity: exponential of the mean loss a token; lower is better.
        excess: mean loss a token less the reference's, nats; 0 for the reference.
        give: half the width of the 95 % interval of ``excess``, over blocks.
        agreement: share of positions at which its likeliest token is the reference's.
    """

    perplexity: float
    excess: float
    give: float
    agreement: float


@dataclass(frozen=True)
class Compared:
    """One checkpoint, measured.

    Attributes:
        name: as it was given, without the folders that all share.
        kind: class of the model, and of its quantization where it has one.
        total: parameters before any packing.
        active: parameters that one token uses.
        disk: bytes of the weights on disk; 0 for a hub id that was not copied.
        memory: peak resident bytes of the process while it ran, Python and torch included.
        weights: resident bytes that loading it added.
        cache: bytes of keys and values after the prompt.
        prefill, decode: tokens a second, medians of several runs.
        quality: domain -> figures.
        sample: greedy continuation of :attr:`Comparison.prompt`.
    """

    name: str
    kind: str
    total: int
    active: int
    disk: int
    memory: int
    weights: int
    cache: int
    prefill: float
    decode: float
    quality: dict[str, Quality]
    sample: str

    @property
    def bits(self) -> float:
        """Bits a parameter on disk, scales and all; not a number where the bytes are unknown."""
        return 8 * self.disk / self.total if self.disk else math.nan

    @property
    def excess(self) -> float:
        """Mean excess loss over domains, nats a token."""
        return sum(q.excess for q in self.quality.values()) / len(self.quality)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; the first row is the reference.

    Attributes:
        rows: one a checkpoint, in the order given.
        tokens: domain -> tokens predicted.
        context: tokens of the prompt at which speed and cache were measured.
        prompt: what every checkpoint continued.
    """

    rows: list[Compared]
    tokens: dict[str, int]
    context: int
    prompt: str = field(default=PROMPT)

    def header(self) -> list[str]:
        """Columns of the table."""
        domains = [part for name in self.tokens for part in (f"ppl {name}", "excess")]
        return ["checkpoint", "weights", "bits", "disk", "memory", "cache", *domains, "same", "prefill", "decode"]

    def cells(self) -> list[list[str]]:
        """Rows of the table, as text."""
        return [
            [
                row.name,
                f"{row.total / 1e6:.0f} M" + (f" ({row.active / 1e6:.0f})" if row.active < row.total else ""),
                f"{row.bits:.2f}" if row.disk else "",
                f"{row.disk / 1e6:.0f} MB" if row.disk else "",
                f"{row.memory / 1e9:.2f} GB",
                f"{row.cache / 1e6:.1f} MB",
                *(
                    part
                    for q in row.quality.values()
                    for part in (f"{q.perplexity:.2f}", f"{q.excess:+.3f} ± {q.give:.3f}" if i else "")
                ),
                f"{100 * sum(q.agreement for q in row.quality.values()) / len(row.quality):.0f} %",
                f"{row.prefill:.0f}/s",
                f"{row.decode:.1f}/s",
            ]
            for i, row in enumerate(self.rows)
        ]

    def to_json(self, path: str | Path) -> None:
        """Write all figures as JSON."""
        write_json(path, asdict(self))

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained page."""
        read = ", ".join(f"{count:,} tokens of {name}" for name, count in self.tokens.items())
        samples = "".join(
            f"<h3>{html.escape(row.name)}</h3><pre>{html.escape(self.prompt + row.sample)}</pre>" for row in self.rows
        )
        sections = [
            (
                "At a glance",
                figure_html(
                    self.figure(), f"What was lost, what it takes and how fast it is, beside {self.rows[0].name}."
                ),
            ),
            (
                "All figures",
                table_html(self.header(), self.cells(), best=0) + NOTES.format(self.rows[0].name, self.context),
            ),
            ("What they write", samples),
        ]
        write_page(path, title="Checkpoints side by side", lead=f"Read: {read}.", sections=sections)

    def figure(self) -> Any:
        """Loss over size, excess by domain, bytes and speed."""
        figure = new_figure(13.0, 3.0 + 0.28 * len(self.rows))
        size, lost, room, pace = figure.subplots(1, 4, width_ratios=(1.2, 1.0, 0.8, 0.8))
        self._draw_size(size)
        names = [row.name for row in self.rows]
        places = torch.arange(len(names), dtype=torch.float64)
        bars = 0.8 / len(self.tokens)
        for d, (domain, color) in enumerate(zip(self.tokens, COLORS, strict=False)):
            found = [row.quality[domain] for row in self.rows]
            at = (places + (d - (len(self.tokens) - 1) / 2) * bars).tolist()
            lost.barh(
                at,
                [q.excess for q in found],
                bars,
                xerr=[q.give for q in found],
                color=color,
                label=domain,
                error_kw={"linewidth": 0.8},
            )
        lost.axvline(0, color="gray", linewidth=0.8)
        lost.set_title("loss a token over the first, nats", fontsize=9)
        lost.legend(frameon=False, fontsize=8)
        self._draw_ratios(
            room, {"on disk" if self._on_disk else "weights": self._stored, "cache": lambda row: row.cache}
        )
        room.set_title("bytes over the first's", fontsize=9)
        self._draw_ratios(pace, {"prefill": lambda row: row.prefill, "decode": lambda row: row.decode})
        pace.set_title("speed over the first's", fontsize=9)
        for axes in (room, pace):
            axes.set_xlabel(f"at a prompt of {self.context} tokens", fontsize=8)
        for axes in (lost, room, pace):
            axes.set_yticks(places.tolist(), names if axes is lost else [], fontsize=8)
            axes.invert_yaxis()
        for axes in (size, lost, room, pace):
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    @property
    def _on_disk(self) -> bool:
        return all(row.disk for row in self.rows)

    def _stored(self, row: Compared) -> float:
        return row.disk if self._on_disk else row.weights

    def _draw_ratios(self, axes: Any, measures: Mapping[str, Callable[[Compared], float]]) -> None:
        for i, ((name, measure), color) in enumerate(zip(measures.items(), (COLORS[5], COLORS[2]), strict=True)):
            ratios = [measure(row) / max(measure(self.rows[0]), 1e-9) for row in self.rows]
            axes.barh([at + (i - 0.5) * 0.4 for at in range(len(ratios))], ratios, 0.4, color=color, label=name)
        axes.axvline(1, color="gray", linewidth=0.8, linestyle="--")
        axes.set_xlim(right=1.6 * axes.get_xlim()[1])  # room for the legend
        axes.legend(frameon=False, fontsize=8, loc="upper right")

    def _draw_size(self, axes: Any) -> None:
        points = [(self._stored(row) / 1e6, row.excess) for row in self.rows]
        widest = max(x for x, _ in points)
        for i, (row, (x, y)) in enumerate(zip(self.rows, points, strict=True)):
            axes.plot(x, y, "o", color=COLORS[i % len(COLORS)], markersize=6)
            side, off = ("right", -5) if x > widest / 2 else ("left", 5)  # names stay within the axes
            axes.annotate(row.name, (x, y), textcoords="offset points", xytext=(off, 6), fontsize=8, ha=side)
        axes.margins(x=0.1, y=0.2)
        axes.set_xlim(left=0)
        axes.set_xlabel("MB on disk" if self._on_disk else "MB of memory that loading took")
        axes.set_title("loss a token over the first, mean over texts, nats", fontsize=9)


NOTES = (
    "<p>Excess: loss a token less that of {0} on the same tokens, nats, with the 95 % interval over blocks. Same: share of "
    "positions at which the likeliest token is that of {0}. Memory: peak of the process while it ran, Python and torch included. "
    "Cache and speed at a prompt of {1} tokens.</p>"
)


def compare(
    sources: Sequence[str | Path],
    texts: Mapping[str, Sequence[str]],
    *,
    samples: int = 16,
    length: int = 256,
    context: int = 256,
    new_tokens: int = 32,
    batch_size: int = 4,
    prompt: str = PROMPT,
    device: str = "cpu",
) -> Comparison:
    """Measure checkpoints side by side; one is in memory at a time.

    Args:
        sources: directories or hub ids; the first is the reference. At least two, with one tokenizer.
        texts: domain -> documents, which none of them should have been trained or calibrated on.
        samples, length: blocks a domain and tokens a block.
        context: tokens of the prompt at which speed and cache are measured.
        new_tokens: tokens decoded for the speed.
        batch_size: blocks at a time.
        prompt: text that each continues greedily, to be read.
        device: where to compute.
    Raises:
        ValueError: fewer than two checkpoints, one given twice, tokenizers that differ (the first such token is named), or a
            domain with too little text for one block.
    """
    given = [str(source) for source in sources]
    if len(given) < 2:
        raise ValueError(f"compare needs at least two checkpoints, got {given}")
    if twice := sorted({name for name in given if given.count(name) > 1}):
        raise ValueError(f"{twice[0]} is given twice; each checkpoint is measured once")
    tokenizers = [load_tokenizer(source) for source in given]
    same_vocabulary(given, tokenizers)
    rows = {name: blocks(tokenizers[0], documents, length, limit=samples) for name, documents in texts.items()}
    longest = torch.cat([found.flatten() for found in rows.values()])
    ids = longest.repeat(-(-context // len(longest)))[None, :context]
    names = _short(given)
    reference: dict[str, tuple[Tensor, Tensor]] = {}
    measured = []
    for source, name in progress(list(zip(given, names, strict=True)), desc="compare", unit="model"):
        gc.collect()
        before = resident_memory()
        with Meter() as meter:
            model, tokenizer = load(source, dtype="quick", device=device)
            weights = max(0, resident_memory() - before)
            quality = _quality(model, rows, reference, batch_size)
            paces = [speed(model, ids, new_tokens=new_tokens) for _ in range(SPEED_RUNS)]
            sample = generate(model, tokenizer, prompt, max_new_tokens=40)
        # Counted on the configuration: packed weights are no parameters any more.
        size = model_size(empty_model(load_config(source)))
        measured.append(
            Compared(
                name=name,
                kind=_kind(model),
                total=size.total,
                active=size.active,
                disk=directory_bytes(source) if Path(source).is_dir() else 0,
                memory=meter.peak_bytes,
                weights=weights,
                cache=paces[0].cache,
                prefill=median(pace.prefill for pace in paces),
                decode=median(pace.decode for pace in paces),
                quality=quality,
                sample=sample,
            )
        )
        del model
    return Comparison(measured, {name: found[:, 1:].numel() for name, found in rows.items()}, context, prompt)


def _quality(
    model: Any, rows: Mapping[str, Tensor], reference: dict[str, tuple[Tensor, Tensor]], batch_size: int
) -> dict[str, Quality]:
    """Figures of one model; the first to come here becomes the reference."""
    found = {}
    for name, ids in rows.items():
        losses, choices = token_losses_and_choices(model, ids, batch_size=batch_size)
        first_losses, first_choices = reference.setdefault(name, (losses, choices))
        excess_N = (losses - first_losses).double().mean(1)
        give = 1.96 * float(excess_N.std() / math.sqrt(len(excess_N))) if len(excess_N) > 1 else math.nan
        found[name] = Quality(
            perplexity=math.exp(losses.double().mean()),
            excess=float(excess_N.mean()),
            give=give,
            agreement=float((choices == first_choices).double().mean()),
        )
    return found


def _kind(model: Any) -> str:
    quantization = getattr(model.config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    return type(model).__name__ + (f", {getattr(method, 'value', method)}" if method else "")


def _short(sources: Sequence[str]) -> list[str]:
    """Names without the folders that all share."""
    parts = [Path(source).parts for source in sources]
    shared = 0
    while all(len(part) > shared + 1 and part[: shared + 1] == parts[0][: shared + 1] for part in parts):
        shared += 1
    return ["/".join(part[shared:]) for part in parts]
