"""The report of a life: one table, and the pictures that a person looks at first."""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixtura.core.checkpoint import atomic_file
from mixtura.core.page import figure_html, new_figure, table_html, write_page
from mixtura.lm.life import Life, Stage

__all__ = ["life_table", "stage_line", "terminal_table", "write_report"]

COLORS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#718096")


def stage_line(stage: Stage) -> str:
    """One line for the terminal, as the stage is finished."""
    perplexities = ", ".join(f"{name} {value:.2f}" for name, value in stage.perplexity.items())
    return f"{stage.name:<22} perplexity {perplexities} ({stage.seconds:.0f} s)"


def terminal_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A table as rich shows it, names to the left and figures to the right."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def life_table(life: Life) -> Any:
    """The table as rich shows it, a row a stage."""
    return terminal_table(*_cells(life))


def write_report(life: Life, out: Path, *, seconds: float) -> None:
    """Write ``report.html`` (self-contained) and ``report.json`` into ``out``."""
    header, rows = _cells(life)
    chosen = next((i for i, stage in enumerate(life.stages) if stage.name == f"train: {life.chosen}"), None)
    sections = [
        ("Every stage, measured", table_html(header, rows, best=chosen)),
        (
            "Perplexity by stage",
            figure_html(perplexity_figure(life), "Held-out perplexity of every stage; lower is better."),
        ),
        ("Speed", figure_html(speed_figure(life), "Tokens a second of reading a prompt and of writing.")),
    ]
    if life.routing is not None:
        sections.append(("Which expert fires where", _routing_html(life)))
    if life.allocation:
        caption = "Bits that the integer program gave to each expert; columns are layers."
        sections.append(("Bits over experts", figure_html(allocation_figure(life), caption)))
    samples = "".join(
        f"<h3>{name}</h3><pre>{html.escape(life.prompt + text)}</pre>" for name, text in life.samples.items()
    )
    sections.append(
        (
            "What it writes",
            f"<p>The compressed model continues <code>{html.escape(life.prompt.strip())}</code>.</p>{samples}",
        )
    )
    sections.append(("How to repeat it", f"<pre>{html.escape(json.dumps(asdict(life.config), indent=2))}</pre>"))
    lead = f"{Path(life.base).name}: from one dense model to a compressed mixture of experts in {seconds / 60:.1f} minutes."
    write_page(out / "report.html", title="The life of a mixture of experts", lead=lead, sections=sections)
    payload = {
        "base": Path(life.base).name,
        "config": asdict(life.config),
        "chosen": life.chosen,
        "seconds": seconds,
        "stages": [asdict(stage) for stage in life.stages],
        "samples": life.samples,
        "allocation": life.allocation,
    }
    with atomic_file(out / "report.json") as beside:
        beside.write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")


def perplexity_figure(life: Life) -> Any:
    """One line a domain over the stages."""
    figure = new_figure(9.5, 4.2)
    axes = figure.add_subplot()
    names = [stage.name for stage in life.stages]
    for color, domain in zip(COLORS, life.stages[0].perplexity, strict=False):
        values = [stage.perplexity[domain] for stage in life.stages]
        axes.plot(names, values, "o-", color=color, label=domain, linewidth=1.6, markersize=4)
        axes.axhline(values[0], color=color, linewidth=0.6, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylabel("held-out perplexity")
    axes.tick_params(axis="x", rotation=35)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
    axes.legend(frameon=False, ncols=len(life.stages[0].perplexity), loc="lower left", bbox_to_anchor=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def speed_figure(life: Life) -> Any:
    """Bars of prefill and decode speed."""
    figure = new_figure(9.5, 3.4)
    names = [stage.name for stage in life.stages]
    for i, (what, color) in enumerate((("prefill", COLORS[0]), ("decode", COLORS[1]))):
        axes = figure.add_subplot(1, 2, i + 1)
        axes.barh(names, [getattr(stage, what) for stage in life.stages], color=color)
        axes.invert_yaxis()
        axes.set_xlabel(f"{what}, tokens a second")
        axes.spines[["top", "right"]].set_visible(False)
        if i:
            axes.set_yticklabels([])
    return figure


def allocation_figure(life: Life) -> Any:
    """Experts by layers, coloured by bits."""
    figure = new_figure(9.5, 1.2 + 0.28 * len(life.allocation[0]))
    axes = figure.add_subplot()
    rows = [list(column) for column in zip(*life.allocation, strict=True)]
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=1, vmax=max(max(row) for row in rows))
    axes.set_xlabel("layer")
    axes.set_ylabel("expert")
    axes.set_yticks(range(len(rows)))
    figure.colorbar(image, ax=axes, label="bits", ticks=sorted({bits for row in rows for bits in row}))
    return figure


def _routing_html(life: Life) -> str:
    caption = "Share of each domain's tokens that visit each expert, averaged over layers."
    return figure_html(life.routing.domain_figure(), caption)


def _cells(life: Life) -> tuple[list[str], list[list[str]]]:
    domains = list(life.stages[0].perplexity)
    header = [
        "stage",
        "total",
        "active",
        "bits",
        "disk",
        "memory",
        *(f"ppl {name}" for name in domains),
        "prefill",
        "decode",
    ]
    rows = [
        [
            stage.name,
            f"{stage.total / 1e6:.0f} M",
            f"{stage.active / 1e6:.0f} M",
            f"{stage.bits:.2f}",
            f"{stage.disk / 1e6:.0f} MB",
            f"{stage.memory / 1e9:.1f} GB",
            *(f"{stage.perplexity[name]:.2f}" for name in domains),
            f"{stage.prefill:.0f}/s",
            f"{stage.decode:.1f}/s",
        ]
        for stage in life.stages
    ]
    return header, rows
