"""What the commands do: check, say what it will take, work, save. Heavy imports happen here and nowhere else in ``cli``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixtura.cli.checks import check_device, check_writable
from mixtura.core.measure import Meter
from mixtura.data.texts import Corpus, corpus, read_texts, split
from mixtura.lm import cost, loading

if TYPE_CHECKING:
    from mixtura.lm.parallel.training import ExpertParallel

__all__ = ["compare", "compress", "convert", "demo", "expert_counts", "generate", "inspect", "train", "upcycle"]

Say = Callable[[str], None]

DOMAINS = ("code", "prose", "arithmetic")


def upcycle(
    sources: Sequence[str],
    out: Path,
    method: str,
    options: Mapping[str, Any],
    *,
    device: str,
    dry_run: bool,
    command: str,
    say: Say,
) -> None:
    """Upcycle checkpoints into ``out``."""
    from mixtura.lm import upcycle as run

    check_device(device)
    check_writable(out, sources)
    say(f"upcycle {', '.join(sources)} by {method}: {cost.estimate(_upcycled(sources, method, options))}")
    if dry_run:
        return
    pairs = [loading.load(source, device=device) for source in sources]
    loading.same_vocabulary(sources, [tokenizer for _, tokenizer in pairs])
    models = [model for model, _ in pairs]
    tokenizer = pairs[0][1]
    del pairs
    with Meter() as meter:
        model = run(models if len(models) > 1 else models.pop(), method=method, **options)
        models.clear()
    size = cost.model_size(model)
    figures = {"parameters": size.total, "active a token": size.active, "seconds": round(meter.seconds, 1)}
    card = {
        "title": out.name,
        "base": list(sources),
        "recipe": f"Upcycled with mixtura by `{method}` ({_listed(options)}).",
        "command": command,
        "figures": figures,
        "usage": usage_of(model, out),
    }
    loading.save(model, tokenizer, out, card=card)
    say(f"{out}: {type(model).__name__}, {size.total / 1e6:.1f} M parameters, {size.active / 1e6:.1f} M active a token")
    say(_served(model))


def _upcycled(sources: Sequence[str], method: str, options: Mapping[str, Any]) -> cost.Size:
    """Parameters of the mixture before it is built; exact for a pyramid, whose layers differ."""
    config = loading.load_config(sources[0])
    if method == "pyramid":
        from mixtura.lm.families import FAMILIES
        from mixtura.lm.model import MixturaConfig
        from mixtura.lm.upcycle.pyramid import PyramidConfig, mixture_config

        if config.model_type in FAMILIES:  # any other is refused when it is read
            ours = MixturaConfig(**FAMILIES[config.model_type].fields(config))
            pyramid = PyramidConfig(num_experts=options["n_experts"], combine=options["combine"])
            return cost.model_size(loading.empty_model(mixture_config(ours, pyramid)))
    dense = cost.model_size(loading.empty_model(config))
    copies = options.get("n_experts", len(sources))
    copies = max(copies) if isinstance(copies, list) else copies
    # Feed-forward weights are about two thirds of a dense decoder; the exact size is known once it is built.
    share = 0.5 if method == "interpretable" else 1.0  # of the feed-forward part that an expert holds
    total = round(dense.total * (1 + 0.67 * (share * copies - 1)))
    return cost.Size(total, round(dense.total * (1 + 0.67 * (share * options["top_k"] - 1))))


def expert_counts(text: str) -> list[int]:
    """Experts of each layer as people write them: ``8``, ``4,4,8,8`` or ``4x2,8x2``."""
    counts: list[int] = []
    for part in text.split(","):
        number, _, times = part.strip().partition("x")
        if not number.isdecimal() or not (times or "1").isdecimal() or int(number) < 1 or int(times or 1) < 1:
            raise ValueError(f"--experts must be whole numbers above 0, as in 8 or 4,4,8,8 or 4x2,8x2, got {text!r}")
        counts += [int(number)] * int(times or 1)
    return counts


def train(
    source: str,
    out: Path,
    text: Sequence[Path] | None,
    options: Mapping[str, Any],
    *,
    device: str,
    dry_run: bool,
    command: str,
    say: Say,
    parallel: str | None = None,
) -> None:
    """Train a checkpoint, or a new model of a config file, into ``out``; an unfinished run's state stands in ``out.state``."""
    from mixtura.cli.train_parallel import team_of

    check_device(device)
    check_writable(out, [source])
    with team_of(parallel, device, say) as (team, device, say):
        _train(source, out, text, options, team, device=device, dry_run=dry_run, command=command, say=say)


