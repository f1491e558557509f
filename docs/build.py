"""Make the pages that come from records: the gallery, the benchmark page, the README's table of systems."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixtura.claims.gallery import gallery, systems_table

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- systems: made by `make docs` -->", "<!-- end of systems -->"


def benchmarks() -> str:
    """Every benchmark record as a section: what was compared, the bar, what came out."""
    parts = ["# Benchmarks", "Made from the records in this directory with `make docs`; rerun them with `make bench`."]
    for path in sorted((ROOT / "docs" / "benchmarks").glob("*.json")):
        record = json.loads(path.read_text())
        title, what, rows, notes = READERS.get(path.stem, _plain_record)(record)
        header = list(rows[0])
        table = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        table += ["| " + " | ".join(_cell(row.get(name)) for name in header) + " |" for row in rows]
        machine = record["machine"]
        threads = machine.get("torch_threads", machine.get("threads"))
        parts += [f"## {title}", what, "\n".join(table)]
        parts += [notes] if notes else []
        parts.append(f"Measured on {machine['processor']}, {threads} threads, {record['date']}.")
    return "\n\n".join(parts) + "\n"


Section = tuple[str, str, list[dict[str, Any]], str]


def _plain_record(record: dict[str, Any]) -> Section:
    return record["title"], record["what"], record["rows"], record.get("notes", "")


def _experts_forward(record: dict[str, Any]) -> Section:
    bars = record["bars"]
    rows = []
    for name, row in record["rows"].items():
        found = {"case": name, "best rival": row["best rival"]}
        found["of its time (bar 1)"] = _spread(row["of the best rival's time"])
        for key, short in (
            ("of dense", "of one dense product (bar 0.85)"),
            ("of reading the weights", "of reading (bar 0.7)"),
        ):
            value = row.get(key)
            found[short] = "" if value is None else _spread(value)
        rows.append(found)
    what = (
        "Stacked experts against transformers' own engines, one dense product of the same arithmetic at 1024 tokens, and one "
        f"reading of the weights that are visited at 1 and 32. Bars: {'; '.join(f'{k} {v}' for k, v in bars.items())}."
    )
    return "Experts forward on a CPU", what, rows, _why_below(record["rows"])


def _why_below(rows: dict[str, Any]) -> str:
    """For every row below its bar, where the record's own figures say that the time goes."""
    reasons = []
    for name, row in rows.items():
        seconds, dense, reading = row["seconds"], row.get("of dense"), row.get("of reading the weights")
        if dense is not None and dense["median"] < 0.85:
            if "products alone, of dense" in row:
                alone = row["products alone, of dense"]["median"]
                why = f"the experts' products alone, smaller ones than the dense, reach {alone:.2f}"
            else:
                own = name.replace("forward and backward", "forward")
                forward = _spread(rows[own]["of dense"])
                why = f"the forward pass reaches {forward}; backward writes a gradient for each expert, the dense product one"
            reasons.append(f"{name}: {why}.")
        elif reading is not None and reading < 0.7:
            long = name.split(" tokens, ")[0].rsplit(", ", 1)[0]
            tokens, dtype = int(name.split(" tokens, ")[0].rsplit(", ", 1)[1]), name.split(" tokens, ")[1]
            arithmetic = rows[f"{long}, 1024 tokens, {dtype}"]["seconds"]["dense"] * tokens / 1024
            call, ours, read = seconds["call alone"], seconds["mixtura"], row["read"]["seconds"]
            reasons.append(
                f"{name}: {1e3 * ours:.1f} ms, of which the call without products takes {1e3 * call:.1f}; reading takes "
                f"{1e3 * read:.1f} and the arithmetic, at the rate of the dense product, {1e3 * arithmetic:.1f}."
            )
    return "Where a bar is missed:\n\n" + "\n".join(f"- {reason}" for reason in reasons) if reasons else ""


