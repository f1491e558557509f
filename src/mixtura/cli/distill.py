"""``mixtura distill``: a shallower student of a checkpoint, taught for a part of its training."""

import shlex
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["add_to"]


class InitName(StrEnum):
    """What a student starts from."""

    random = "random"
    teacher = "teacher"


def add_to(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(distill)


def distill(
    teacher: Annotated[str, typer.Argument(help="Checkpoint of the teacher: a directory, or an id on the hub.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Directory to write.")],
    layers: Annotated[int, typer.Option(help="Layers of the student, fewer than the teacher's.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text file or directory of texts; may be repeated. Default: code, prose, arithmetic."),
    ] = None,
    init: Annotated[InitName, typer.Option(help="What the student starts from.")] = InitName.random,
    stop: Annotated[float, typer.Option(help="Share of the steps after which the teacher is switched off.")] = 0.7,
    beta: Annotated[float, typer.Option(help="Factor of the imitation.")] = 1.0,
    tau: Annotated[float, typer.Option(help="Temperature of the imitation.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-4,
    balance: Annotated[float, typer.Option(help="Factor of the load-balance loss.")] = 0.01,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 20,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint of an interrupted run.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of everything that chance enters.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will take, and stop.")] = False,
) -> None:
    """Train a student of fewer layers on text and on what its teacher says, which is switched off before the end.

    The student has the teacher's widths; of a pyramid of experts it loses the early layers' numbers. A student from random
    weights wants a rate near 1e-3 and thousands of steps; one that starts from the teacher's layers far fewer.

    An interrupted run leaves its last checkpoint beside the output; the same command goes on from there.

    Examples:

        mixtura distill out/pyramid out/student --layers 21 --text notes/ --steps 2000 --lr 1e-3

        mixtura distill out/moe out/student --layers 6 --init teacher --stop 0.5 --text notes/
    """
    import torch

    from mixtura.cli.checks import check_device, check_writable
    from mixtura.cli.work import domains_of, usage_of
    from mixtura.lm import cost, loading
    from mixtura.lm.evaluate import perplexity
    from mixtura.lm.students import StagedDistillation, kept_layers, student_config, student_of
    from mixtura.lm.students import distill as run
    from mixtura.lm.tokens import blocks, mixed_batch_at

    check_device(device)
    check_writable(destination, [teacher])
    if steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    if batch < 1 or not balance >= 0:
        raise ValueError(f"--batch must be at least 1 and --balance >= 0, got {batch} and {balance:g}")
    schedule = StagedDistillation(stop=stop, beta=beta, tau=tau)
    config = loading.load_config(teacher)
    size = cost.model_size(loading.empty_model(student_config(config, kept_layers(config, layers))))
    read = cost.model_size(loading.empty_model(config))
    domains = domains_of(text)
    tokens = steps * batch * length
    taught = round(tokens * (stop if beta else 0.0))
    # The teacher only reads: a third of what training takes, and its weights beside the student's.
    own = cost.estimate(size, trained_tokens=tokens, extra_memory=4 * read.total)
    total = cost.Cost(size, own.disk, own.memory, own.seconds + cost.estimate(read, forward_tokens=taught).seconds)
    _say(
        f"a student of {layers} of {config.num_hidden_layers} layers on {tokens:,} tokens of {', '.join(domains)}: {total}"
    )
    if dry_run:
        return
    told, tokenizer = loading.load(teacher, dtype=torch.float32, device=device)
    student = student_of(told, keep_layers=layers, init=init.value, generator=torch.Generator().manual_seed(seed))
    limit = max(64, 4 * steps * batch)
    sources = {name: blocks(tokenizer, part.train, length, limit=limit) for name, part in domains.items()}
    state = destination.with_name(f"{destination.name}.state")
    report = run(
        told,
        student,
        lambda step: mixed_batch_at(sources, dict.fromkeys(sources, 1.0), step, batch, seed=seed),
        steps=steps,
        schedule=schedule,
        lr=lr,
        balance=balance,
        checkpoint_every=checkpoint_every,
        out=state,
        resume=resume,
        describe={name: [len(rows), int(rows.sum() % 2**31)] for name, rows in sources.items()}
        | {"batch_size": batch, "init": init.value},
        seed=seed,
    )
    if report.resumed_at:
        _say(f"went on from step {report.resumed_at}")
    figures: dict[str, object] = {"loss at the end": report.losses[-1], "parameters": size.total}
    for name, part in domains.items():
        try:
            rows = blocks(tokenizer, part.held_out, length, limit=8)
        except ValueError:
            continue  # a held-out part that fills no block is not measured
        ours, theirs = perplexity(student, rows, batch_size=4), perplexity(told, rows, batch_size=4)
        figures[f"held-out perplexity, {name}"] = f"{ours:.2f} (teacher {theirs:.2f})"
        _say(f"{name}: held-out perplexity {ours:.2f}, the teacher's {theirs:.2f}")
    card = {
        "title": destination.name,
        "base": [teacher],
        "recipe": f"A student of {layers} layers, distilled with mixtura (init={init.value}, stop={stop:g}, beta={beta:g}, "
        f"tau={tau:g}, steps={steps}, lr={lr:g}).",
        "data": f"{tokens:,} tokens of {', '.join(domains)}",
        "command": shlex.join(["mixtura", *sys.argv[1:]]),
        "figures": figures,
        "usage": usage_of(student, destination),
        "source": "DeepSpeed-MoE (arXiv 2201.05596), sec. 4.2",
    }
    loading.save(student.to(torch.bfloat16), tokenizer, destination, card=card)
    shutil.rmtree(state, ignore_errors=True)
    _say(f"{destination} is written")


def _say(text: str) -> None:
    Console(highlight=False).print(text, soft_wrap=True, markup=False)
