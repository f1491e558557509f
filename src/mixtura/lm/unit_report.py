"""What every expert and hidden unit of a layer stands for, as a page that a person reads and as JSON.

Two passes over the text: the first counts how often and how strongly every unit fires, the second keeps a few units of each
expert, which are judged: those that fire most strongly over all, without those that fire almost everywhere or almost nowhere.
The page shows the ones among them that their rules tell best; the mean score is over all that were judged.

Shapes: N rows, L positions, U units, E experts.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.core.checkpoint import write_json
from mixtura.core.page import write_page
from mixtura.lm.anatomy import recorded_routing
from mixtura.lm.inspection import _count, _typical
from mixtura.lm.tokens import blocks
from mixtura.lm.unit_rules import UnitRule, detection_score, mean_score
from mixtura.lm.units import UnitLayer, read_units, unit_layer

__all__ = ["Example", "ExpertNote", "UnitNote", "UnitReport", "top_examples", "unit_report"]

OFTEN, RARELY = 0.3, 0.0005  # shares of positions beyond which a unit is not shown
JUDGED = 4  # units judged for each one shown
AROUND = 10  # tokens shown before and after the strongest one


@dataclass(frozen=True)
class Example:
    """A stretch of text around a position where a unit fires strongly."""

    tokens: list[str]
    activations: list[float]
    peak: int  # index of the position in question


@dataclass(frozen=True)
class UnitNote:
    """A unit: its rule, and where it fires most."""

    rule: UnitRule
    examples: list[Example]


@dataclass(frozen=True)
class ExpertNote:
    """An expert.

    Attributes:
        expert: its index.
        load: share of the visits.
        active: share of its units that fire on a token that visits it.
        alive: units that fired at all.
        tokens: tokens that visit it most often beyond chance, with the ratio to chance; empty in a dense layer.
        units: the units shown, best told first.
    """

    expert: int
    load: float
    active: float
    alive: int
    tokens: list[tuple[str, float]]
    units: list[UnitNote]


@dataclass(frozen=True)
class UnitReport:
    """What :func:`unit_report` found in one layer.

    Attributes:
        layer: path of the layer.
        n_experts, hidden: experts, and units of one.
        positions: tokens read.
        per_token: units that fire on a token, on average.
        score: mean detection score of the judged units; one half by chance.
        judged: how many that are.
        experts: one note each.
    """

    layer: str
    n_experts: int
    hidden: int
    positions: int
    per_token: float
    score: float
    judged: int
    experts: list[ExpertNote]

    def to_json(self, path: str | Path) -> None:
        """Write everything as JSON."""
        write_json(path, asdict(self))

    def to_html(self, path: str | Path, *, title: str = "What its units stand for") -> None:
        """Write a self-contained page."""
        units = self.n_experts * self.hidden
        alive = sum(note.alive for note in self.experts)
        lead = (
            f"{self.layer}: {self.n_experts} experts of {self.hidden} hidden units, read on {self.positions:,} tokens. "
            f"{self.per_token:.0f} of {units:,} units fire on a token; {units - alive:,} never did."
        )
        sections = [("How to read this", self._legend()), ("Experts", self._overview())]
        sections += [(f"Expert {note.expert}", _expert_html(note)) for note in self.experts]
        write_page(path, title=title, lead=lead, sections=sections)

    def _legend(self) -> str:
        judged = (
            f"Over {self.judged} judged units the rules get {self.score:.0%} of held-back places right."
            if self.judged
            else "No unit fired often enough to be judged."
        )
        return (
            "<p>Every unit has a rule in words, learned from places where it fires and where it does not, and a score: the share "
            "of other such places that the rule gets right. One half is chance, 1 is a unit that the rule says everything about. "
            f"{judged}</p><p>In the examples {_mark('darker', 0.9)} means that the unit fires more strongly; the frame marks the "
            "place that the example was picked for. Shown are, of the strongest units that fire in 0.05 % to 30 % of the places, "
            f"those that their rules tell best: one of {JUDGED} that were judged.</p>"
        )

    def _overview(self) -> str:
        most = max(note.load for note in self.experts)
        rows = "".join(
            f'<tr><td><a href="#expert-{note.expert}">{note.expert}</a></td><td>{_bar(note.load / max(most, 1e-9))} '
            f"{note.load:.1%}</td><td>{_bar(note.active)} {note.active:.1%}</td><td>{note.alive}</td>"
            f'<td style="text-align:left;white-space:normal">{_tokens(note.tokens)}</td></tr>'
            for note in self.experts
        )
        head = "".join(
            f"<th>{h}</th>" for h in ("expert", "of the visits", "of its units fire", "alive", "visited for")
        )
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def unit_report(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]] | Sequence[str],
    *,
    layer: int | None = None,
    per_expert: int = 8,
    examples: int = 4,
    samples: int = 48,
    length: int = 256,
    batch_size: int = 8,
    seed: int = 0,
) -> UnitReport:
    """Read texts and say what the experts and units of a layer stand for.

    Args:
        model, tokenizer: a language model, dense or a mixture; its units mean most where they are sparse (ReLU).
        texts: documents, or domain -> documents.
        layer: index of the feed-forward layer; None: the middle one.
        per_expert, examples: units shown of each expert, and places shown of each unit.
        samples, length: blocks a domain and tokens a block.
        batch_size: blocks at a time.
        seed: of the examples that scores are made of.
    Raises:
        ValueError: no such layer, a layer that cannot be read, or a domain with too little text for one block.
    """
    if per_expert < 1 or examples < 1:
        raise ValueError(f"per_expert and examples must be at least 1, got {per_expert} and {examples}")
    found = unit_layer(model, layer)
    domains = texts if isinstance(texts, Mapping) else {"text": texts}
    ids = torch.cat([blocks(tokenizer, part, length, limit=samples) for part in domains.values()])
    fired_U, total_U = torch.zeros(found.n_units), torch.zeros(found.n_units)
    visits_E = torch.zeros(found.n_experts, dtype=torch.float64)
    by_token = torch.zeros(found.n_experts, int(ids.max()) + 1)
    with _Watched(model, found, visits_E, by_token) as expect:
        for rows, units in zip(
            ids.split(batch_size), read_units(model, ids, found, batch_size=batch_size), strict=True
        ):
            expect(rows)
            fired_U += (units > 0).float().sum((0, 1))
            total_U += units.clamp(min=0).sum((0, 1))
    if not found.experts:
        visits_E += ids.numel()
    columns = _judged(fired_U / ids.numel(), total_U, found, JUDGED * per_expert)
    kept = torch.cat(list(read_units(model, ids, found, columns=columns, batch_size=batch_size, label="examples")))
    rules = {r.unit: r for r in detection_score(kept, ids, tokenizer, units=columns.tolist(), seed=seed)}
    places = {unit: column for column, unit in enumerate(columns.tolist())}
    fired_EH = fired_U.view(found.n_experts, -1)
    notes = []
    for e in range(found.n_experts):
        own = [rules[unit] for unit in places if unit // found.hidden == e and unit in rules]
        own = sorted(own, key=lambda rule: -rule.score)[:per_expert]
        notes.append(
            ExpertNote(
                expert=e,
                load=float(visits_E[e] / visits_E.sum()),
                active=float(fired_EH[e].sum() / (visits_E[e].clamp(min=1) * found.hidden)),
                alive=int((fired_EH[e] > 0).sum()),
                tokens=_typical(by_token, e, tokenizer) if found.experts else [],
                units=[UnitNote(r, _examples(kept[..., places[r.unit]], ids, tokenizer, examples)) for r in own],
            )
        )
    return UnitReport(
        layer=found.name,
        n_experts=found.n_experts,
        hidden=found.hidden,
        positions=ids.numel(),
        per_token=float(fired_U.sum() / ids.numel()),
        score=mean_score(list(rules.values())) if rules else 0.0,
        judged=len(rules),
        experts=notes,
    )


def top_examples(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    layer: int | None,
    unit: int,
    k: int = 20,
    *,
    samples: int = 48,
    length: int = 256,
) -> list[Example]:
    """The k places at which a unit fires most strongly, one a row of text at most; fewer where it fires in fewer rows.

    Raises:
        ValueError: no such layer or unit.
    """
    found = unit_layer(model, layer)
    if not 0 <= unit < found.n_units:
        raise ValueError(f"unit must lie in 0..{found.n_units - 1}, got {unit}")
    ids = blocks(tokenizer, texts, length, limit=samples)
    values = torch.cat(list(read_units(model, ids, found, columns=torch.tensor([unit]))))[..., 0]
    return _examples(values, ids, tokenizer, k)


def _judged(rate_U: Tensor, total_U: Tensor, layer: UnitLayer, n: int) -> Tensor:
    """The n units of each expert with the largest sum of activations, among those that fire neither everywhere nor nowhere."""
    usual = (rate_U <= OFTEN) & (rate_U >= RARELY)
    rank_EH = torch.where(usual, total_U, -1.0).view(layer.n_experts, -1)
    best = rank_EH.topk(min(n, layer.hidden), dim=1)
    columns = best.indices + torch.arange(layer.n_experts)[:, None] * layer.hidden
    return columns[best.values > 0]


def _examples(values: Tensor, ids: Tensor, tokenizer: Any, k: int) -> list[Example]:
    peaks, where = values.max(1)
    order = peaks.argsort(descending=True)[:k]
    found = []
    for row in order[peaks[order] > 0].tolist():
        at = int(where[row])
        part = slice(max(0, at - AROUND), at + AROUND + 1)
        found.append(
            Example(
                tokens=[tokenizer.decode([token]) for token in ids[row, part].tolist()],
                activations=values[row, part].tolist(),
                peak=at - part.start,
            )
        )
    return found


class _Watched:
    """Counts visits of experts while units are read; nothing for a dense layer."""

    def __init__(self, model: Any, layer: UnitLayer, visits_E: Tensor, by_token: Tensor):
        self.layer, self.visits, self.by_token = layer, visits_E, by_token
        self.routings = recorded_routing(model) if layer.experts else None
        self.seen: Any = None

    def __enter__(self) -> Any:
        if self.routings is not None:
            self.seen = self.routings.__enter__()
        return self.expect

    def expect(self, rows: Tensor) -> None:
        if self.seen is not None:
            _count(self.seen[self.layer.name].indices.cpu(), rows.flatten(), self.visits, self.by_token)

    def __exit__(self, *error: Any) -> None:
        if self.routings is not None:
            self.routings.__exit__(*error)


def _expert_html(note: ExpertNote) -> str:
    if not note.units:
        return f'<p id="expert-{note.expert}">None of its units fires often enough, and rarely enough, to be shown.</p>'
    cards = "".join(
        f"<details{' open' if i < 2 else ''}><summary><b>unit {unit.rule.unit}</b> {_bar(2 * unit.rule.score - 1)} "
        f"{unit.rule.score:.0%} · fires on {html.escape(unit.rule.explanation)} "
        f'<span style="color:var(--soft)">({unit.rule.fires:.2%} of the places)</span></summary>'
        + "".join(_example_html(example, unit.rule.strongest) for example in unit.examples)
        + "</details>"
        for i, unit in enumerate(note.units)
    )
    return f'<div id="expert-{note.expert}"><p>Visited for {_tokens(note.tokens) or "all tokens"}.</p>{cards}</div>'


def _example_html(example: Example, strongest: float) -> str:
    parts = [
        _mark(token, value / max(strongest, 1e-9), framed=i == example.peak)
        for i, (token, value) in enumerate(zip(example.tokens, example.activations, strict=True))
    ]
    return f'<p style="margin:.35rem 0 .35rem 1rem;font-family:ui-monospace,monospace;font-size:.85rem">…{"".join(parts)}…</p>'


def _mark(token: str, share: float, *, framed: bool = False) -> str:
    shown = html.escape(token.replace("\n", "⏎"))
    frame = "outline:1.5px solid var(--accent);border-radius:.2rem;" if framed else ""
    if share <= 0 and not framed:
        return f'<span style="white-space:pre-wrap">{shown}</span>'
    tint = min(85, round(12 + 73 * max(0.0, share))) if share > 0 else 0
    style = f"white-space:pre-wrap;{frame}background:color-mix(in srgb, #e8a33d {tint}%, transparent)"
    return f'<span style="{style}" title="{max(0.0, share):.2f} of the strongest">{shown}</span>'


def _bar(share: float) -> str:
    width = round(60 * min(1.0, max(0.0, share)))
    return (
        '<span style="display:inline-block;width:60px;height:.6rem;background:var(--line);border-radius:.3rem">'
        f'<span style="display:block;width:{width}px;height:.6rem;background:var(--accent);border-radius:.3rem"></span></span>'
    )


def _tokens(tokens: Sequence[tuple[str, float]]) -> str:
    return " ".join(
        f"<code>{html.escape(repr(token))}</code><small style='color:var(--soft)'> ×{lift:.1f}</small>"
        for token, lift in tokens
    )
