"""The model card that stands beside every model mixtura writes: base, recipe, data, figures, and how to repeat it."""

from collections.abc import Mapping, Sequence

from mixtura import __version__

__all__ = ["model_card"]


def model_card(
    *,
    title: str,
    base: Sequence[str],
    recipe: str,
    command: str,
    data: str = "none",
    figures: Mapping[str, str | float | int] | None = None,
    usage: str = "",
    source: str = "",
    licence: str = "",
) -> str:
    """Text of a model card in Markdown, with the front matter that the Hugging Face hub reads.

    Args:
        title: name of the model.
        base: models it was made from.
        recipe: what was done, in sentences.
        command: command line that repeats it.
        data: what it was trained or calibrated on.
        figures: name -> value, in the order to print.
        usage: code that loads it.
        source: paper of the method.
        licence: identifier of the base model's licence, when known; the weights inherit it.
    """
    front = ["---", "library_name: transformers", "tags: [mixtura, mixture-of-experts]"]
    hub_ids = [name for name in base if name.count("/") == 1 and not name.startswith((".", "/"))]
    if hub_ids:
        front += ["base_model:", *(f"- {name}" for name in hub_ids)]
    if licence:
        front.append(f"license: {licence}")
    parts = ["\n".join([*front, "---"]), f"# {title}", recipe]
    parts.append("**Made from** " + ", ".join(base) + ("" if licence else " (whose licence applies)") + ".")
    parts.append(f"**Data** {data}.")
    if figures:
        rows = [f"| {name} | {_shown(value)} |" for name, value in figures.items()]
        parts.append("\n".join(["| figure | value |", "|---|---|", *rows]))
    if usage:
        parts.append(f"```python\n{usage.strip()}\n```")
    parts.append(f"To repeat it (mixtura {__version__}):\n\n```\n{command}\n```")
    if source:
        parts.append(f"Method: {source}.")
    return "\n\n".join(parts) + "\n"


def _shown(value: str | float | int) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else value
