"""The life of a mixture of experts: branch, upcycle, train, compress, generate, look inside; every stage measured.

A stage's model is what stands on the disk: bfloat16 safetensors, loaded again to be measured (in float32 where the
processor multiplies that quicker). A stage that an earlier run with the same settings finished is loaded instead of
computed, and training goes on from its checkpoint.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.core.checkpoint import read_json, write_json
from mixtura.core.measure import Meter
from mixtura.data.texts import Corpus
from mixtura.lm.cost import Size, model_size
from mixtura.lm.evaluate import token_losses
from mixtura.lm.families import read_dense
from mixtura.lm.generation import Decode, generate, speed
from mixtura.lm.loading import directory_bytes, load, load_tokenizer, save
from mixtura.lm.tokens import blocks
from mixtura.lm.training import train

__all__ = ["Life", "LifeConfig", "Stage", "live"]

log = logging.getLogger(__name__)

SEED_NAME = "general"  # the untouched dense model takes part as an expert of its own
GENERAL_SHARE = 0.1  # share of the other domains in a specialist's training (BAM, sec. 3)
MEASURED_BLOCKS = 3  # held-out blocks a domain
DEVELOPMENT_BLOCKS = 2  # blocks a domain from the training part, never trained on: they choose the mixture
CALIBRATION_BLOCKS = 12


@dataclass(frozen=True, kw_only=True)
class LifeConfig:
    """Budget and seed of a life.

    Attributes:
        steps: training steps of each specialist and of each mixture.
        batch_size, length: rows a step, tokens a row.
        bits: average bits of an expert's weight after compression.
        top_k: feed-forward experts a token visits.
        lr: peak rate of the specialists; mixtures, whose gates start from nothing, use twice that.
        seed: of everything that chance enters.
    """

    steps: int = 6
    batch_size: int = 2
    length: int = 128
    bits: float = 2.5
    top_k: int = 2
    lr: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 16:
            raise ValueError(f"length must be at least 16 tokens, got {self.length}")


@dataclass
class Stage:
    """One row of the table.

    Attributes:
        name: what was done.
        total, active: parameters, and those that one token uses.
        bits: bits a weight on the disk, scales and all.
        disk: bytes of the weights.
        memory: peak resident bytes while the stage was made and measured.
        seconds: time to make it.
        perplexity: domain -> held-out perplexity.
        prefill, decode: tokens a second.
    """

    name: str
    total: int
    active: int
    bits: float
    disk: int
    memory: int
    seconds: float
    perplexity: dict[str, float]
    prefill: float
    decode: float


@dataclass
class Life:
    """What a life leaves behind, for the table and the report."""

    config: LifeConfig
    base: str
    stages: list[Stage] = field(default_factory=list)
    chosen: str = ""
    samples: dict[str, str] = field(default_factory=dict)
    prompt: str = ""
    routing: Any = None
    allocation: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Run:
    """What every stage needs."""

    config: LifeConfig
    domains: Mapping[str, Corpus]
    tokenizer: Any
    held_out: dict[str, Tensor]
    development: dict[str, Tensor]
    work: Path
    device: str
    facts: dict[str, Any]

    def train_texts(self) -> dict[str, list[str]]:
        return {name: corpus.train for name, corpus in self.domains.items()}


def live(
    source: str | Path,
    domains: Mapping[str, Corpus],
    out: Path,
    config: LifeConfig | None = None,
    *,
    device: str = "cpu",
    on_stage: Callable[[Stage], None] | None = None,
) -> Life:
    """Take a dense checkpoint through its whole life as a mixture.

    Args:
        source: dense checkpoint, directory or hub id.
        domains: name -> corpus; a specialist is trained for each. At least two.
        out: ``out/mixture`` and ``out/compressed`` are written; ``out/work`` holds unfinished work and is removed at
            the end.
        config: budget.
        device: where to compute.
        on_stage: called with every finished row.
    Raises:
        ValueError: fewer than two domains, too little text, or a family that cannot be upcycled (it is named).
    """
    config = config or LifeConfig()
    if len(domains) < 2:
        raise ValueError(f"a mixture needs at least two domains, got {list(domains)}; give --text twice or more")
    life = Life(config=config, base=str(source))
    tokenizer = load_tokenizer(source)
    run = _prepare(source, domains, tokenizer, out, config, device)

    def measured(name: str, path: Path, made: Meter | None = None, model: Any = None, size: Size | None = None) -> Any:
        stage, model = _measure(run, name, path, made, model, size)
        life.stages.append(stage)
        if on_stage is not None:
            on_stage(stage)
        return model

    # Stored in bfloat16 like everything after it, so that stages differ by what was done and not by their type.
    dense, _ = _once(run, "dense", lambda: load(source, dtype=torch.bfloat16)[0], "The dense model, in bfloat16.")
    read_dense(dense)  # a family that cannot be upcycled is refused before anything is trained
    measured("dense", dense)
    specialists = {SEED_NAME: dense}
    for name in domains:
        path, meter = _specialist(run, dense, name)
        specialists[name] = path
        measured(f"branch: {name}", path, meter)
    mixtures = {}
    for method in ("copy", "shared-kv", "expert-kv"):
        path, made = _upcycled(run, dense, specialists, method)
        measured(f"upcycle: {method}", path, made)
        mixtures[method], made = _trained(run, path, method)
        measured(f"train: {method}", mixtures[method], made)
    life.chosen = min(mixtures, key=lambda method: _development_loss(run, mixtures[method]))
    _keep(mixtures[life.chosen], out / "mixture")
    _compress_and_look(run, life, out, measured)
    shutil.rmtree(run.work, ignore_errors=True)
    return life


def _prepare(
    source: str | Path, domains: Mapping[str, Corpus], tokenizer: Any, out: Path, config: LifeConfig, device: str
) -> _Run:
    held_out = {
        name: blocks(tokenizer, corpus.held_out, config.length, limit=MEASURED_BLOCKS)
        for name, corpus in domains.items()
    }
    development, kept = {}, {}
    for name, corpus in domains.items():
        # From the end of the training part, which is then trained on without these documents.
        last = _documents_for(tokenizer, corpus.train, DEVELOPMENT_BLOCKS * config.length)
        kept[name] = Corpus(name, corpus.train[:-last], corpus.held_out)
        if not kept[name].train:
            raise ValueError(f"the domain {name!r} has too few documents to train and to choose on; give more text")
        development[name] = blocks(tokenizer, corpus.train[-last:], config.length, limit=DEVELOPMENT_BLOCKS)
    facts = {"source": str(source), **asdict(config), "text": {n: sum(map(len, c.train)) for n, c in kept.items()}}
    work = out / "work"
    told = work / "settings.json"
    if told.exists() and read_json(told) != facts:
        log.warning("%s holds stages of other settings; they are made anew", work)
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    write_json(told, facts)
    return _Run(config, kept, tokenizer, held_out, development, work, device, facts)


def _documents_for(tokenizer: Any, texts: list[str], tokens: int) -> int:
    found, used = 0, 0
    while found < tokens and used < len(texts):
        used += 1
        found += len(tokenizer(texts[-used], add_special_tokens=False, verbose=False)["input_ids"])
    return used


def _once(run: _Run, name: str, make: Callable[[], Any], recipe: str) -> tuple[Path, Meter]:
    """Path of a stage's model: made and saved now, or found from an interrupted run."""
    path = run.work / name
    with Meter() as meter:
        if (path / "config.json").exists():
            log.info("%s was finished by an earlier run", name)
        else:
            model = make().to(torch.bfloat16)
            save(model, run.tokenizer, path, card=_card(run, name, recipe))
    shutil.rmtree(run.work / f"{name}.state", ignore_errors=True)
    return path, meter


