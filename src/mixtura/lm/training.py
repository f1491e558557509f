"""Training a language model of experts: next-token loss, and the losses that keep its gates honest.

Shapes: B rows, L positions, T = B·L tokens, E experts, K chosen.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mixtura.core.balance import balance_loss, device_split, router_z_loss
from mixtura.core.gates import top_k
from mixtura.core.measure import bfloat16_over_float32
from mixtura.core.shared_batch import SharedBatch
from mixtura.core.sparse_layers import masked_parameters
from mixtura.core.sparse_training import MaskConfig
from mixtura.core.training import History, TrainConfig, fit
from mixtura.lm.anatomy import find_moe, recorded_routing
from mixtura.lm.token_loss import next_token_loss
from mixtura.lm.tokens import blocks, mixed_batch_at

if TYPE_CHECKING:
    from mixtura.lm.parallel.training import ExpertParallel

__all__ = ["Trainable", "language_loss", "select_trainable", "train"]

Trainable = Literal["all", "experts", "router"]
TRAINABLE: tuple[Trainable, ...] = ("all", "experts", "router")


def train(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    steps: int,
    batch_size: int = 4,
    length: int = 256,
    lr: float = 2e-4,
    shares: Mapping[str, float] | None = None,
    trainable: Trainable = "all",
    layers: Sequence[int] | None = None,
    balance: float = 0.01,
    z: float = 0.001,
    weight_decay: float = 0.1,
    masks: Literal["rigl", "set", "static"] | None = None,
    checkpoint_every: int = 0,
    out: Path | None = None,
    resume: bool = True,
    seed: int = 0,
    label: str = "train",
    team: "ExpertParallel | None" = None,
) -> History:
    """Train a causal language model on text, in place; its gates are balanced where it has any.

    Args:
        model: a dense model or a mixture of experts, in float32 (smaller types lose small updates).
        tokenizer: its tokenizer.
        texts: documents, or domain -> documents.
        steps, batch_size, length: optimizer steps, rows a step and tokens a row.
        lr: peak learning rate (warm-up over a tenth of the steps, then cosine to a tenth).
        shares: domain -> share of the rows; equal by default.
        trainable: ``"all"``, ``"experts"`` (experts and gates) or ``"router"`` (gates alone).
        layers: train experts of these layers only; gates train in every layer.
        balance, z: weights of the load-balance and the router z-loss, averaged over layers.
        weight_decay: of AdamW.
        masks: how the masks of a sparse model move, forty times in three quarters of the steps; ``None``: ``"rigl"`` for one.
        checkpoint_every, out, resume: see :func:`mixtura.core.training.fit`.
        seed: order of the rows.
        label: name on the progress bar.
        team: processes over which the model is spread, each of which calls this with the same model and texts; afterwards each
            holds its part, and :meth:`~mixtura.lm.parallel.training.ExpertParallel.state` brings them together.
    Returns:
        The losses, one a step.
    Raises:
        TypeError: the weights are not float32.
        ValueError: too little text, unknown shares, nothing to train, a weight below 0, ``masks`` for a model without any or over
            processes, fewer rows than processes, processes with other data or another model than the first, or a checkpoint in
            ``out`` of a run with other settings.
        NonFiniteLoss: the loss became NaN; the weights are those before the step.
    """
    if wrong := sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {"torch.float32"}):
        raise TypeError(
            f"model must be in float32 to be trained, got {', '.join(wrong)}; load it with dtype=torch.float32"
        )
    for name, weight in (("balance", balance), ("z", z)):
        if not weight >= 0:
            raise ValueError(f"{name} must be >= 0 (0 leaves it out), got {weight}")
    domains = texts if isinstance(texts, Mapping) else {"text": texts}
    limit = max(64, 4 * steps * batch_size)
    sources = {name: blocks(tokenizer, part, length, limit=limit) for name, part in domains.items()}
    shares = dict.fromkeys(sources, 1.0) if shares is None else shares
    device = next(model.parameters()).device
    moe = find_moe(model)
    config = TrainConfig(steps=steps, lr=lr, weight_decay=weight_decay, checkpoint_every=checkpoint_every, seed=seed)
    quick = device.type == "cuda" or bfloat16_over_float32() > 1.3
    shared = None
    if team is not None:
        shared, quick = team.shared, bool(team.first(int(quick)))  # a measured speed differs from process to process
        first = [mixed_batch_at(sources, shares, step, batch_size, seed=seed) for step in range(3)]
        team.rows(first[0])
        team.agree("the data", *first, *sources.values())
        team.agree("the model", *model.state_dict().values())

    def loss_at(step: int) -> Tensor:
        rows = mixed_batch_at(sources, shares, step, batch_size, seed=seed)
        ids = (rows if team is None else team.rows(rows)).to(device)
        mixed = torch.autocast(device.type, torch.bfloat16) if quick else contextlib.nullcontext()
        with mixed:
            return language_loss(model, ids, balance=balance if moe else 0.0, z=z if moe else 0.0, shared=shared)

    facts: dict[str, Any] = {name: [len(rows), int(rows.sum() % 2**31)] for name, rows in sources.items()}
    facts["batch_size"] = batch_size
    chosen = {"trainable": trainable, "layers": layers and list(layers), "balance": balance, "z": z}
    usual = {"trainable": "all", "layers": None, "balance": 0.01, "z": 0.001}
    # Only what is not usual, so that a run from before they were compared goes on.
    facts |= {name: value for name, value in chosen.items() if value != usual[name]}
    with select_trainable(model, trainable, layers=layers):
        moving = _moving(model, masks, steps, seed)
        if team is not None:
            if moving is not None:
                raise ValueError("a sparse model trains in one process; leave parallel out")
            team.prepare(model)
        return fit(model, loss_at, config, out=out, resume=resume, label=label, describe=facts, masks=moving, team=team)


def _moving(
    model: nn.Module, masks: Literal["rigl", "set", "static"] | None, steps: int, seed: int
) -> MaskConfig | None:
    if not any(found.parameter.requires_grad for found in masked_parameters(model).values()):
        if masks is not None:
            raise ValueError(
                f"masks={masks!r} is for a sparse model, and {type(model).__name__} trains no masked weight"
            )
        return None
    every = max(1, round(0.75 * steps / 40))
    n, m = getattr(getattr(getattr(model, "config", None), "quantization_config", None), "n_m", (0, 0))
    return MaskConfig(method="static" if steps <= every else masks or "rigl", every=every, n_m=(n, m), seed=seed)


def language_loss(
    model: Any, ids: Tensor, *, balance: float = 0.0, z: float = 0.0, shared: SharedBatch | None = None
) -> Tensor:
    """Next-token loss in nats a token, plus the balancing losses of every mixture layer, averaged over layers.

    Args:
        model: a causal language model.
        ids: token ids, shape (B, L).
        balance: weight of the load-balance loss (Switch Transformers, 2101.03961, eq. 4).
        z: weight of the router z-loss (ST-MoE, 2202.08906, eq. 5).
        shared: processes that hold the other rows of the batch; every loss is then that of all rows.

    A `MixturaConfig` also says whether balance is asked of the batch or of each sequence, and between which devices.
    """
    config: Any = getattr(model, "config", None)
    device = getattr(config, "device_balance_coef", 0.0) if balance else 0.0
    if balance == 0 and z == 0:
        return _next_token(model, ids, shared)
    with recorded_routing(model) as routings:
        loss = _next_token(model, ids, shared)
    for routing in routings.values():
        logits = routing.logits if routing.logits.dtype == torch.float64 else routing.logits.float()
        if balance:
            # What the gate wanted: a pair over an expert's capacity counts for that expert.
            chosen = top_k(routing.logits, routing.indices.shape[-1]).indices if routing.dropped else routing.indices
            even = balance_loss(
                logits.softmax(-1).unflatten(0, ids.shape),
                chosen.unflatten(0, ids.shape),
                expert=balance,
                device=device,
                groups=device_split(routing.n_experts, config.device_groups) if device else None,
                per=getattr(config, "balance_per", "batch"),
                shared=shared,
            )
            loss = loss + even / len(routings)
        if z and getattr(config, "router", "linear") == "linear":
            loss = loss + z / len(routings) * router_z_loss(logits, shared=shared)
    return loss


def _next_token(model: Any, ids: Tensor, shared: SharedBatch | None) -> Tensor:
    return next_token_loss(model(input_ids=ids, use_cache=False).logits, ids, shared=shared)


@contextlib.contextmanager
def select_trainable(model: nn.Module, trainable: Trainable, *, layers: Sequence[int] | None = None) -> Any:
    """Let only a part of the model learn, inside the block; every flag is put back afterwards.

    Args:
        model: any model; ``"experts"`` and ``"router"`` need mixture layers.
        trainable: see :func:`train`.
        layers: indices of the mixture layers, in order of depth, whose experts learn; gates learn in all of them.
    Raises:
        ValueError: an unknown name, a layer that does not exist, or a dense model asked for its experts.
    """
    if trainable not in TRAINABLE:
        raise ValueError(f"trainable must be one of {list(TRAINABLE)}, got {trainable!r}")
    if trainable == "all" and layers is None:
        yield
        return
    moe = find_moe(model)
    if not moe:
        raise ValueError(f"trainable={trainable!r} needs mixture layers, and {type(model).__name__} has none")
    if layers is not None and (bad := [i for i in layers if not 0 <= i < len(moe)]):
        raise ValueError(f"layers must lie in 0..{len(moe) - 1}, got {bad}")
    learning = {id(p) for block in moe for p in block.gate.parameters()}
    if trainable != "router":
        for i, block in enumerate(moe):
            if layers is None or i in layers:
                learning |= {id(p) for part in block.parts for p in part.parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for p in model.parameters():
            p.requires_grad_(id(p) in learning)
        yield
    finally:
        for name, p in model.named_parameters():
            if name in flags:  # of what a team spread over processes, parts have names of their own
                p.requires_grad_(flags[name])
