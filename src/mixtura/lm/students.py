"""Mixture of students: a shallower mixture learns from a deeper one, and from the labels alone towards the end.

A student of equal widths and fewer layers has little capacity to spare. Imitating the teacher helps it at first; near the end
it would trade its language-model loss for imitation. So the teacher is switched off at a share of the steps, at once, and the
schedule of the learning rate goes on as if nothing had happened.

    loss = CE(labels) + aux + beta tau^2 mean_t KL(softmax(z_T / tau) || softmax(z_S / tau))     until the stop
    loss = CE(labels) + aux                                                                      from there on

Shapes: B batch, L positions, V vocabulary.
Source: DeepSpeed-MoE (2201.05596), sec. 4.2.
"""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mixtura.core.balance import load_balance_loss
from mixtura.core.gates import top_k
from mixtura.core.training import TrainConfig, fit
from mixtura.lm.anatomy import find_moe, recorded_routing

__all__ = ["StagedDistillation", "TrainReport", "distill", "kept_layers", "student_config", "student_of"]

log = logging.getLogger(__name__)

BY_LAYER = ("layer_types", "mlp_layer_types")  # lists of transformers' configs with one entry a layer
OF_LAYERS = ("dense_layers", "mlp_only_layers", "no_rope_layers")  # lists of the indices of some layers


class StagedDistillation(nn.Module):
    """Loss of a student: labels, balance and, up to a share of the training, the teacher.

    Args:
        stop: share of the steps at which the teacher is switched off; 0 never asks it, 1 asks it to the end.
        beta: factor of the imitation; 0 never asks the teacher.
        tau: temperature of both softmaxes, > 0.
    Raises:
        ValueError: the argument is named.
    Source:
        DeepSpeed-MoE (2201.05596), sec. 4.2.1; 400K of about 572K steps are the 0.7.
    Example:
        >>> loss = StagedDistillation()
        >>> logits, labels = torch.zeros(1, 2, 4), torch.tensor([[1, 3]])
        >>> teacher = torch.tensor([[[0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]]])
        >>> bool(loss(logits, teacher, labels, progress=0.5) > loss(logits, None, labels, progress=0.7))
        True
    """

    def __init__(self, stop: float = 0.7, beta: float = 1.0, tau: float = 1.0) -> None:
        super().__init__()
        if not 0 <= stop <= 1:
            raise ValueError(f"stop is a share of the steps and must be between 0 and 1, got {stop}")
        if beta < 0:
            raise ValueError(f"beta must be >= 0, got {beta}")
        if not tau > 0:
            raise ValueError(f"tau must be > 0, got {tau}")
        self.stop, self.beta, self.tau = stop, beta, tau

    def active(self, progress: float) -> bool:
        """Whether the teacher is asked at this share of the training, in [0, 1)."""
        return self.beta > 0 and progress < self.stop

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        aux: Tensor | float = 0.0,
        progress: float = 0.0,
    ) -> Tensor:
        """Scalar loss, in nats a token.

        Args:
            student_logits: shape (..., V); position i predicts ``labels[i]``.
            teacher_logits: the same shape; None where the teacher is not asked (:meth:`active`).
            labels: shape (...), -100 where no loss is wanted.
            aux: balance losses of the student, factors applied.
            progress: share of the training behind this step.
        Raises:
            ValueError: no teacher's logits where they are asked for, or another vocabulary or shape.
        """
        flat, wanted = student_logits.flatten(0, -2).float(), labels.flatten()
        loss = F.cross_entropy(flat, wanted) + aux
        if not self.active(progress):
            return loss
        if teacher_logits is None:
            raise ValueError(f"teacher_logits are needed before stop={self.stop}, got none at progress={progress}")
        if teacher_logits.shape != student_logits.shape:
            raise ValueError(
                f"teacher_logits must have the student's shape {tuple(student_logits.shape)}, "
                f"got {tuple(teacher_logits.shape)}"
            )
        known = wanted != -100
        return loss + self.beta * self._imitation(flat[known], teacher_logits.flatten(0, -2).float()[known])

    def _imitation(self, student: Tensor, teacher: Tensor) -> Tensor:
        """tau^2 times the divergence summed over the vocabulary, mean over tokens; the gradient reaches the student only."""
        log_s, log_t = (student / self.tau).log_softmax(-1), (teacher.detach() / self.tau).log_softmax(-1)
        divergence = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
        return self.tau**2 * divergence.mean()

    def extra_repr(self) -> str:
        return f"stop={self.stop}, beta={self.beta}, tau={self.tau}"


