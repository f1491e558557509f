"""How much the loss of the whole model moves when one output channel of one matrix is quantized, and who gets more bits.

A channel c is a row of a weight; c_q is its quantized version. To second order, with the empirical Fisher matrix of the
whole row as Hessian, the loss of sample d moves by a_d + a_d^2 / 2 where a_d = g_d . (c_q - c) and g_d is the gradient of
that sample. The salience is the mean over samples of its absolute value, one number for every row, in nats:

    S_c = (1/N) sum_d | a_d + a_d^2 / 2 |

g_d itself is never stored: with inputs X and output gradients dY of a sample, a_d of all rows is the sum over its tokens of
dY * (X (W_q - W)^T), taken where the gradient passes.

Shapes: N samples, B samples of a batch, T tokens of a batch, O rows of a matrix, I its width, E experts.
Source: MixLLM (2412.14590), sec. 3.1, eq. 1-4. The absolute value stands inside the sum, as in eq. 4.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.core.progress import progress
from mixtura.core.quantize import nearest
from mixtura.lm.anatomy import MoEBlock, find_moe, replaced_experts
from mixtura.lm.compress.layers import decoder_layers, other_linears
from mixtura.lm.compress.packed import group_size_for
from mixtura.lm.compress.packed_experts import PackedExperts, why_not

__all__ = ["allocate", "channel_matrices", "channel_salience", "sample_losses"]

Batch = Tensor | Mapping[str, Tensor]
Record = Callable[[str, int, Tensor, Tensor, Tensor], None]


def channel_matrices(model: nn.Module, *, skip: Sequence[str] = ("lm_head",)) -> dict[str, Tensor]:
    """Matrices whose rows share one budget: name -> weight, shape (O, I), views of the model's own.

    Linear layers of the decoder layers go by the path of the module. Stacked experts go by the path of their parameter,
    ``"....experts.gate_up_proj"`` (E · 2H rows, gate before up in each expert) and ``"....experts.down_proj"``. Embeddings,
    head, norms, gates and what is packed already are left out. A weight that two layers share stands once.

    Args:
        model: any decoder; on the meta device too.
        skip: endings of names that are left out besides.
    """
    found: dict[str, Tensor] = {}
    for path, layer in decoder_layers(model):
        for name, linear in other_linears(layer).items():
            found[f"{path}.{name}"] = linear.weight
    for block in find_moe(model):
        if why_not(block.experts) is None:
            for part in ("gate_up_proj", "down_proj"):
                found[f"{block.experts_name}.{part}"] = getattr(block.experts, part).flatten(0, 1)
    once: dict[int, str] = {}
    for name, weight in found.items():
        once.setdefault(weight.data_ptr() if not weight.is_meta else id(weight), name)
    kept = set(once.values())
    return {n: w for n, w in found.items() if n in kept and not n.endswith(tuple(skip))}


def channel_salience(
    model: Any,
    batches: Tensor | Iterable[Batch],
    *,
    bits: int = 4,
    group_size: int = 128,
    first_order: bool = True,
    fisher: Literal["channel", "diagonal"] = "channel",
    targets: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Change of the loss by quantizing each row alone, name of the matrix -> float32 (O,), >= 0, in nats.

    One backward pass a sample, in which no gradient of a weight is formed. Under ``torch.distributed`` every process gives
    its own samples and all get the mean.

    Args:
        model: a causal language model in float, in any placement over devices.
        batches: token ids (N, L), or batches of them, or of dictionaries with ``input_ids`` and ``attention_mask``. A row is
            a sample: gradients of different rows never meet before the square.
        bits: width whose rounding (to nearest, asymmetric) is judged.
        group_size: largest group; every width takes its largest divisor up to it that is a multiple of 16.
        first_order: keep the term a_d. Without it the square is left.
        fisher: ``"channel"`` as in the paper; ``"diagonal"`` sums |g δ + (g δ)^2 / 2| weight by weight, for comparison.
        targets: names, or their endings, of the matrices to judge; all of :func:`channel_matrices` by default.
    Raises:
        ValueError: no batch, samples of one token, a target that matches nothing, a width without a usable group (the layer is
            named), a gradient that is not finite (layer and sample are named).
        TypeError: a model whose output has no logits.
    """
    if fisher not in ("channel", "diagonal"):
        raise ValueError(f"fisher must be 'channel' or 'diagonal', got {fisher!r}")
    matrices = _chosen(channel_matrices(model), targets)
    groups = group_sizes(matrices, group_size)
    device = next(model.parameters()).device
    total = {name: torch.zeros(len(weight), device=weight.device) for name, weight in matrices.items()}
    moved: dict[str, Tensor] = {}
    batch_rows = [0]

    def record(name: str, first: int, x: Tensor, y: Tensor, samples: Tensor) -> None:
        if name not in matrices:
            return
        rows = slice(first, first + y.shape[-1])

        def taken(grad: Tensor) -> None:
            weight = matrices[name][rows].detach().float()
            delta_OI = nearest(weight, bits, groups[name]).dequantize() - weight
            found = _moved(
                grad.flatten(0, -2).float(), x.float(), delta_OI, samples, batch_rows[0], first_order, fisher
            )
            if name not in moved:
                moved[name] = torch.zeros(batch_rows[0], len(total[name]), device=total[name].device)
            moved[name][:, rows] += found

        y.register_hook(taken)

    done = 0
    with _only_activations(model), recorded_products(model, record, lambda: batch_rows[0]):
        for batch in progress(_samples(batches), desc="salience", unit="batch"):
            batch_rows[0] = len(batch["input_ids"])
            sample_losses(model, {k: v.to(device) for k, v in batch.items()}).sum().backward()
            for name, found in moved.items():
                _check_finite(name, found, done)
                total[name] += found.sum(0) if fisher == "diagonal" else _judged(found, first_order).sum(0)
            moved.clear()
            done += batch_rows[0]
    return {name: _shared(value / done).cpu() for name, value in total.items()}


