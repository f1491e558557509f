"""A dense model as a mixture of its own hidden units: no copies, no more parameters, fewer of them for each token.

A feed-forward part is the sum of what its hidden units write, y = sum_u a_u(x) down_u. Its units are cut into blocks: some are
shared and always on, the others become experts of which a token visits K. The experts' weight should be 1, as it was in the
sum. A softmax gate comes to that in one form:

    chosen by logits r_e x;  gates made to sum to 1 over the chosen, near 1/K each;  the experts' down projection times K

Gates are as near to 1/K as the logits are near to each other, and it does not matter for the choice how large they are: the
router's rows are scaled to a small ``spread``. With K = E there is nothing to choose, the rows are zero, and the mixture computes
the dense part, to rounding. (Gates that are left as they are and multiplied by E come to the same only with K = E; a softmax
with a spread of its own never does.)

Shapes: T tokens, D width, H hidden units, E experts, K experts a token visits.
Source: DeepSeekMoE (2401.06066), sec. 3.1-3.2, for the layer. Starting it from a dense model's own units is not in the paper;
MoEfication (2110.01786) does so with experts only.
"""

import copy
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from mixtura.core.progress import progress
from mixtura.lm.anatomy import run_layers
from mixtura.lm.families import Dense, build, native_family, read_dense
from mixtura.lm.families.dense import Source
from mixtura.lm.model import MixturaConfig
from mixtura.lm.upcycle.stack import Slices, feed_forward, is_expert, shared_feed_forward
from mixtura.lm.upcycle.unit_groups import unit_order

__all__ = ["block_norms", "fit_router", "from_dense", "half_active", "mixture_config"]

log = logging.getLogger(__name__)

RIDGE = 1e-2  # of the mean squared input; a few thousand tokens fix hundreds of directions only roughly
SPREAD = 0.1  # of the logits: gates of the chosen experts differ by about a tenth


def from_dense(
    model: PreTrainedModel | str | Path,
    *,
    split: int,
    active: int,
    shared: int,
    batches: Iterable[Tensor],
    spread: float = SPREAD,
    balance: float = 0.01,
    generator: torch.Generator | None = None,
) -> PreTrainedModel:
    """Turn a dense model into a mixture of shared and routed experts made of its own hidden units.

    The result has the dense model's parameters and the router's rows, and answers less well the fewer experts are active:
    measure it on text that it was not made with, and train it.

    Args:
        model: dense model, or a path or hub name. It is left as it is.
        split: blocks of equal size that the hidden units of each feed-forward part are cut into.
        active: routed blocks that a token visits, K, beside the shared ones. With all of them the result answers as the dense
            model, to rounding; with one, the gate is always 1 and the router learns from the balance losses alone.
        shared: blocks that are always on, made of the units with the largest mean |activation| |down column|.
        batches: token ids to measure activations on, each of shape (B, L) or (L,), without padding; a few thousand tokens. Their
            inputs to all feed-forward parts are held, T D values a layer.
        spread: standard deviation of the logits over the experts of a token, in nats.
        balance: factor of the load-balance loss.
        generator: draws the first centres of the groups; one of seed 0 if left out.
    Returns:
        A native transformers family where one has the structure (Qwen2-MoE, or Mixtral without shared experts), else a
        ``MixturaForCausalLM``; in evaluation mode.
    Raises:
        ValueError: ``split`` does not divide the hidden units, ``shared`` or ``active`` out of range, no tokens, or an input that
            is not finite (the layer is named); see also :func:`mixtura.lm.families.read_dense`.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
        >>> mixture = from_dense(
        ...     LlamaForCausalLM(tiny), split=8, active=3, shared=1, batches=torch.randint(64, (4, 32))
        ... )
        >>> mixture.config.num_experts, mixture.config.num_experts_per_tok, mixture.config.moe_intermediate_size
        (7, 3, 6)
    """
    dense = read_dense(model)
    ours = mixture_config(dense.config, split=split, active=active, shared=shared, balance=balance)
    if spread <= 0:
        raise ValueError(f"spread must be above 0, got {spread}")
    inputs = _inputs(dense, batches)
    for layer, x_TD in enumerate(inputs):
        if not bool(x_TD.isfinite().all()):
            raise ValueError(
                f"the input to the feed-forward part of layer {layer} is not finite; check the model's weights"
            )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    orders: list[Tensor] = []
    routers: list[Tensor] = []
    while inputs:
        layer = len(orders)
        x_TD = inputs.pop(0)
        activations_TH, down_DH = _activations(dense, layer, x_TD)
        order = unit_order(activations_TH, down_DH, split=split, shared=shared, generator=generator)
        norms_TE = block_norms(activations_TH[:, order], down_DH[:, order], split)[:, shared:]
        orders.append(order)
        if active == split - shared:
            routers.append(x_TD.new_zeros(active, x_TD.shape[1]))
        else:
            routers.append(fit_router(x_TD, norms_TE, spread=spread))

    def reordered(name: str) -> Tensor:
        value = dense.tensor(name)
        if ".mlp." not in name or name.endswith("down_proj.bias"):
            return value
        order = orders[int(name.split(".")[2])]
        return value[:, order] if name.endswith("down_proj.weight") else value[order]

    return build(
        ours,
        _mixture(dense, reordered, routers, split, shared, active),
        family=native_family(ours),
        generation_config=dense.generation_config,
    )