def _attention_mixture(record: dict[str, Any]) -> Section:
    rows = [
        {"case": f"forward, batch, length, width, heads {row['shape']}", "ratio": _spread(row["ratio"]), "bar": "1.15"}
        for row in record["forward"]
    ]
    for row in record["decode"]:
        size = f"vocabulary {row['vocabulary']:,}"
        judged = row["vocabulary"] == 256_000
        bar = str(record["bars"]["16 tokens after 256"]) if judged else "reported"
        rows.append({"case": f"one token after 256, {size}", "ratio": _spread(row["one token"]["bam"]), "bar": bar})
        rows.append({"case": f"16 tokens after 256, {size}", "ratio": _spread(row["bam over btx"]), "bar": bar})
    what = (
        "Four attention experts against one attention with four times the heads and width (forward), and the mixture against the "
        "same one with averaged attention (decoding). Time over the rival's."
    )
    return "Attention experts", what, rows, record["why"]


def _upcycle_memory(record: dict[str, Any]) -> Section:
    rows = [
        {
            "way": name,
            "checkpoint, GB": row["checkpoint"] / 1e9,
            "peak over checkpoint": row["built_over_checkpoint"],
            "with saving": row["saved_over_checkpoint"],
            "bar": record["bar"],
        }
        for name, row in record["ways"].items()
    ]
    what = "Peak resident memory of loading and upcycling a dense Llama to eight experts, over the bytes of the result."
    notes = "Where the dense model is in memory already, it stays there beside the result."
    return "Memory of upcycling", what, rows, notes


def _expert_parallel(record: dict[str, Any]) -> Section:
    rows = []
    for row in record["rows"]:
        found: dict[str, Any] = {
            "layout": row["layout"],
            "step over one process": f"{row['step over one process']:.2f}",
        }
        for kind in ("rows", "gradients of experts", "gradients of the rest"):
            found[f"{kind}, MB"] = f"{row.get(f'{kind}, bytes', 0.0) / 1e6:.2f}"
        counted = row.get("rows, counted over formula")
        found["rows, counted over formula"] = counted and f"{counted[1]:.4f} ({counted[0]:.2f} to {counted[2]:.2f})"
        rows.append(found)
    what = (
        f"A training step of {record['tokens']:,} tokens in {record['processes']} processes on two cores, with the loss and "
        "gradient norm of one process; bytes a process sends a step, and over the closed formula: mean, least and most over "
        "processes."
    )
    notes = "Processes share two cores and one memory, so the times show what sharing costs and not what it gains."
    return "Experts over processes", what, rows, notes


def _token_selection(record: dict[str, Any]) -> Section:
    bars = {"random over prefix": "1.5 at most", "mask over random": "5 at least"}
    rows = [{"what": name, "ratio": _spread(record[name]), "bar": bar} for name, bar in bars.items()]
    shape = record["shape"]
    what = (
        f"Which of {shape['tokens']:,} tokens stay with {shape['experts']} experts of {shape['places']} places: at random over "
        "first come, and a mask of all experts with uniform numbers and a top-k over ours."
    )
    largest = record["largest block, bytes"]
    notes = f"Largest block of memory: {largest['random'] / 1e6:.2f} MB, of the mask {largest['mask'] / 1e6:.2f} MB."
    return "Selection within capacity", what, rows, notes


READERS: dict[str, Callable[[dict[str, Any]], Section]] = {
    "experts_forward": _experts_forward,
    "attention_mixture": _attention_mixture,
    "expert_parallel": _expert_parallel,
    "token_selection": _token_selection,
    "upcycle_memory": _upcycle_memory,
}


def _spread(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
    return f"{value:.2f}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return _spread(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def readme() -> str:
    """The README with its table of systems made anew."""
    text = (ROOT / "README.md").read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n\n{systems_table(ROOT / 'docs' / 'claims')}\n{END}{tail}"


if __name__ == "__main__":
    claims = ROOT / "docs" / "claims"
    (claims / "README.md").write_text(gallery(claims))
    (ROOT / "docs" / "benchmarks" / "README.md").write_text(benchmarks())
    (ROOT / "README.md").write_text(readme())