def allocate(
    salience: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    share: float,
    *,
    budget: Literal["parameters", "channels"] = "parameters",
    scope: Literal["global", "layer", "random"] = "global",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Which rows get the larger width, name -> bool (O,).

    Rows are taken in descending order until the budget is spent; at most one row of it is left. With a share for each matrix
    the number of its rows is rounded to the nearest, so that small matrices do not add up to fewer bits.

    Args:
        salience: what :func:`channel_salience` gave.
        shapes: (O, I) of every matrix.
        share: of the budget, in [0, 1].
        budget: ``"parameters"``: the share is one of all weights, and rows are ordered by salience a weight;
            ``"channels"``: it is one of all rows, ordered by salience, as in the paper. Rows differ in length, so 10 % of the
            rows are not 10 % of the bits.
        scope: ``"global"``: one list over all matrices; ``"layer"``: the same share in each; ``"random"``: by chance. The last
            two are baselines.
        generator: of ``"random"``.
    Raises:
        ValueError: a share outside [0, 1], an unknown budget or scope, a shape that does not fit its salience.
    Example:
        >>> found = allocate({"a": torch.tensor([1.0, 9.0]), "b": torch.tensor([8.0, 2.0])}, {"a": (2, 4), "b": (2, 4)}, 0.5)
        >>> found["a"].tolist(), found["b"].tolist()
        ([False, True], [True, False])
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share:g}")
    if budget not in ("parameters", "channels"):
        raise ValueError(f"budget must be 'parameters' or 'channels', got {budget!r}")
    if scope not in ("global", "layer", "random"):
        raise ValueError(f"scope must be 'global', 'layer' or 'random', got {scope!r}")
    for name, values in salience.items():
        if name not in shapes or shapes[name][0] != len(values):
            raise ValueError(f"{name} has {len(values)} rows in salience and the shape {shapes.get(name)} in shapes")
    names = list(salience)
    costs = {n: torch.full((shapes[n][0],), shapes[n][1] if budget == "parameters" else 1.0).double() for n in names}
    if scope == "layer":
        counts = {n: round(share * len(salience[n])) for n in names}
        return {n: _taken(salience[n].double().cpu(), torch.ones(len(costs[n])), counts[n]) for n in names}
    cost = torch.cat([costs[n] for n in names])
    if scope == "random":
        score = torch.rand(len(cost), generator=generator, dtype=torch.float64)
    else:
        score = torch.cat([salience[n].double().cpu() for n in names]) / cost
    parts = _taken(score, cost, share * float(cost.sum()) * (1 + 1e-12)).split([len(salience[n]) for n in names])
    return dict(zip(names, parts, strict=True))


