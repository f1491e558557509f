"""``mixtura explain``: what the experts and hidden units of a layer stand for."""

from pathlib import Path
from typing import Annotated

import typer

from mixtura.cli.lm import SOURCE, Device, DryRun, Seed, Text, _say

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(explain)


def explain(
    directory: Annotated[str, SOURCE],
    text: Text = None,
    report: Annotated[
        Path, typer.Option(help="HTML file to write; a JSON file of the same name stands beside it.")
    ] = Path("units.html"),
    layer: Annotated[int | None, typer.Option(help="Feed-forward layer, from 0. Default: the middle one.")] = None,
    units: Annotated[int, typer.Option(help="Units shown of each expert.")] = 8,
    samples: Annotated[int, typer.Option(help="Blocks a domain.")] = 48,
    length: Annotated[int, typer.Option(help="Tokens a block.")] = 256,
    seed: Seed = 0,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Say what each expert and each hidden unit stands for, with the places of your text where it fires.

    Every unit gets a rule in words and a score: how many places the rule gets right that it was not learned from. Works on any
    model; units of `mixtura upcycle --method interpretable` are sparse and mean most.

    Examples:

        mixtura explain out/wide --text notes/ --report units.html

        mixtura explain out/wide --text code/ --text letters/ --layer 4 --units 12
    """
    from mixtura.cli.checks import check_device
    from mixtura.cli.work import domains_of
    from mixtura.lm import cost, loading
    from mixtura.lm.unit_report import unit_report
    from mixtura.lm.units import unit_layer

    check_device(device)
    if report.suffix != ".html":
        raise ValueError(f"--report must end in .html, got {report.name!r}")
    domains = domains_of(text)
    empty = loading.empty_model(loading.load_config(directory))
    found = unit_layer(empty, layer)
    tokens = 2 * samples * length * len(domains)
    _say(f"explain {found.name} of {directory}: {cost.estimate(cost.model_size(empty), forward_tokens=tokens)}")
    if dry_run:
        return
    model, tokenizer = loading.load(directory, dtype="quick", device=device)
    texts = {name: part.held_out + part.train for name, part in domains.items()}
    made = unit_report(
        model, tokenizer, texts, layer=layer, per_expert=units, samples=samples, length=length, seed=seed
    )
    made.to_html(report, title=f"What the units of {Path(directory).name} stand for")
    made.to_json(report.with_suffix(".json"))
    score = f"rules get {made.score:.0%} right over {made.judged} units" if made.judged else "no unit could be judged"
    _say(f"{made.per_token:.0f} of {found.n_units:,} units fire on a token; {score}")
    _say(f"{report} and {report.with_suffix('.json')} are written")