def half_active(split: int, shared: int) -> int:
    """Routed blocks that make half of all blocks active together with the shared ones; at least one."""
    return max(split // 2 - shared, 1)


def mixture_config(
    dense: MixturaConfig, *, split: int, active: int, shared: int, balance: float = 0.01
) -> MixturaConfig:
    """The dense decoder's config with its feed-forward parts cut into blocks.

    Raises:
        ValueError: the number that does not fit, with what would.
    """
    hidden = dense.intermediate_size
    if split < 2 or hidden % split:
        raise ValueError(f"split must be at least 2 and divide the {hidden} hidden units, got {split}")
    if not 0 <= shared < split:
        raise ValueError(
            f"shared must be between 0 and split - 1 = {split - 1} (one block has to be routed), got {shared}"
        )
    if not 1 <= active <= split - shared:
        raise ValueError(f"active must be between 1 and split - shared = {split - shared}, got {active}")
    ours = copy.deepcopy(dense)
    ours.num_experts, ours.num_experts_per_tok = split - shared, active
    ours.moe_intermediate_size = hidden // split
    ours.shared_expert_intermediate_size = shared * hidden // split
    ours.norm_topk_prob = True
    ours.router_aux_loss_coef, ours.router_z_loss_coef = balance, 0.0
    return ours


def block_norms(activations: Tensor, down: Tensor, blocks: int) -> Tensor:
    """Norm of what each block of hidden units writes, shape (T, blocks).

    Args:
        activations: shape (T, H), one block after another.
        down: shape (D, H).
    """
    parts = zip(activations.chunk(blocks, dim=1), down.chunk(blocks, dim=1), strict=True)
    return torch.stack([(a @ d.T).norm(dim=1) for a, d in parts], dim=1)


def fit_router(x: Tensor, norms: Tensor, *, spread: float) -> Tensor:
    """Rows whose products with a token are as near as possible to its blocks' norms, by least squares.

    A token's norms are taken relative to their mean: which of its own blocks are large is all that the choice is about.

    Args:
        x: inputs of the feed-forward part, shape (T, D).
        norms: shape (T, E).
        spread: standard deviation of the logits over the experts of a token.
    Returns:
        Shape (E, D).
    """
    targets_TE = norms / norms.mean(1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny) - 1
    gram_DD = x.T @ x
    gram_DD.diagonal().add_(RIDGE * gram_DD.diagonal().mean().clamp_min(torch.finfo(x.dtype).tiny))
    rows_ED = torch.linalg.solve(gram_DD, x.T @ targets_TE).T
    logits_TE = x @ rows_ED.T
    deviation = (logits_TE - logits_TE.mean(1, keepdim=True)).square().mean().sqrt()
    return rows_ED * (spread / deviation) if deviation > 0 else rows_ED


def _mixture(dense: Dense, reordered: Source, routers: list[Tensor], split: int, shared: int, active: int) -> Source:
    slices = Slices(segments=split, shared=shared, gain=active)

    def tensor(name: str) -> Tensor:
        if name.endswith(".mlp.gate.weight"):
            return routers[int(name.split(".")[2])].to(dense.dtype)
        if is_expert(name):
            return feed_forward(name, [reordered], slices)
        if ".mlp.shared_expert." in name:
            return shared_feed_forward(name, reordered, slices)
        return dense.tensor(name).clone()

    return tensor


@torch.no_grad()
def _inputs(dense: Dense, batches: Iterable[Tensor]) -> list[Tensor]:
    """What each feed-forward part reads of the batches, (T, D) a layer, float32 or wider."""
    # Shares the dense model's memory and is dropped; our decoder has the same names for every family.
    model = build(dense.config, dense.tensor)
    seen: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for layer, kept in zip(model.model.layers, seen, strict=True)
    ]
    try:
        for ids in progress(_rows(batches, dense.config.vocab_size), desc="reading", unit="batch"):
            run_layers(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    x = [torch.cat(parts) for parts in seen]
    if len(x[0]) < dense.config.hidden_size:
        log.warning("%d tokens for a router of width %d; give more text", len(x[0]), dense.config.hidden_size)
    return [part.to(torch.promote_types(part.dtype, torch.float32)) for part in x]


def _rows(batches: Iterable[Tensor], vocabulary: int) -> list[Tensor]:
    rows = [ids.reshape(-1, ids.shape[-1]) for ids in batches if ids.numel()]
    if not rows:
        raise ValueError("batches holds no tokens; give token ids of shape (B, L)")
    largest = max(int(ids.max()) for ids in rows)
    if largest >= vocabulary:
        raise ValueError(f"batches holds the token id {largest}, the model knows {vocabulary}; use its own tokenizer")
    return rows


@torch.no_grad()
def _activations(dense: Dense, layer: int, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Every hidden unit on every token, (T, H), and the down projection, (D, H)."""
    prefix = f"model.layers.{layer}.mlp."

    def project(part: str) -> Tensor:
        bias = dense.tensor(f"{prefix}{part}.bias").to(x_TD) if dense.config.mlp_bias else None
        return torch.nn.functional.linear(x_TD, dense.tensor(f"{prefix}{part}.weight").to(x_TD), bias)

    act = ACT2FN[dense.config.hidden_act]
    inner = act(project("gate_proj")) * project("up_proj") if dense.config.mlp_gated else act(project("up_proj"))
    return inner, dense.tensor(f"{prefix}down_proj.weight").to(x_TD)
