"""Self-contained HTML pages: text, tables and matplotlib figures, nothing fetched from anywhere."""

import html
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixtura.core.checkpoint import atomic_file

__all__ = ["as_written", "check_picture", "figure_html", "new_figure", "save_figure", "table_html", "write_page"]

PICTURES = (".png", ".svg", ".pdf")

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #ffffff; --line: #d9d9de; --soft: #6b6b70; --accent: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --paper: #17181a; --line: #3a3b40; --soft: #a0a0a6; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 68rem;
       margin: 2.5rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.lead { color: var(--soft); margin-top: 0; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
tr.best td { font-weight: 600; } pre { background: color-mix(in srgb, var(--ink) 6%, transparent); padding: .8rem 1rem;
       border-radius: .4rem; white-space: pre-wrap; } figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto;
       background: #fff; border-radius: .4rem; } figcaption { color: var(--soft); font-size: .9rem; }
"""


def new_figure(width: float = 9.0, height: float = 4.0) -> Any:
    """A matplotlib figure of its own, in inches: no global state, no screen needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_written(text: str) -> str:
    """A name for a figure's text; two dollar signs in it would set what is between them as mathematics, or fail to.

    Example:
        >>> print(as_written("from $5 to $10"))
        from \\$5 to \\$10
    """
    return text.replace("$", r"\$")


def figure_html(figure: Any, caption: str) -> str:
    """A figure as inline SVG with a caption, which a screen reader is given as well."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(caption, quote=True)}"', 1
    )
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def check_picture(path: Path, option: str) -> None:
    """Refuse a picture of a kind that cannot be written, before any work is done for it."""
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"{option} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}, got {path.name!r}")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as the suffix of ``path`` says; whole or not at all."""
    with atomic_file(path) as beside, warnings.catch_warnings():
        # Names in scripts that the font lacks are boxes in the picture; a line for every such letter helps nobody.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from font")
        figure.savefig(beside, dpi=140, format=path.suffix.lower().removeprefix("."))


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]], *, best: int | None = None) -> str:
    """A table; the row numbered ``best`` is set off."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=best' if i == best else ''}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def write_page(path: str | Path, *, title: str, lead: str, sections: Sequence[tuple[str, str]]) -> None:
    """Write a page of titled sections, each given as HTML; whole or not at all."""
    body = "\n".join(f"<section><h2>{html.escape(name)}</h2>\n{content}</section>" for name, content in sections)
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>\n{body}</body></html>\n'
    )
    with atomic_file(path) as beside:
        beside.write_text(text, encoding="utf-8")