def _train(
    source: str,
    out: Path,
    text: Sequence[Path] | None,
    options: Mapping[str, Any],
    team: "ExpertParallel | None",
    *,
    device: str,
    dry_run: bool,
    command: str,
    say: Say,
) -> None:
    import shutil

    from mixtura.cli.train_new import config_of, is_config, start
    from mixtura.lm import train as run
    from mixtura.lm.evaluate import perplexity
    from mixtura.lm.tokens import blocks

    leads = team is None or team.leads
    domains = domains_of(text)
    tokens = options["steps"] * options["batch_size"] * options["length"]
    new = is_config(source)
    size = cost.model_size(loading.empty_model(config_of(source) if new else loading.load_config(source)))
    say(f"train {source} on {tokens:,} tokens of {', '.join(domains)}: {cost.estimate(size, trained_tokens=tokens)}")
    if dry_run:
        return
    drawn = out.with_name(f"{out.name}.start")
    begin = str(drawn) if new else source
    if new and leads:
        start(source, drawn, text, options["seed"], command=command, say=say)
    if team is not None:
        team.wait()
    model, tokenizer = loading.load(begin, dtype=torch.float32, device=device)
    held_out = {
        n: blocks(tokenizer, c.held_out, options["length"], limit=8)
        for n, c in domains.items()
        if enough(tokenizer, c, options["length"])
    }
    before = {name: perplexity(model, rows, batch_size=4) for name, rows in held_out.items()} if leads else {}
    state = out.with_name(f"{out.name}.state")
    texts = {name: part.train for name, part in domains.items()}
    history = run(model, tokenizer, texts, out=state, team=team, **options)
    if team is not None:
        trained = team.state(model)
        if not leads:
            return
        model = loading.load(begin, dtype=torch.float32, device=device)[0]
        model.load_state_dict(trained)
    if history.resumed_at:
        say(f"went on from step {history.resumed_at}")
    after = {name: perplexity(model, rows, batch_size=4) for name, rows in held_out.items()}
    figures: dict[str, Any] = {"loss at the end": history.losses[-1] if history.losses else float("nan")}
    for name in held_out:
        figures[f"held-out perplexity, {name}"] = f"{before[name]:.2f} -> {after[name]:.2f}"
        say(f"{name}: held-out perplexity {before[name]:.2f} -> {after[name]:.2f}")
    how = "" if team is None else f", by {team}"
    card = {
        "title": out.name,
        "base": ["random weights" if new else source],
        "recipe": f"Trained with mixtura ({_listed(options)}){how}.",
        "data": f"{tokens:,} tokens of {', '.join(domains)}",
        "command": command,
        "figures": figures,
        "usage": usage_of(model, out),
    }
    loading.save(model.to(torch.bfloat16), tokenizer, out, card=card)
    shutil.rmtree(state, ignore_errors=True)
    if new:
        shutil.rmtree(drawn, ignore_errors=True)
    say(f"{out} is written")


