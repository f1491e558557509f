"""One loop for the small trainings: seeds, schedule, progress, checkpoint and resume.

A training is a function of the step. ``loss_at(step)`` draws its own batch from the step number and nothing else, so a
run that was interrupted and resumed sees the same batches as one that was not, and ends with the same weights.

- AdamW, decay on matrices only, or SGD with Nesterov momentum; linear warm-up, cosine to a floor; gradients clipped by their
  global norm.
- Masked weights (:mod:`mixtura.core.sparse_layers`) stay masked: a sparse model leaves a training as sparse as it came.
- A loss that is not finite stops the run before the optimizer moves.
- A checkpoint is a directory of safetensors and JSON: weights, running statistics, optimizer moments, step, losses.
  Nothing is pickled.
"""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixtura.core.checkpoint import atomic_directory, read_json, write_json
from mixtura.core.progress import bar
from mixtura.core.sharpness import raised
from mixtura.core.sparse_layers import masked_parameters
from mixtura.core.sparse_training import MaskConfig, MaskOptimizer
from mixtura.core.team import Alone, first_not_finite

__all__ = ["History", "NonFiniteLoss", "TrainConfig", "fit", "learning_rate"]

log = logging.getLogger(__name__)

STATE = "training.safetensors"
META = "training.json"


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the weights are those before the step."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and how fast to train.

    Attributes:
        steps: number of optimizer steps, >= 0.
        lr: peak learning rate.
        warmup: share of the steps over which the rate rises linearly from zero.
        final: share of the peak rate at which the cosine ends.
        weight_decay: AdamW decay of tensors with two or more dimensions; vectors (norms, biases) are spared.
        betas: AdamW moments; the first is the momentum of SGD.
        clip: largest global gradient norm; 0 turns clipping off.
        accumulate: calls of ``loss_at`` averaged into one step.
        checkpoint_every: steps between checkpoints; 0 writes none.
        seed: seeds what chance enters a step (dropout, routing noise), step by step.
        optimizer: ``"adamw"`` or ``"sgd"`` (Nesterov).
        rho: radius within which the gradient is taken where the loss rises most (:mod:`~mixtura.core.sharpness`), for which
            ``loss_at`` is called twice a step; 0 takes it at the weights.
    """

    steps: int
    lr: float = 1e-3
    warmup: float = 0.1
    final: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1
    checkpoint_every: int = 0
    seed: int = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    rho: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be >= 0, got {self.steps}")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share and must be between 0 and 1, got {getattr(self, name)}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be >= 1, got {self.accumulate}")
        if self.checkpoint_every < 0 or self.clip < 0 or self.weight_decay < 0 or self.rho < 0:
            raise ValueError("checkpoint_every, clip, weight_decay and rho must be >= 0")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer must be 'adamw' or 'sgd', got {self.optimizer!r}")


@dataclass
class History:
    """What a training left behind: one loss a step, and where it resumed from (0 if it did not)."""

    losses: list[float] = field(default_factory=list)
    resumed_at: int = 0


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate at a step: linear warm-up, then cosine from ``lr`` to ``final * lr``.

    Example:
        >>> config = TrainConfig(steps=100, lr=1.0, warmup=0.1, final=0.1)
        >>> [round(learning_rate(step, config), 3) for step in (0, 9, 10, 99)]
        [0.1, 1.0, 1.0, 0.1]
    """
    warm = int(config.warmup * config.steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    along = (step - warm) / max(1, config.steps - 1 - warm)
    return config.lr * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, along))))


