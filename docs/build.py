"""Make the pages that come from records: the gallery, the benchmark page, the README's table of systems."""

import json
from pathlib import Path

from mixtura.claims.gallery import gallery, systems_table

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- systems: made by `make docs` -->", "<!-- end of systems -->"


def benchmarks() -> str:
    """Every benchmark record as a section: what was compared, the bar, what came out."""
    parts = ["# Benchmarks", "Made from the records in this directory with `make docs`; rerun them with `make bench`."]
    for path in sorted((ROOT / "docs" / "benchmarks").glob("*.json")):
        record = json.loads(path.read_text())
        parts.append(f"## {record['title']}\n\n{record['what']}")
        header = list(record["rows"][0])
        table = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        table += ["| " + " | ".join(_cell(row.get(name)) for name in header) + " |" for row in record["rows"]]
        parts.append("\n".join(table))
        if record.get("notes"):
            parts.append(record["notes"])
        machine = record.get("machine", {})
        parts.append(
            f"Measured on {machine.get('processor', 'an unnamed machine')}, {machine.get('threads', '?')} threads."
        )
    return "\n\n".join(parts) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
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