def _card(run: _Run, name: str, recipe: str) -> dict[str, Any]:
    config = run.config
    return {
        "title": name,
        "base": [str(run.facts["source"])],
        "recipe": recipe,
        "data": ", ".join(run.domains) + f"; {config.steps} steps of {config.batch_size} x {config.length} tokens",
        "command": f"mixtura demo --model {run.facts['source']} --steps {config.steps} --batch {config.batch_size} "
        f"--length {config.length} --bits {config.bits} --seed {config.seed}",
    }


def _specialist(run: _Run, source: Path, name: str) -> tuple[Path, Meter]:
    def make() -> Any:
        model, _ = load(source, dtype=torch.float32, device=run.device)
        others = len(run.domains) - 1
        shares = {domain: 1 - GENERAL_SHARE if domain == name else GENERAL_SHARE / others for domain in run.domains}
        _train(run, model, f"branch-{name}", shares=shares, lr=run.config.lr)
        return model

    return _once(run, f"branch-{name}", make, f"A copy of the dense model, trained on {name}.")


def _upcycled(run: _Run, source: Path, specialists: Mapping[str, Path], method: str) -> tuple[Path, Meter]:
    from mixtura.lm import upcycle

    def make() -> Any:
        k, seed = run.config.top_k, run.config.seed
        # Paths, so that the sources are read tensor by tensor and never stand in memory as a whole.
        if method == "copy":
            return upcycle(source, method="copy", n_experts=len(specialists), top_k=k, seed=seed)
        return upcycle(specialists, method="branch-attend-mix", attention=method, top_k=k, seed=seed)

    recipe = {
        "copy": "Every expert is a copy of the dense feed-forward layer; router random.",
        "expert-kv": "Specialists as feed-forward and attention experts, each with its own keys and values.",
        "shared-kv": "Specialists as feed-forward and attention experts that share keys and values.",
    }[method]
    return _once(run, f"upcycle-{method}", make, recipe)