def fit(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    config: TrainConfig,
    *,
    out: Path | None = None,
    resume: bool = True,
    label: str = "train",
    describe: Mapping[str, Any] | None = None,
    masks: MaskConfig | None = None,
    stop: int | None = None,
    carried: Mapping[str, Tensor] | None = None,
    team: Alone | None = None,
) -> History:
    """Train the parameters of ``model`` that require gradients.

    Args:
        model: trained in place, left in the mode it came in.
        loss_at: step number (times ``accumulate``, plus the part) -> scalar loss; draws its batch from that number.
        config: length, rate and regularisation.
        out: directory for the checkpoint of an unfinished run, written every ``checkpoint_every`` steps; ``None``
            keeps nothing. What a finished run leaves there is its last such checkpoint: saving the result is the
            caller's.
        resume: continue from the checkpoint in ``out`` if one is there.
        label: name on the progress bar.
        describe: facts about the data that must agree between the checkpoint and a resumed run.
        masks: how the masks of a sparse model move; ``None`` keeps them where they are.
        stop: leave the run after this many steps and keep its state in ``out``; copies of that directory are then resumed as
            branches of one run.
        carried: what changes from step to step without a gradient, such as a queue or a slowly following network: saved with
            every checkpoint, and overwritten in place from it on resuming. Running statistics of norms are carried anyway.
        team: the processes over which the model is spread; checkpoints are those of one process, whatever the team, so a run
            may go on in another. None: this process alone.
    Returns:
        Losses, one a step, those before a resumption included.
    Raises:
        NonFiniteLoss: with the step, the first layer where it shows, and the last checkpoint; the optimizer has not moved.
        ValueError: the checkpoint in ``out`` is of another model, data or schedule (first difference named), or ``masks``
            for a model that has none.
    """
    if stop is not None and (out is None or stop < 1):
        raise ValueError(
            f"stop must be at least 1 and needs out, where the state is kept; got stop={stop} and out={out}"
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("model has no parameter that requires a gradient, so there is nothing to train")
    team = team or Alone()
    if config.rho and (type(team) is not Alone or masked_parameters(model)):
        raise ValueError(
            f"rho={config.rho:g} is for dense models in one process; set rho=0, or train without masks and alone"
        )
    optimizer = _optimizer(trained, config, team)
    moving = None
    if masks is not None or any(found.parameter.requires_grad for found in masked_parameters(model).values()):
        moving = MaskOptimizer(model, optimizer, masks or MaskConfig(method="static"), total_steps=config.steps)
    kept = {f"carried/{name}": t for name, t in (carried or {}).items()} | _running(model)
    history, first = History(), 0
    facts = {"config": _comparable(config), "data": dict(describe or {})}
    if masks is not None:
        facts["masks"] = asdict(masks) | {"n_m": list(masks.n_m)}
        if not masks.joint_decay:
            facts["masks"].pop("joint_decay")  # so that a run from before there was a choice goes on
    if out is not None and resume and (out / META).exists():
        history.losses = _restore(out, trained, optimizer, facts, moving, kept, team)
        first = history.resumed_at = len(history.losses)
        log.info("resumed %s at step %d from %s", label, first, out)
    mode = model.training
    model.train()
    step = first
    try:
        with bar(desc=label, unit="step", total=config.steps, initial=first, hidden=not team.leads) as shown:
            for step in range(first, min(config.steps, stop or config.steps)):
                history.losses.append(_step(model, trained, loss_at, moving or optimizer, step, config, team))
                team.settle(step, model, optimizer)
                shown.set_postfix(loss=f"{history.losses[-1]:.3f}")
                shown.update()
                due = config.checkpoint_every and (step + 1) % config.checkpoint_every == 0
                if out is not None and (due or step + 1 == stop):
                    _save(out, trained, optimizer, history, facts, moving, kept, team)
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f"{error}{_kept(out)}") from error
    except RuntimeError as error:
        if (more := team.explained(error, f"at step {step}{_kept(out)}")) is not None:
            raise more from error
        raise
    except KeyboardInterrupt:
        log.warning("interrupted at step %d; the last checkpoint resumes", step)
        raise
    finally:
        model.train(mode)
    return history


def _kept(out: Path | None) -> str:
    if out is None or not (out / META).exists():
        return ""
    return f"; the last good checkpoint, in {out}, is of {len(read_json(out / META)['losses'])} steps"


def _optimizer(trained: Mapping[str, nn.Parameter], config: TrainConfig, team: Alone) -> torch.optim.Optimizer:
    matrices = [p for p in trained.values() if p.dim() >= 2]
    vectors = [p for p in trained.values() if p.dim() < 2]
    groups = [
        {"params": part, "weight_decay": decay}
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        for part in team.groups(parameters)
        if part
    ]
    if config.optimizer == "sgd":
        momentum = config.betas[0]
        return torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def _step(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    loss_at: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer | MaskOptimizer,
    step: int,
    config: TrainConfig,
    team: Alone,
) -> float:
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for part in range(config.accumulate):
        index = step * config.accumulate + part
        once = partial(_seeded, loss_at, index, config.seed, team.stream)
        loss = once() / config.accumulate
        value = team.mean(loss).item()
        if not math.isfinite(value):
            layer = first_not_finite(model, once, team)
            raise NonFiniteLoss(
                f"the loss became {value} at step {step}; lower lr={config.lr:g} or lengthen the warm-up"
                + (f"; it shows first in {layer}" if layer else "")
            )
        if config.rho:
            steepest = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            with raised(trained, steepest, config.rho):
                # The same draw of dropout as above: both passes see one network.
                (once() / config.accumulate).backward()  # type: ignore[no-untyped-call]
        else:
            loss.backward()  # type: ignore[no-untyped-call]
        total += value
    team.reduce(model)
    if isinstance(optimizer, MaskOptimizer):
        optimizer.mask_gradients()  # before clipping: what inactive weights would like is no part of the norm
    if config.clip:
        norm = team.clip(model, trained, config.clip)
        if not torch.isfinite(norm):
            bad = (i for i, p in enumerate(trained.values()) if p.grad is not None and not _finite(p.grad))
            name = team.name(list(trained)[team.first(next(bad, len(trained) - 1))])
            raise NonFiniteLoss(f"the gradient of {name} is not finite at step {step}; lower lr={config.lr:g}")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()
    return total