@dataclass
class TrainReport:
    """What a distillation left behind.

    Attributes:
        losses: one a step, those before a resumption included.
        resumed_at: step that it went on from; 0 if it did not.
        teacher_calls: forward passes of the teacher, in this run.
    """

    losses: list[float] = field(default_factory=list)
    resumed_at: int = 0
    teacher_calls: int = 0


def student_of(
    teacher: PreTrainedModel,
    *,
    keep_layers: int | Sequence[int],
    init: Literal["random", "teacher"] = "random",
    generator: torch.Generator | None = None,
) -> PreTrainedModel:
    """A model of the teacher's class and widths with fewer layers.

    Args:
        teacher: a causal language model of transformers whose layers are ``model.layers``.
        keep_layers: how many layers, or which ones. With a number the pattern of dense layers and layers with experts is that of
            the teacher's first ones, and of the numbers of experts the *early* entries are lost (the paper's students).
        init: ``"random"`` (the paper), or ``"teacher"``: copies of the layers kept.
        generator: draws the weights; None takes torch's own stream.
    Returns:
        The student, in the teacher's dtype and on its device, in training mode.
    Raises:
        ValueError: not fewer layers than the teacher has, or indices that are out of order or range.
    """
    kept = kept_layers(teacher.config, keep_layers)
    config = student_config(teacher.config, kept)
    if init not in ("random", "teacher"):
        raise ValueError(f"init must be one of ['random', 'teacher'], got {init!r}")
    with torch.random.fork_rng(enabled=generator is not None):
        if generator is not None:
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        student = type(teacher)(config)
    student.to(device=teacher.device, dtype=teacher.dtype)
    if init == "teacher":
        own = teacher.state_dict()
        with torch.no_grad():
            for name, tensor in student.state_dict().items():
                tensor.copy_(own[_of_teacher(name, kept)])
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train()


def kept_layers(config: Any, keep: int | Sequence[int]) -> list[int]:
    """Which layers of the teacher the student's layers are, from a number or as they are given; see :func:`student_of`.

    Raises:
        ValueError: not fewer layers than the teacher has, or indices that are out of order or range.
    """
    layers = config.num_hidden_layers
    if not isinstance(keep, int):
        kept = list(keep)
        if not kept or len(kept) >= layers or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= layers:
            raise ValueError(
                f"keep_layers must be fewer than the teacher's {layers} layers, ascending, each in 0..{layers - 1}, got {kept}"
            )
        return kept
    if not 1 <= keep < layers:
        raise ValueError(
            f"keep_layers must be between 1 and {layers - 1} (the teacher has {layers} layers), got {keep}"
        )
    sparse = getattr(config, "sparse", lambda layer: False)
    kinds: dict[bool, list[int]] = {
        kind: [i for i in range(layers) if bool(sparse(i)) is kind] for kind in (False, True)
    }
    pattern = [bool(sparse(i)) for i in range(keep)]
    # Of each kind the last layers: a pyramid loses its early, narrow entries.
    rest = {kind: iter(kinds[kind][len(kinds[kind]) - pattern.count(kind) :]) for kind in kinds}
    return [next(rest[kind]) for kind in pattern]


def student_config(teacher: Any, kept: Sequence[int]) -> Any:
    """The teacher's config with these of its layers, in this order; see :func:`student_of`.

    Raises:
        ValueError: fields that the remaining layers cannot have; the message is the config's.
    """
    fields = copy.deepcopy(teacher).to_dict()
    for derived in ("model_type", "transformers_version", "architectures"):
        fields.pop(derived, None)
    fields["num_hidden_layers"] = len(kept)
    for name in BY_LAYER:
        if isinstance(fields.get(name), list):
            fields[name] = [fields[name][i] for i in kept]
    for name in OF_LAYERS:
        if fields.get(name):
            fields[name] = [i for i, layer in enumerate(kept) if layer in fields[name]]
    if isinstance(fields.get("num_experts"), list):
        fields["num_experts"] = [fields["num_experts"][i] for i in kept]
    return type(teacher)(**fields)