def compress(
    source: str,
    out: Path,
    method: str,
    text: Sequence[Path] | None,
    options: Mapping[str, Any],
    *,
    device: str,
    dry_run: bool,
    command: str,
    say: Say,
) -> None:
    """Compress a mixture of experts into ``out``."""
    from mixtura.lm import compress as run
    from mixtura.lm.anatomy import find_moe

    check_device(device)
    check_writable(out, [source])
    config = loading.load_config(source)
    empty = loading.empty_model(config)
    if not find_moe(empty):
        raise ValueError(
            f"{source} is a dense model ({type(empty).__name__}) and {method} compresses experts; "
            f"make a mixture of it first: mixtura upcycle {source} DST"
        )
    domains = domains_of(text)
    size = cost.model_size(empty)
    tokens = 3 * options["samples"] * options["length"]
    stored = options["bits"] + 32 / 128
    say(
        f"compress {source} to {options['bits']} bits an expert's weight: "
        f"{cost.estimate(size, bytes_per_parameter=stored / 8, forward_tokens=tokens, extra_memory=2 * size.total)}"
    )
    if dry_run:
        return
    model, tokenizer = loading.load(source, dtype="quick", device=device)
    texts = {name: part.train for name, part in domains.items()}
    with Meter() as meter:
        small = run(model, tokenizer, texts, method=method, inplace=True, **options)
    card = {
        "title": out.name,
        "base": [source],
        "recipe": f"Compressed with mixtura by `{method}` ({_listed(options)}).",
        "data": f"calibrated on {options['samples']} x {options['length']} tokens of {', '.join(domains)}",
        "command": command,
        "figures": {"parameters": size.total, "seconds": round(meter.seconds, 1)},
        "usage": usage_of(small, out),
        "source": "Mixture Compressor for Mixture-of-Experts LLMs (arXiv 2410.06270)",
    }
    # Back to the checkpoint's type, which `quick` may have left; packed weights keep theirs.
    stored = getattr(config, "dtype", None)
    loading.save(small.to(stored) if isinstance(stored, torch.dtype) else small, tokenizer, out, card=card)
    disk = loading.directory_bytes(out)
    say(
        f"{out}: {disk / 1e6:.1f} MB, {8 * disk / size.total:.2f} bits a weight over all {size.total / 1e6:.1f} M weights"
    )


def generate(source: str, prompt: str, options: Mapping[str, Any], *, device: str, dry_run: bool, say: Say) -> None:
    """Continue a prompt."""
    from mixtura.lm import generate as run

    check_device(device)
    if dry_run:
        size = cost.model_size(loading.empty_model(loading.load_config(source)))
        say(f"generate with {source}: {cost.estimate(size, forward_tokens=options['max_new_tokens'])}")
        return
    model, tokenizer = loading.load(source, dtype="quick", device=device)
    say(run(model, tokenizer, prompt, **options))


def inspect(
    source: str,
    text: Sequence[Path] | None,
    report: Path,
    *,
    samples: int,
    length: int,
    device: str,
    dry_run: bool,
    say: Say,
) -> None:
    """Write the routing report of a checkpoint."""
    from mixtura.lm import inspect as run

    check_device(device)
    _check_page(report)
    domains = domains_of(text)
    size = cost.model_size(loading.empty_model(loading.load_config(source)))
    tokens = samples * length * len(domains)
    say(f"inspect {source} on {tokens:,} tokens: {cost.estimate(size, forward_tokens=tokens)}")
    if dry_run:
        return
    model, tokenizer = loading.load(source, dtype="quick", device=device)
    texts = {name: part.held_out + part.train for name, part in domains.items()}
    found = run(model, tokenizer, texts, samples=samples, length=length)
    found.to_html(report)
    found.to_json(report.with_suffix(".json"))
    say(f"{report} and {report.with_suffix('.json')} are written")


