"""Branch, train, mix (BTX): feed-forward parts of specialists become experts, everything else is averaged.

This is the baseline of :mod:`mixtura.lm.upcycle.branch_attend_mix`, built by the same code with ``attention="average"``. Its
structure has native families, so it can be written for transformers and vLLM.

Source: Sukhbaatar et al. 2024 (2403.07816), sec. 3.2.
"""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.lm.families import NATIVE, build, native_family, why_not
from mixtura.lm.model import MixturaForCausalLM
from mixtura.lm.upcycle.branch_attend_mix import BranchAttendConfig, mix

__all__ = ["average", "branch_train_mix", "to_standard"]

log = logging.getLogger(__name__)


def branch_train_mix(
    models: Mapping[str, PreTrainedModel | str | Path],
    *,
    ffn_top_k: int = 1,
    renormalise: bool | None = None,
    balance: float = 0.01,
    z: float = 0.001,
    router_std: float = 0.02,
    generator: torch.Generator | None = None,
) -> MixturaForCausalLM:
    """Mixture of the models' feed-forward parts, with averaged attention; see :func:`mixtura.lm.upcycle.mix`."""
    config = BranchAttendConfig(
        attention="average", ffn_top_k=ffn_top_k, renormalise=renormalise, balance=balance, z=z, router_std=router_std
    )
    return mix(models, config, generator=generator)


def average(models: Mapping[str, PreTrainedModel]) -> PreTrainedModel:
    """A dense model whose every parameter is the mean over the models: the merge that no mixture should lose to."""
    states = [m.state_dict() for m in models.values()]
    merged = copy.deepcopy(next(iter(models.values())))
    mean = {name: torch.stack([s[name].float() for s in states]).mean(0).to(t.dtype) for name, t in states[0].items()}
    merged.load_state_dict(mean)
    return merged.eval()


def to_standard(model: MixturaForCausalLM) -> PreTrainedModel:
    """Write a mixture without attention experts as a native family, with the same logits.

    Gates that sum to 1 become ``MixtralForCausalLM``; others ``Qwen2MoeForCausalLM`` with ``norm_topk_prob=False`` and a shared
    expert of zeros, which that family insists on. A family is taken only if it has the whole structure.

    Args:
        model: from :func:`~mixtura.lm.upcycle.branch_attend_mix.mix` with ``attention="average"``, or any other mixture of
            feed-forward experts. Left as it is.
    Raises:
        ValueError: no native family has the structure; what each lacks is named. Attention experts have none at all: such a
            model stays a ``MixturaForCausalLM``, which vLLM cannot serve.
        TypeError: not a ``MixturaForCausalLM``.
    """
    if not isinstance(model, MixturaForCausalLM):
        raise TypeError(f"model must be a MixturaForCausalLM, got {type(model).__name__}")
    family = native_family(model.config)
    if family is None:
        reasons = "; ".join(f"{name} cannot express {why_not(name, model.config)}" for name in NATIVE)
        raise ValueError(f"no native family of transformers has this structure: {reasons}")
    state = model.state_dict()

    def tensor(name: str) -> Tensor:
        return state[name].detach().clone()

    gates = "sum to 1" if model.config.norm_topk_prob else "keep their softmax values"
    log.info("%s, top-%d, gates %s", NATIVE[family].model, model.config.num_experts_per_tok, gates)
    return build(model.config, tensor, family=family, generation_config=model.generation_config)