def _finite(gradient: Tensor) -> bool:
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return bool(local.isfinite().all())


def _seeded(loss_at: Callable[[int], Tensor], index: int, seed: int, stream: int) -> Tensor:
    # Dropout and routing noise draw from a stream of their own step, so a resumed run draws what an unbroken one drew,
    # and the caller's generator is left where it was.
    # Streams lie far apart in the 32 bits that the generator reads: the golden ratio times 2^32.
    number = seed * 1_000_003 + index + stream * 0x9E3779B1
    with torch.random.fork_rng():
        if torch.accelerator.is_available():
            torch.manual_seed(number)
        else:
            # The same stream; manual_seed would format three stack traces for devices that are not there, about 1 ms.
            torch.default_generator.manual_seed(number)
        return loss_at(index)


def _comparable(config: TrainConfig) -> dict[str, Any]:
    facts = asdict(config)
    facts.pop("checkpoint_every")  # how often to save is no part of what is computed
    facts["betas"] = list(config.betas)
    if config.optimizer == "adamw":
        facts.pop("optimizer")  # so that a run from before there was a choice goes on
    if not config.rho:
        facts.pop("rho")
    return facts


def _running(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of normalisation: they move with the steps, and no gradient brings them back."""
    return {
        f"buffer/{at}.{name}" if at else f"buffer/{name}": buffer
        for at, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for name, buffer in module.named_buffers(recurse=False)
    }


def _save(
    out: Path,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    history: History,
    facts: Mapping[str, Any],
    moving: MaskOptimizer | None,
    carried: Mapping[str, Tensor],
    team: Alone,
) -> None:
    tensors: dict[str, Tensor] = {name: t.detach().contiguous() for name, t in carried.items()}
    if moving is not None:
        for own, found in moving.masked.items():
            for kind, mask in (("mask", found.mask), ("union", moving.union[own])):
                tensors[f"{kind}/{team.name(own)}"] = team.whole(own, found.parameter, mask).contiguous()
    for own, p in trained.items():
        name = team.name(own)
        for key, value in {"weight": p.detach(), **optimizer.state.get(p, {})}.items():
            tensor = torch.as_tensor(value)
            whole = tensor if key == "step" else team.whole(own, p, tensor)
            if team.leads:
                tensors[f"{key}/{name}"] = whole.contiguous()
    if not team.leads:
        return
    with atomic_directory(out) as beside:
        save_file(tensors, beside / STATE)
        write_json(beside / META, {**facts, "losses": history.losses})


def _restore(
    out: Path,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
    moving: MaskOptimizer | None,
    carried: Mapping[str, Tensor],
    team: Alone,
) -> list[float]:
    meta = read_json(out / META)
    parts = (facts.keys() | meta.keys()) - {"losses"}
    for part in sorted(parts):
        now, then = facts.get(part, {}), meta.get(part, {})
        for key in sorted({*now, *then}):
            if now.get(key) != then.get(key):
                raise ValueError(
                    f"{out} holds a run with {key}={then.get(key)!r}, this one has {now.get(key)!r}; "
                    "give the same settings, another directory, or turn resume off"
                )
    tensors = load_file(out / STATE)
    learned = {name.removeprefix("weight/") for name in tensors if name.startswith("weight/")}
    if more := sorted(learned - {team.name(own) for own in trained}):
        raise ValueError(f"{out} holds a run that also trains {more[0]}; train the same parameters, or turn resume off")
    for own, p in trained.items():
        name = team.name(own)
        saved = tensors.get(f"weight/{name}")
        share = None if saved is None else team.part(own, p, saved)
        if saved is None or share is None or share.shape != p.shape:
            came = "nothing" if saved is None else str(tuple(saved.shape))
            raise ValueError(f"{out} holds another model: {name} is {tuple(p.shape)} here and {came} there")
        with torch.no_grad():
            p.copy_(share)
        state = {key.split("/", 1)[0]: t for key, t in tensors.items() if key.split("/", 1)[1] == name}
        for kind in ("weight", "mask", "union", "carried", "buffer"):
            state.pop(kind, None)
        if state:
            optimizer.state[p] = {k: t if k == "step" else team.part(own, p, t).to(p.device) for k, t in state.items()}
    for name, t in carried.items():
        saved = tensors.get(name)
        if saved is None and name.startswith("buffer/"):
            continue  # a checkpoint from before they were kept
        if saved is None or saved.shape != t.shape:
            came = "nothing" if saved is None else str(tuple(saved.shape))
            raise ValueError(f"{out} holds another run: {name} is {tuple(t.shape)} here and {came} there")
        with torch.no_grad():
            t.copy_(saved)
    if moving is not None:
        kept = [{n: tensors[f"{kind}/{team.name(n)}"] for n in moving.masked} for kind in ("mask", "union")]
        moving.restore(kept[0], kept[1], len(meta["losses"]))
    return [float(loss) for loss in meta["losses"]]