def compare(
    sources: Sequence[str],
    text: Sequence[Path] | None,
    report: Path,
    plot: Path | None,
    options: Mapping[str, Any],
    *,
    device: str,
    dry_run: bool,
    say: Say,
) -> Any:
    """Write the comparison of checkpoints; returns the table to print, or None after a dry run."""
    from mixtura.core.page import check_picture, save_figure
    from mixtura.lm import compare as run
    from mixtura.lm.report import terminal_table

    check_device(device)
    _check_page(report)
    if plot is not None:
        check_picture(plot, "--plot")
    domains = domains_of(text)
    tokens = options["samples"] * options["length"] * len(domains) + 3 * options["context"]
    sizes = [cost.model_size(loading.empty_model(loading.load_config(source))) for source in sources]
    seconds = sum(cost.estimate(size, forward_tokens=tokens).seconds for size in sizes)
    largest = max(sizes, key=lambda size: size.total)
    whole = cost.estimate(largest, bytes_per_parameter=4.0)
    say(f"compare {len(sources)} checkpoints: {cost.Cost(largest, 0, whole.memory, seconds)}")
    if dry_run:
        return None
    found = run(sources, {n: c.held_out + c.train for n, c in domains.items()}, device=device, **options)
    found.to_html(report)
    found.to_json(report.with_suffix(".json"))
    written = [str(report), str(report.with_suffix(".json"))]
    if plot is not None:
        save_figure(found.figure(), plot)
        written.append(str(plot))
    say(f"{', '.join(written)} are written")
    return terminal_table(found.header(), found.cells())


def convert(
    source: str,
    out: Path,
    options: Mapping[str, Any],
    *,
    length: int,
    multiple_of: int,
    plot: Path | None,
    seed: int,
    device: str,
    dry_run: bool,
    command: str,
    say: Say,
) -> None:
    """Convert a dense checkpoint into ``out``."""
    from mixtura.cli import convert_picture
    from mixtura.core.isoflop import IsoFlop
    from mixtura.core.page import check_picture
    from mixtura.core.sparse_layers import masked_parameters
    from mixtura.lm.isoflop import BETWEEN, count, widened_config
    from mixtura.lm.isoflop import convert as run

    check_device(device)
    check_writable(out, [source])
    if plot is not None:
        check_picture(plot, "--plot")
    kind, s = options["kind"], options["sparsity"]
    transform = IsoFlop(
        kind,
        s,
        skip=options["skip"],
        match=options["match"],
        distribution=options["distribution"],
        between=BETWEEN,
        n_m=options["n_m"],
    )
    how, kept = convert_picture.named(kind, s), convert_picture.KEPT[kind]
    config = loading.load_config(source)
    target = widened_config(config, s, multiple_of=multiple_of) if kind == "wide" else config
    size = cost.model_size(loading.empty_model(target))
    grown = 1 / (1 - s) if kind in ("parallel", "factorized") else 1.0
    say(f"convert {source}: {how}; {cost.estimate(cost.Size(round(grown * size.total), size.active))}")
    if dry_run:
        return
    model, tokenizer = loading.load(source, device=device)
    before = count(model, length)
    with Meter() as meter:
        made = run(model, transform, length=length, multiple_of=multiple_of, seed=seed)
    after = count(made, length)
    masks = masked_parameters(made)
    density = sum(m.active for m in masks.values()) / sum(m.mask.numel() for m in masks.values()) if masks else 1.0
    total = sum(p.numel() for p in made.parameters())
    figures = {
        "multiply-adds of the forward pass": f"{after.total:,.0f} ({after.total / before.total:.4f} of the dense model's)",
        "multiply-adds without the masks": f"{after.dense:,.0f}",
        "density of the masked layers": density,
        "parameters, inactive ones counted": total,
        "seconds": round(meter.seconds, 1),
    }
    equal = f"Costs are equal at {length} tokens" if transform.match == "network" else "Costs are equal layer by layer"
    card = {
        "title": out.name,
        "base": [source],
        "recipe": f"Converted with mixtura by `sparse-ift`, {how}: {kept}. {equal}.",
        "command": command,
        "figures": figures,
        "usage": usage_of(made, out),
        "source": "Sparse Iso-FLOP Transformations for Maximizing Training Efficiency (arXiv 2303.11525)",
    }
    loading.save(made, tokenizer, out, card=card)
    if plot is not None:
        convert_picture.draw(plot, before, after, title=f"{out.name}: {how}")
    say(
        f"{out}: {after.total / before.total:.4f} of the dense model's multiply-adds at {length} tokens, {100 * density:.1f} % "
        f"of the masked weights active, {total / 1e6:.1f} M parameters"
    )
    say(f"{kept}; train it: mixtura train {out} --text ...")