def _trained(run: _Run, path: Path, method: str) -> tuple[Path, Meter]:
    def make() -> Any:
        model, _ = load(path, dtype=torch.float32, device=run.device)
        depth = model.config.num_hidden_layers
        # The upper half: AdamW's moments of all experts would not fit into the memory promised.
        upper = range(depth // 2, depth)
        _train(run, model, f"train-{method}", lr=2 * run.config.lr, trainable="experts", layers=upper)
        return model

    return _once(run, f"train-{method}", make, "Gates of all layers and experts of the upper half, trained together.")


def _train(run: _Run, model: Any, name: str, **options: Any) -> None:
    config = run.config
    train(
        model,
        run.tokenizer,
        run.train_texts(),
        steps=config.steps,
        batch_size=config.batch_size,
        length=config.length,
        checkpoint_every=max(10, config.steps // 8),
        out=run.work / f"{name}.state",
        seed=config.seed,
        label=name,
        **options,
    )


def _development_loss(run: _Run, path: Path) -> float:
    model, _ = load(path, dtype="quick", device=run.device)
    losses = [token_losses(model, rows, batch_size=4).mean().item() for rows in run.development.values()]
    return sum(losses) / len(losses)


def _compress_and_look(run: _Run, life: Life, out: Path, measured: Callable[..., Any]) -> None:
    from mixtura.lm import compress, find_moe, inspect
    from mixtura.lm.inspection import expert_bits

    with Meter() as meter:
        model, _ = load(out / "mixture", dtype="quick", device=run.device)
        size = model_size(model)  # packed weights are no parameters any more
        small = compress(
            model,
            run.tokenizer,
            run.train_texts(),
            bits=run.config.bits,
            samples=CALIBRATION_BLOCKS,
            length=run.config.length,
            seed=run.config.seed,
            inplace=True,
        )
        save(
            small.to(torch.bfloat16),
            run.tokenizer,
            out / "compressed",
            card=_card(run, "compressed", "Experts at 1 to 3 bits, rest at 4."),
        )
    small = measured("compress", out / "compressed", meter, size=size)
    with Meter() as meter:
        pruned = compress(small, run.tokenizer, run.train_texts(), bits=None, prune=0.02, inplace=True, samples=8)
    measured("compress + prune", out / "compressed", meter, model=pruned, size=size)
    life.prompt = "def is_prime(n):\n"
    options: dict[Decode, dict[str, Any]] = {
        "greedy": {},
        "sample": {"temperature": 0.8, "top_p": 0.95},
        "self-contrast": {"contrast": "rank:2"},
    }
    for decode, extra in options.items():
        life.samples[decode] = generate(
            small, run.tokenizer, life.prompt, decode=decode, max_new_tokens=40, seed=run.config.seed, **extra
        )
    held_out = {name: corpus.held_out for name, corpus in run.domains.items()}
    life.routing = inspect(small, run.tokenizer, held_out, samples=MEASURED_BLOCKS, length=run.config.length)
    life.allocation = expert_bits(find_moe(small))


def _measure(run: _Run, name: str, path: Path, made: Meter | None, model: Any, size: Size | None) -> tuple[Stage, Any]:
    with Meter() as meter:
        if model is None:
            model, _ = load(path, dtype="quick", device=run.device)
        losses = {n: token_losses(model, rows, batch_size=4) for n, rows in run.held_out.items()}
        first = next(iter(run.held_out.values()))
        pace = speed(model, first[:1], new_tokens=8)
    size = size or model_size(model)
    disk = directory_bytes(path)
    stage = Stage(
        name=name,
        total=size.total,
        active=size.active,
        bits=8 * disk / size.total,
        disk=disk,
        memory=max(meter.peak_bytes, made.peak_bytes if made else 0),
        seconds=made.seconds if made else 0.0,
        perplexity={n: float(loss.double().mean().exp()) for n, loss in losses.items()},
        prefill=pace.prefill,
        decode=pace.decode,
    )
    return stage, model


def _keep(source: Path, destination: Path) -> None:
    shutil.rmtree(destination, ignore_errors=True)
    shutil.copytree(source, destination)
