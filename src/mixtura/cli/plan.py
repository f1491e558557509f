"""``plan``: what training a model of experts would take on machines that are not here."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mixtura.lm.parallel.cluster import Cluster, ModelShape
    from mixtura.lm.parallel.load_trace import LoadTrace
    from mixtura.lm.parallel.plan import Memory, Sizes
    from mixtura.lm.parallel.simulate import SimReport

__all__ = ["add_to"]

NAMES = {
    "ep": "expert parallelism",
    "faster": "FasterMoE",
    "smart": "SmartMoE",
    "flex": "FlexMoE",
    "hecate": "hecate",
    "fsdp": "FSDP",
}


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(plan)


def plan(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG_OR_DIR",
            help="Config file of a model of experts (ours, or a config.json of a transformers family), or a checkpoint of one.",
        ),
    ],
    gpus: Annotated[int, typer.Option(min=1, help="Devices.")] = 8,
    memory: Annotated[float, typer.Option(help="Gigabytes (10^9) of one device.")] = 80.0,
    host: Annotated[float, typer.Option(help="Gigabytes of host memory a device, for states kept there.")] = 200.0,
    cluster: Annotated[
        str, typer.Option(help="Links and speed: A (V100, 100 Gb/s), B (A100, 400 Gb/s), H100x8.")
    ] = "H100x8",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a device and step.")] = 8192,
    capacity: Annotated[int, typer.Option(min=0, help="Copies of busy experts a device has room for, a layer.")] = 8,
    loads: Annotated[Path | None, typer.Option(help="Recorded loads, as --record writes them.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Record the loads of a checkpoint on this text; may be repeated.")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Where to keep recorded loads, a .safetensors file.")] = None,
    skew: Annotated[float, typer.Option(help="Unevenness of drawn loads: 0 even, 0.5 mild, 1.5 severe.")] = 1.0,
    iterations: Annotated[int, typer.Option(min=3, help="Steps to simulate; the first third is for tuning.")] = 60,
    out: Annotated[Path | None, typer.Option(help="Write all figures to this .json file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture: .png, .svg or .pdf.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of drawn loads.")] = 0,
) -> None:
    """Say what training a model of experts would take: memory of a device under every form, modelled time of a step.

    Memory is counted from the model: weights, gradients, optimizer states and copies of experts, without activations. Time is a
    model: attention, exchanges of tokens, experts, and copies that nothing hides, on links and devices that are numbers. Loads
    of the experts are drawn, read from a file, or recorded from a checkpoint on your own text.

    Examples:

        mixtura plan config.json --gpus 64 --memory 80 --cluster B --plot plan.png

        mixtura plan out/moe --text letters/ --record loads.safetensors --gpus 16 --cluster A

        mixtura plan config.json --loads loads.safetensors --gpus 32 --cluster B --out plan.json
    """
    from mixtura.core.checkpoint import write_json
    from mixtura.core.page import check_picture
    from mixtura.lm.parallel.cluster import Cluster

    console = Console(highlight=False)
    if memory <= 0 or host < 0:
        raise ValueError(f"--memory must be > 0 and --host >= 0, got {memory:g} and {host:g}")
    if record is not None and not text:
        raise ValueError("--record keeps the loads that --text makes; give --text")
    if plot is not None:
        check_picture(plot, "--plot")
    if out is not None and out.suffix != ".json":
        raise ValueError(f"--out must end in .json, got {out}")
    shape, sizes = _shape(source)
    machines = Cluster.preset(cluster, gpus)
    trace = _trace(source, shape, machines, loads, text, record, skew, tokens, iterations, seed)
    needs = _memory(shape, sizes, gpus, capacity)
    times = {} if trace is None else _times(trace, shape, machines, capacity)
    said = (
        f"{(sizes.other + sizes.experts) / 1e9:,.2f} billion parameters, {sizes.experts / 1e9:,.2f} in "
        f"{sum(shape.experts):,} experts; {gpus} devices of {memory:g} GB."
    )
    if trace is not None:
        skewed, drift, _ = trace.fit()
        said += f" Loads: busiest expert {trace.imbalance:.1f} times the mean (skew {skewed:.2f}, drift {drift:.2f})."
    console.print(said, soft_wrap=True)
    wide = Console(highlight=False, width=max(console.width, 110))
    wide.print(_memory_table(needs, memory, host))
    if times:
        wide.print(_time_table(times))
    elif trace is None:
        console.print(
            f"No times: loads are modelled for layers with one number of experts, and these have "
            f"{sorted(set(shape.experts) - {0})}.",
            soft_wrap=True,
        )
    else:
        console.print(
            f"No times: they are modelled where the devices divide the experts of every layer, and {gpus} does not divide "
            f"{sorted(set(shape.experts) - {0})}.",
            soft_wrap=True,
        )
    console.print(_advice(needs, times, memory, host), soft_wrap=True)
    if plot is not None:
        from mixtura.cli.plan_picture import draw

        draw(plot, needs, times, memory, NAMES)
        console.print(f"wrote {plot}")
    if out is not None:
        write_json(out, _figures(shape, sizes, machines, trace, needs, times))
        console.print(f"wrote {out}")


def _shape(source: str) -> tuple["ModelShape", "Sizes"]:
    """The model as the cost model sees it, and its parameters, counted one by one."""
    from mixtura.lm import loading
    from mixtura.lm.parallel.cluster import ModelShape
    from mixtura.lm.parallel.plan import sizes_of

    config = _config(source)
    shape = ModelShape.of(config)
    counted = sizes_of(loading.empty_model(config))
    return shape, counted if counted.experts else sizes_of(shape)


def _config(source: str) -> Any:
    """Config of a checkpoint, of a file with fields of ours, or of a ``config.json`` of a transformers family."""
    from transformers import AutoConfig

    from mixtura.cli.train_new import config_of, is_config
    from mixtura.core.checkpoint import read_json
    from mixtura.lm import loading

    if not is_config(source):
        return loading.load_config(source)
    fields = read_json(source) if Path(source).is_file() else {}
    family = fields.pop("model_type", "mixtura")
    if family == "mixtura":
        return config_of(source)
    try:
        return AutoConfig.for_model(family, **fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source} is no config that transformers builds: {str(error).splitlines()[0]}") from error


def _trace(
    source: str,
    shape: "ModelShape",
    machines: "Cluster",
    loads: Path | None,
    text: list[Path] | None,
    record: Path | None,
    skew: float,
    tokens: int,
    iterations: int,
    seed: int,
) -> "LoadTrace | None":
    """Loads to model times with; None for layers that differ in their number of experts."""
    from mixtura.lm.parallel.load_trace import LoadTrace, synthesize_loads

    counts = set(shape.experts) - {0}
    if len(counts) > 1:
        if loads is not None or text:
            raise ValueError(
                f"loads are modelled for layers with one number of experts, got {sorted(counts)}; leave --loads and --text out"
            )
        return None
    (n_experts,) = counts
    rows = tokens * shape.top_k * machines.devices
    if loads is not None and text:
        raise ValueError("--loads and --text both give the loads; give one")
    if loads is not None:
        found = LoadTrace.load(loads)
    elif text:
        found = _recorded(source, text, iterations, seed)
        if record is not None:
            found.save(record)
    else:
        return synthesize_loads(iterations, shape.sparse_layers, n_experts, rows, skew=skew, seed=seed)
    if found.counts.shape[2] != n_experts:
        raise ValueError(f"the loads are of {found.counts.shape[2]} experts a layer, the model has {n_experts}")
    return LoadTrace(found.counts[:iterations]).tiled(shape.sparse_layers, rows)


def _recorded(source: str, text: list[Path], iterations: int, seed: int) -> "LoadTrace":
    from mixtura.cli.train_new import is_config
    from mixtura.cli.work import domains_of
    from mixtura.core.progress import progress
    from mixtura.lm import loading
    from mixtura.lm.parallel.load_trace import record_loads
    from mixtura.lm.tokens import blocks, mixed_batch_at

    if is_config(source):
        raise ValueError("--text records the loads of a trained model; give its directory, not a config")
    model, tokenizer = loading.load(source)
    rows = {name: blocks(tokenizer, part.train, 128) for name, part in domains_of(text).items()}
    shares = dict.fromkeys(rows, 1.0)
    steps = progress(range(iterations), desc="loads", unit="step")
    return record_loads(model.eval(), (mixed_batch_at(rows, shares, step, 8, seed=seed) for step in steps))


def _memory(shape: "ModelShape", sizes: "Sizes", gpus: int, capacity: int) -> dict[str, "Memory"]:
    from mixtura.lm.parallel.mesh import make_mesh
    from mixtura.lm.parallel.plan import FORMS, memory

    fewest = min(set(shape.experts) - {0})
    found = {}
    for form in FORMS:
        words = form.split("+")
        tensor = 2 if "M" in words else 1
        fitting = [d for d in range(1, gpus + 1) if gpus % (d * tensor) == 0 and fewest % (d * tensor) == 0]
        if form != "hecate" and not fitting:
            continue
        mesh = make_mesh(gpus, expert=gpus if form == "hecate" else max(fitting), tensor=tensor)
        repeats = mesh.expert_data > 1
        if tensor == 1 and ((repeats and form in ("E", "E+Z")) or (not repeats and "D" in words)):
            continue  # with several groups of experts the form has a D, and only then
        found[form] = memory(sizes, mesh, form, capacity=capacity)
    found["hecate, freed"] = memory(sizes, make_mesh(gpus), "hecate", capacity=capacity, rematerialize=True)
    return found


def _times(trace: "LoadTrace", shape: "ModelShape", machines: "Cluster", capacity: int) -> dict[str, "SimReport"]:
    from mixtura.core.progress import progress
    from mixtura.lm.parallel.load_trace import LoadTrace
    from mixtura.lm.parallel.simulate import simulate, tune

    if any(count % machines.devices for count in shape.experts):
        return {}
    skip = len(trace.counts) // 3
    first = LoadTrace(trace.counts[:skip])
    found = {}
    for system in progress(NAMES, desc="systems", unit="system"):
        knobs: dict[str, Any] = tune(first, shape, machines, system)
        if system == "hecate":
            knobs["capacity"] = capacity
        found[system] = simulate(trace, shape, machines, system, skip=skip, **knobs)
    return found


def _memory_table(needs: dict[str, "Memory"], memory: float, host: float) -> Table:
    from mixtura.lm.parallel.plan import FORMS

    table = Table(title="Memory of a device, gigabytes, without activations", title_justify="left")
    for name in ("form", "weights", "gradients", "states", "copies", "all", "host", "fits"):
        table.add_column(name, justify="left" if name in ("form", "fits") else "right")
    for form, need in needs.items():
        parts = [need.parts.get(name, 0.0) / 1e9 for name in ("weights", "gradients", "states", "copies")]
        parts[1] += need.parts.get("buffer", 0.0) / 1e9
        fits = need.device <= memory * 1e9 and need.host <= host * 1e9
        cells = [f"{value:,.2f}" for value in (*parts, need.device / 1e9, need.host / 1e9)]
        table.add_row(f"{form}: {FORMS.get(form, 'copies of one layer at a time')}", *cells, "yes" if fits else "no")
    return table


def _time_table(times: dict[str, "SimReport"]) -> Table:
    table = Table(title="Modelled milliseconds of a step, layers with experts", title_justify="left")
    for name in ("system", "attention", "exchange", "experts", "copies", "moves", "all", "over EP", "busiest"):
        table.add_column(name, justify="left" if name == "system" else "right")
    for system, report in times.items():
        cells = [f"{1e3 * seconds:,.1f}" for seconds in (*report.phases.values(), report.seconds)]
        table.add_row(NAMES[system], *cells, f"{times['ep'].seconds / report.seconds:.2f}", f"{report.imbalance:.2f}")
    return table


def _advice(needs: dict[str, "Memory"], times: dict[str, "SimReport"], memory: float, host: float) -> str:
    fitting = [form for form, need in needs.items() if need.device <= 1e9 * memory and need.host <= 1e9 * host]
    if not fitting:
        least = min(needs, key=lambda form: needs[form].device)
        return (
            f"Nothing fits; the least is {least} with {needs[least].device / 1e9:,.1f} GB a device. Take more devices."
        )
    words = f"Fits: {', '.join(fitting)}."
    if times:
        built = {"ep": "--parallel expert=N", "hecate": "--parallel hecate"}
        best = min(built, key=lambda system: times[system].seconds)
        words += f" Of what mixtura train does itself, {built[best]} takes the least time."
    return words


def _figures(
    shape: "ModelShape",
    sizes: "Sizes",
    machines: "Cluster",
    trace: "LoadTrace | None",
    needs: dict[str, "Memory"],
    times: dict[str, "SimReport"],
) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "model": asdict(shape),
        "parameters": {"all": sizes.other + sizes.experts, "experts": sizes.experts},
        "cluster": asdict(machines),
        "imbalance": None if trace is None else trace.imbalance,
        "memory": {form: {"device": need.device, "host": need.host, **need.parts} for form, need in needs.items()},
        "seconds": {
            system: {"all": report.seconds, **report.phases, "knobs": dict(report.knobs)}
            for system, report in times.items()
        },
    }
