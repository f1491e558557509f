"""A dense model as a pyramid of experts beside its own feed-forward parts, which computes the same, to the bit.

The dense feed-forward part of a layer stays as the fixed network; the experts beside it are copies of it whose input matrices
are multiplied by 1 + noise and whose output matrix is zero. They write nothing at first, and the noise tells them apart as soon
as they do. With ``combine="coefficient"`` both get one half, and the fixed network's output matrix is doubled, which only moves
exponents.

Source: the layer is DeepSpeed-MoE's (2201.05596, sec. 4.1); starting it from a dense model is not in the paper.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.lm.families import build, native_family, read_dense
from mixtura.lm.model import MixturaConfig
from mixtura.lm.pyramid import by_layer
from mixtura.lm.upcycle.stack import drawn, feed_forward, is_expert

__all__ = ["PyramidConfig", "convert"]


@dataclass(frozen=True, kw_only=True)
class PyramidConfig:
    """How experts are put beside a dense model's feed-forward parts.

    Attributes:
        num_experts: of each layer that gets experts, in order of depth, or one number for all.
        every, offset: layer l, counted from 0, gets experts where ``l % every == offset``.
        combine: ``"coefficient"`` weights expert and fixed network by the token, ``"sum"`` adds them.
        noise: standard deviation of the factors on the experts' input matrices, around 1.
        capacity_factor, eval_capacity_factor: see :class:`~mixtura.lm.model.MixturaConfig`; 0 drops no token.
        router_std: standard deviation of the router's first values.
        balance: factor of the load-balance loss.
        seed: router and noise.
    """

    num_experts: int | Sequence[int] = 8
    every: int = 2
    offset: int = 1
    combine: Literal["sum", "coefficient"] = "coefficient"
    noise: float = 0.02
    capacity_factor: float = 0.0
    eval_capacity_factor: float = 0.0
    router_std: float = 0.02
    balance: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.combine not in ("sum", "coefficient"):
            raise ValueError(f"combine must be one of ['coefficient', 'sum'], got {self.combine!r}")
        if self.noise < 0 or self.router_std < 0:
            raise ValueError("noise and router_std are standard deviations and must be >= 0")


def convert(model: PreTrainedModel | str | Path, config: PyramidConfig) -> PreTrainedModel:
    """Put experts beside the feed-forward parts of a dense model, more of them in deeper layers.

    Args:
        model: a dense model in memory or on disk; it is left as it is.
        config: which layers get how many experts.
    Returns:
        A native transformers family where one has the structure (Qwen2-MoE: ``combine="sum"`` and equal numbers of experts),
        else a ``MixturaForCausalLM``, which vLLM cannot load; in evaluation mode. Its logits are the dense model's.
    Raises:
        ValueError: ``num_experts`` does not fit the layers; see also :func:`mixtura.lm.families.read_dense`.
    Example:
        >>> from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
        >>> dense = MixturaForCausalLM(
        ...     MixturaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
        ... )
        >>> convert(dense, PyramidConfig(num_experts=[2, 4])).config.num_experts
        [0, 2, 0, 4]
    """
    dense = read_dense(model)
    ours = mixture_config(dense.config, config)

    def tensor(name: str) -> Tensor:
        experts = ours.experts_of(int(name.split(".")[2])) if name.startswith("model.layers.") else 0
        if name.endswith(".mlp.gate.weight"):
            rows = (experts, ours.hidden_size)
            return drawn(name, rows, std=config.router_std, seed=config.seed, dtype=dense.dtype)
        if ".mlp.shared_coefficient." in name:
            return torch.zeros((2, ours.hidden_size) if name.endswith(".weight") else (2,), dtype=dense.dtype)
        if is_expert(name):
            return _silent(name, feed_forward(name, [dense.tensor] * experts), config)
        if ".mlp.shared_expert." in name:
            return _fixed(name, dense.tensor(name.replace(".shared_expert.", ".")), config)
        return dense.tensor(name).clone()

    return build(ours, tensor, family=native_family(ours), generation_config=dense.generation_config)


def mixture_config(dense: MixturaConfig, config: PyramidConfig) -> MixturaConfig:
    """The dense decoder's config with experts beside some of its feed-forward parts."""
    fields = copy.deepcopy(dense).to_dict()
    for derived in ("model_type", "transformers_version", "architectures"):
        fields.pop(derived, None)
    return MixturaConfig(
        **fields
        | {
            "num_experts": by_layer(
                config.num_experts, dense.num_hidden_layers, every=config.every, offset=config.offset
            ),
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
            "moe_intermediate_size": dense.intermediate_size,
            "shared_expert_intermediate_size": dense.intermediate_size,
            "shared_combine": config.combine,
            "capacity_factor": config.capacity_factor,
            "eval_capacity_factor": config.eval_capacity_factor,
            "router_float32": True,
            "router_aux_loss_coef": config.balance,
            "router_z_loss_coef": 0.0,
        }
    )


def _silent(name: str, experts: Tensor, config: PyramidConfig) -> Tensor:
    """Experts that write zeros, with input matrices of their own."""
    if ".down_proj" in name:
        return experts.zero_()
    if name.endswith("_bias"):
        return experts
    factors = drawn(name, experts.shape, std=config.noise, seed=config.seed, dtype=torch.float32)
    return (experts.float() * (1 + factors)).to(experts.dtype)


def _fixed(name: str, value: Tensor, config: PyramidConfig) -> Tensor:
    return value * 2.0 if config.combine == "coefficient" and ".down_proj." in name else value.clone()
