"""Sparse upcycling: every expert starts as a copy, or as a piece, of the dense model's feed-forward part.

- ``copy``: E experts, each the whole part. With gates that sum to 1 the mixture computes what the dense model computed, to
  rounding, whatever the router does.
- ``fine_grained``: each copy is cut into m pieces that are experts of their own, and m times as many are chosen, as in
  DeepSeekMoE; some pieces may be shared, always on and outside the router. The pieces of one copy start with one router row,
  so they are chosen together and the mixture still computes what the dense model computed; training tells them apart.

Source: Komatsuzaki et al. 2022 (2212.05055), sec. 3; DeepSeekMoE (2401.06066), sec. 3.1-3.2; drawing a share of the hidden units
anew: Nakamura et al. 2025 (2502.19261), sec. 3.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.lm.families import build, native_family, read_dense
from mixtura.lm.model import MixturaConfig
from mixtura.lm.upcycle.stack import Slices, drawn, feed_forward, is_expert, shared_feed_forward

__all__ = ["CopyConfig", "copies", "mixture_config"]


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """How a dense feed-forward part becomes experts.

    Attributes:
        n_experts: copies of the part.
        top_k: copies that a token visits.
        segments: pieces that each copy is cut into; 1 keeps it whole.
        shared: pieces that every token visits, as one shared expert outside the router.
        renormalise: make the chosen gates sum to 1; without it the mixture starts as less than the dense model.
        noise: standard deviation of the noise on the experts, relative to that of each tensor.
        reinit: share of the hidden units of each expert that are drawn anew.
        router_std: standard deviation of the router's first values.
        balance, z: factors of the load-balance and z losses.
        seed: router, noise and units.
    """

    n_experts: int = 8
    top_k: int = 2
    segments: int = 1
    shared: int = 0
    renormalise: bool = True
    noise: float = 0.0
    reinit: float = 0.0
    router_std: float = 0.02
    balance: float = 0.01
    z: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_experts < 2:
            raise ValueError(f"n_experts must be at least 2, got {self.n_experts}")
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"top_k must be between 1 and n_experts={self.n_experts}, got {self.top_k}")
        if self.segments < 1:
            raise ValueError(f"segments must be at least 1, got {self.segments}")
        if not 0 <= self.shared < self.segments:
            raise ValueError(
                f"shared must be between 0 and segments - 1 = {self.segments - 1} (one piece has to be routed), "
                f"got {self.shared}"
            )
        if not 0 <= self.reinit <= 1:
            raise ValueError(f"reinit is a share and must be between 0 and 1, got {self.reinit}")
        if self.noise < 0 or self.router_std < 0:
            raise ValueError("noise and router_std are standard deviations and must be >= 0")


def copies(model: PreTrainedModel | str | Path, config: CopyConfig) -> PreTrainedModel:
    """Turn a dense model into a mixture of experts that computes the same.

    Args:
        model: dense model, or a path or hub name, which is read tensor by tensor. It is left as it is.
        config: number and kind of experts.
    Returns:
        A native transformers family where one has the structure, else a ``MixturaForCausalLM``; in evaluation mode. Its
        logits equal the dense model's to rounding when ``renormalise`` is true and ``noise`` and ``reinit`` are zero.
    Raises:
        ValueError: hidden units that ``segments`` does not divide; see also :func:`mixtura.lm.families.read_dense`.
    """
    dense = read_dense(model)
    hidden = dense.config.intermediate_size
    if hidden % config.segments:
        raise ValueError(f"segments={config.segments} must divide the {hidden} hidden units of {dense.name}")
    slices = Slices(segments=config.segments, shared=config.shared)
    ours = mixture_config(dense.config, config, hidden)
    sources = [dense.tensor] * config.n_experts

    def tensor(name: str) -> Tensor:
        if name.endswith(".mlp.gate.weight"):
            shape = (config.n_experts, ours.hidden_size)
            rows = drawn(name, shape, std=config.router_std, seed=config.seed, dtype=dense.dtype)
            return rows.repeat_interleave(slices.routed, dim=0)
        if is_expert(name):
            return _varied(name, feed_forward(name, sources, slices), config)
        if ".mlp.shared_expert." in name:
            return shared_feed_forward(name, dense.tensor, slices)
        return dense.tensor(name).clone()

    return build(ours, tensor, family=native_family(ours), generation_config=dense.generation_config)


def mixture_config(dense: MixturaConfig, config: CopyConfig, hidden: int) -> MixturaConfig:
    """The dense decoder's config with experts in place of each feed-forward part."""
    ours = copy.deepcopy(dense)
    routed = config.segments - config.shared
    ours.num_experts = config.n_experts * routed
    ours.num_experts_per_tok = config.top_k * routed
    ours.moe_intermediate_size = hidden // config.segments
    ours.shared_expert_intermediate_size = config.shared * hidden // config.segments
    ours.norm_topk_prob = config.renormalise
    ours.router_aux_loss_coef, ours.router_z_loss_coef = config.balance, config.z
    return ours


def _varied(name: str, experts: Tensor, config: CopyConfig) -> Tensor:
    """Noise on every value and new values for some hidden units, the same units in all tensors of an expert."""
    if config.noise:
        std = config.noise * float(experts[0].float().std())
        experts += drawn(name, experts.shape, std=std, seed=config.seed, dtype=experts.dtype)
    if config.reinit and not name.endswith("_bias"):
        down = name.endswith("down_proj")
        hidden = experts.shape[2] if down else experts.shape[1] // (2 if "gate_up" in name else 1)
        layer = name.split(".mlp.")[0]
        chances = drawn(f"{layer} units", (len(experts), hidden), std=1.0, seed=config.seed, dtype=torch.float32)
        units = chances.argsort(-1).argsort(-1) < round(config.reinit * hidden)
        std = float(experts[0].float().std())
        fresh = drawn(f"{name} new", experts.shape, std=std, seed=config.seed, dtype=experts.dtype)
        mask = units[:, None, :] if down else units.repeat(1, experts.shape[1] // hidden)[:, :, None]
        experts = torch.where(mask, fresh, experts)
    return experts