def demo(
    model: str | None,
    text: Sequence[Path] | None,
    options: Mapping[str, Any],
    *,
    out: Path,
    device: str,
    dry_run: bool,
    say: Say,
) -> Any:
    """Run the main job; returns the table to print, or None after a dry run."""
    from mixtura.data.models import smollm2
    from mixtura.lm.life import LifeConfig, live
    from mixtura.lm.report import life_table, stage_line, write_report

    check_device(device)
    config = LifeConfig(**options)
    domains = domains_of(text)
    source = model or str(smollm2())
    dense = cost.model_size(loading.empty_model(loading.load_config(source)))
    mixtures = cost.Size(round(dense.total * 3.4), round(dense.total * 1.9))
    tokens = config.steps * config.batch_size * config.length
    branch = cost.estimate(dense, trained_tokens=tokens * len(domains))
    whole = cost.estimate(mixtures, trained_tokens=3 * tokens, forward_tokens=30_000, trained_share=0.5)
    say(
        f"the life of a mixture, from {source} over {', '.join(domains)}: up to "
        f"{cost.Cost(mixtures, 5 * mixtures.total * 2, whole.memory, branch.seconds + whole.seconds + 120)}"
    )
    if dry_run:
        return None
    with Meter() as meter:
        life = live(source, domains, out, config, device=device, on_stage=lambda stage: say(stage_line(stage)))
    write_report(life, out, seconds=meter.seconds)
    # Attention experts are in no family of transformers.
    which = f"{out / 'mixture'} and {out / 'compressed'} load"
    if life.chosen == "copy":
        which = f"{out / 'mixture'} loads with transformers, {out / 'compressed'}"
    say(f"\n{out / 'report.html'} shows it; {which} with transformers after import mixtura")
    return life_table(life)


def domains_of(text: Sequence[Path] | None) -> dict[str, Corpus]:
    """Corpora by name: each given path is a domain of its own; without any, what every machine has."""
    if not text:
        return {name: corpus(name, characters=1_200_000) for name in DOMAINS}
    found: dict[str, Corpus] = {}
    for path in text:
        name = path.stem or path.name
        if name in found:
            name = str(path)
        found[name] = split(name, read_texts([path]))
    return found


def _check_page(report: Path) -> None:
    """Refuse a report that is no page: the figures, in a .json file of the same name, would be written over it."""
    if report.suffix != ".html":
        raise ValueError(f"--report must end in .html, got {report.name!r}")


def enough(tokenizer: Any, part: Corpus, length: int) -> bool:
    """Whether the held-out part fills a block; a short text is trained on without being measured."""
    ids = 0
    for document in part.held_out:
        ids += len(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]) + 1
        if ids >= length:
            return True
    return False


def usage_of(model: Any, out: Path) -> str:
    """Python that loads what was written, for the model card."""
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if type(model).__module__.startswith("mixtura") or getattr(model.config, "quantization_config", None):
        lines.insert(0, "import mixtura  # registers the model's classes with transformers")
    lines += [
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{out.name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{out.name}")',
    ]
    return "\n".join(lines)


def _served(model: Any) -> str:
    if type(model).__module__.startswith("mixtura"):
        return "no transformers family has this structure: it loads after `import mixtura`, and vLLM cannot serve it"
    return "it loads with transformers alone, and vLLM serves the family"


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())