def distill(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    batches: Callable[[int], Tensor],
    *,
    steps: int,
    schedule: StagedDistillation | None = None,
    lr: float = 3e-4,
    balance: float = 0.01,
    weight_decay: float = 0.1,
    checkpoint_every: int = 0,
    out: Path | None = None,
    resume: bool = True,
    describe: Mapping[str, Any] | None = None,
    seed: int = 0,
    label: str = "distill",
) -> TrainReport:
    """Train a student, in place, on the labels and, up to ``schedule.stop``, on its teacher.

    The teacher reads the same tokens, in evaluation mode (so that it drops nothing that it would not drop in use) and without
    gradients. It is not called any more from the stop on.

    Args:
        teacher, student: causal language models of one vocabulary, on one device; the student in float32.
        batches: step -> token ids, shape (B, L). Depends on the step alone, so that a resumed run goes on where it was.
        steps: optimizer steps.
        schedule: the loss; default :class:`StagedDistillation`.
        lr: peak learning rate; warm-up over a tenth of the steps, then cosine, not restarted at the stop.
        balance: factor of the load-balance loss, summed over the student's layers with experts.
        weight_decay: of AdamW.
        checkpoint_every, out, resume: see :func:`mixtura.core.training.fit`; a schedule is resumed only by the same one.
        describe: facts about the data that must agree between a checkpoint and the run that resumes it.
        seed: of what chance enters a step.
        label: name on the progress bar.
    Raises:
        TypeError: the student's weights are not float32.
        ValueError: vocabularies differ, router logits that are not finite (the layer is named), or a checkpoint of another run.
        NonFiniteLoss: the loss became NaN; the weights are those before the step.
    """
    if wrong := sorted({str(p.dtype) for p in student.parameters() if p.is_floating_point()} - {"torch.float32"}):
        raise TypeError(
            f"student must be in float32 to be trained, got {', '.join(wrong)}; load it with dtype=torch.float32"
        )
    if teacher.config.vocab_size != student.config.vocab_size:
        raise ValueError(
            f"teacher and student must share one vocabulary, got {teacher.config.vocab_size} and "
            f"{student.config.vocab_size} tokens"
        )
    schedule = StagedDistillation() if schedule is None else schedule
    report = TrainReport()
    moe, device = find_moe(student), student.device

    def loss_at(step: int) -> Tensor:
        ids, progress = batches(step).to(device), step / steps
        aux: Tensor | float = 0.0
        if moe:
            with recorded_routing(moe) as routings:
                logits = student(input_ids=ids, use_cache=False).logits[:, :-1]
            aux = _balance(routings, balance)
        else:
            logits = student(input_ids=ids, use_cache=False).logits[:, :-1]
        told = None
        if schedule.active(progress):
            report.teacher_calls += 1
            with torch.no_grad():
                told = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        return schedule(logits, told, ids[:, 1:], aux, progress)

    facts = {"stop": schedule.stop, "beta": schedule.beta, "tau": schedule.tau, "balance": balance, **(describe or {})}
    config = TrainConfig(steps=steps, lr=lr, weight_decay=weight_decay, checkpoint_every=checkpoint_every, seed=seed)
    mode = teacher.training
    teacher.eval()
    try:
        history = fit(student, loss_at, config, out=out, resume=resume, label=label, describe=facts)
    finally:
        teacher.train(mode)
    report.losses, report.resumed_at = history.losses, history.resumed_at
    return report


def _balance(routings: Mapping[str, Any], factor: float) -> Tensor:
    """Balance losses of all layers, of what the gates wanted before any token was dropped."""
    terms = []
    for name, routing in routings.items():
        if not bool(routing.logits.isfinite().all()):
            raise ValueError(f"router logits of {name} are not finite; lower the learning rate")
        k = routing.indices.shape[-1]
        chosen = top_k(routing.logits, k).indices if routing.dropped else routing.indices
        terms.append(load_balance_loss(routing.logits.float().softmax(-1), chosen))
    return factor * torch.stack(terms).sum()


def _of_teacher(name: str, kept: Sequence[int]) -> str:
    head, found, tail = name.partition("model.layers.")
    if not found:
        return name
    place, _, rest = tail.partition(".")
    return f"{head}{found}{kept[int(place)]}.{rest}"