def group_sizes(matrices: Mapping[str, Tensor], wanted: int) -> dict[str, int]:
    """Group size of every matrix.

    Raises:
        ValueError: a width that no group divides; the matrix is named.
    """
    found = {}
    for name, weight in matrices.items():
        try:
            found[name] = group_size_for(weight.shape[1], wanted)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return found


def sample_losses(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of a predicted token for every row, in nats, shape (B,)."""
    output = model(**batch, use_cache=False)
    if not isinstance(getattr(output, "logits", None), Tensor):
        raise TypeError(
            f"{type(model).__name__} gives no logits, so it has no loss to protect; use a causal language model"
        )
    ids = batch["input_ids"]
    # Row by row: a whole batch of logits in float32 would stand in memory twice.
    losses = [
        F.cross_entropy(row[:-1].float(), target[1:].to(row.device), reduction="none")
        for row, target in zip(output.logits, ids, strict=True)
    ]
    loss_BL = torch.stack(losses)
    mask = batch.get("attention_mask")
    if mask is None:
        return loss_BL.mean(1)
    kept = mask[:, 1:].to(loss_BL)
    return (loss_BL * kept).sum(1) / kept.sum(1).clamp(min=1)


def _moved(grad: Tensor, x: Tensor, delta: Tensor, samples: Tensor, n: int, first_order: bool, fisher: str) -> Tensor:
    """a_d of some rows for every sample of a batch, (B, O); for the diagonal the sum over weights of their own terms."""
    if fisher == "channel":
        found = torch.zeros(n, len(delta), device=grad.device)
        return found.index_add_(0, samples, grad * (x @ delta.T))
    parts = []
    for d in range(n):
        mine = samples == d
        parts.append(_judged((grad[mine].T @ x[mine]) * delta, first_order).sum(1))
    return torch.stack(parts)


def _judged(moved: Tensor, first_order: bool) -> Tensor:
    return (moved + moved.square() / 2).abs() if first_order else moved.square() / 2


def _taken(score: Tensor, cost: Tensor, budget: float) -> Tensor:
    order = score.argsort(descending=True, stable=True)
    within = cost[order].cumsum(0) <= budget
    return torch.zeros(len(cost), dtype=torch.bool).scatter_(0, order, within)


def _chosen(matrices: dict[str, Tensor], targets: Sequence[str] | None) -> dict[str, Tensor]:
    if targets is None:
        if not matrices:
            raise ValueError("the model has no linear layer in float whose rows could be judged")
        return matrices
    for target in targets:
        if not any(name.endswith(target) for name in matrices):
            raise ValueError(f"targets names {target!r}, which matches none of {_some(matrices)}")
    return {name: weight for name, weight in matrices.items() if name.endswith(tuple(targets))}


def _some(names: Iterable[str], most: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _samples(batches: Tensor | Iterable[Batch]) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = []
    parts = batches.split(1) if isinstance(batches, Tensor) else batches
    for batch in parts:
        one = {"input_ids": batch} if isinstance(batch, Tensor) else {k: v for k, v in batch.items() if k != "labels"}
        ids = one["input_ids"]
        if ids.dim() != 2 or ids.shape[1] < 2:
            raise ValueError(
                f"a calibration batch must hold ids of shape (B, L) with L >= 2, since each token is predicted from those "
                f"before it; got {tuple(ids.shape)}"
            )
        found.append(one)
    if not found or not sum(len(batch["input_ids"]) for batch in found):
        raise ValueError("no calibration batch was given")
    return found


def _check_finite(name: str, found: Tensor, done: int) -> None:
    bad = (~found.isfinite()).any(1)
    if bool(bad.any()):
        raise ValueError(
            f"the gradient of {name} on sample {done + int(bad.nonzero()[0])} is not finite; compute in float32 or bfloat16, "
            "and check the weights and that sample"
        )


def _shared(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value


@contextmanager
def _only_activations(model: Any) -> Iterator[None]:
    """Gradients reach activations and no weight; the model is in evaluation mode. Both are put back."""
    mode, wanted = model.training, [(p, p.requires_grad) for p in model.parameters()]
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
    try:
        model.eval()
        for p, _ in wanted:
            p.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        model.train(mode)
        for p, before in wanted:
            p.requires_grad_(before)


@contextmanager
def recorded_products(model: nn.Module, record: Record, n_samples: Callable[[], int]) -> Iterator[None]:
    """Call ``record(name, first row, x (T, I), y (..., O), sample of each token (T,))`` for every product inside the block."""
    with ExitStack() as stack:
        for path, layer in decoder_layers(model):
            for name, linear in other_linears(layer).items():
                hook = linear.register_forward_hook(_after_linear(f"{path}.{name}", record, n_samples))
                stack.callback(hook.remove)
        for block in find_moe(model):
            if isinstance(block.experts, PackedExperts) or why_not(block.experts) is None:
                stack.enter_context(_watched_experts(block, record, n_samples))
        yield


def _after_linear(name: str, record: Record, n_samples: Callable[[], int]) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if not out.requires_grad:
            return
        x_TI = args[0].detach().reshape(-1, args[0].shape[-1])
        samples_T = torch.arange(len(x_TI), device=x_TI.device) // (len(x_TI) // n_samples())
        record(name, 0, x_TI, out, samples_T)

    return hook


@contextmanager
def _watched_experts(block: MoEBlock, record: Record, n_samples: Callable[[], int]) -> Iterator[None]:
    """Let a block's experts compute one after another, each product recorded; packed ones with their values, in float."""
    experts: Any = block.experts

    def weights(e: int) -> tuple[Tensor, Tensor]:
        if isinstance(experts, PackedExperts):
            return experts.up.dequantize(e), experts.down.dequantize(e)
        return experts.gate_up_proj[e], experts.down_proj[e]

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out_TD = torch.zeros_like(hidden_states)
        each = len(hidden_states) // n_samples()
        for e in top_k_index.unique().tolist():
            if e >= block.n_experts:
                continue
            tokens, slots = (top_k_index == e).nonzero(as_tuple=True)
            up_OI, down_OI = (w.to(hidden_states.dtype) for w in weights(e))
            x = hidden_states[tokens]
            both = F.linear(x, up_OI)
            gate, up = both.chunk(2, dim=-1)
            inner = experts.act_fn(gate) * up
            y = F.linear(inner, down_OI)
            if both.requires_grad:
                record(f"{block.experts_name}.gate_up_proj", e * len(up_OI), x.detach(), both, tokens // each)
                record(f"{block.experts_name}.down_proj", e * len(down_OI), inner.detach(), y, tokens // each)
            out_TD = out_TD.index_add(0, tokens, y * top_k_weights[tokens, slots, None].to(y.dtype))
        return out_TD

    with replaced_experts(block, forward):
        yield
