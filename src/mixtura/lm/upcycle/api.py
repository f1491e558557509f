"""One door to all ways of making a mixture of experts out of dense models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from transformers import PreTrainedModel

from mixtura.lm.families import native_family
from mixtura.lm.upcycle.branch_attend_mix import BranchAttendConfig, mix
from mixtura.lm.upcycle.branch_train_mix import to_standard
from mixtura.lm.upcycle.copies import CopyConfig, copies
from mixtura.lm.upcycle.own_units import from_dense, half_active
from mixtura.lm.upcycle.pyramid import PyramidConfig
from mixtura.lm.upcycle.pyramid import convert as pyramid
from mixtura.lm.upcycle.wide_copies import WideCopyConfig, wide_copies

__all__ = ["METHODS", "upcycle"]

METHODS = ("copy", "fine-grained", "interpretable", "own-units", "pyramid", "branch-attend-mix", "branch-train-mix")
Model: TypeAlias = PreTrainedModel | str | Path


def upcycle(
    model_or_models: Model | Sequence[Model] | Mapping[str, Model],
    *,
    method: Literal[
        "copy", "fine-grained", "interpretable", "own-units", "pyramid", "branch-attend-mix", "branch-train-mix"
    ] = "copy",
    n_experts: int | Sequence[int] | None = None,
    top_k: int | None = None,
    seed: int = 0,
    **options: Any,
) -> PreTrainedModel:
    """Turn one dense model, or several branches of one, into a mixture of experts.

    =====================  ==================================================================================================
    method                 what it does
    =====================  ==================================================================================================
    ``copy``               one model; every expert a copy of the feed-forward part; computes what the dense model computed
    ``fine-grained``       the same, each copy cut into ``segments`` experts, ``shared`` of them always on
    ``own-units``          one model; its hidden units cut into ``segments`` blocks, ``shared`` of them always on: no more
                           parameters, fewer for each token; answers less well until it is trained
    ``interpretable``      one model; random parts of its feed-forward layer as ReLU experts, routed by how few units would fire
    ``pyramid``            one model; experts beside its feed-forward parts, more of them in deeper layers; answers as the dense
                           model did, to the bit
    ``branch-attend-mix``  several models; feed-forward parts and attentions become experts, the rest is averaged
    ``branch-train-mix``   several models; feed-forward parts become experts, attention is averaged too
    =====================  ==================================================================================================

    Args:
        model_or_models: dense model or path, read tensor by tensor; for the ``branch`` methods several, by name or in order.
            None of them is changed.
        method: see above.
        n_experts: copies (default 8); for ``pyramid`` also a list, one number for each layer that gets experts. The ``branch``
            methods have one expert a model, and ``own-units`` has ``segments - shared``; they take no other number.
        top_k: experts, or copies of ``segments`` experts, that a token visits; default 2, 1 for the ``branch`` methods and
            for ``pyramid``, which has no other, and for ``own-units`` what makes half of the hidden units active.
        seed: draws routers and noise.
        options: fields of :class:`~mixtura.lm.upcycle.copies.CopyConfig`, for ``interpretable`` of
            :class:`~mixtura.lm.upcycle.wide_copies.WideCopyConfig`, for ``pyramid`` of
            :class:`~mixtura.lm.upcycle.pyramid.PyramidConfig` or, for the ``branch`` methods, of
            :class:`~mixtura.lm.upcycle.branch_attend_mix.BranchAttendConfig`; for ``own-units`` ``batches`` (token ids, needed),
            ``segments`` (8), ``shared`` (1), ``spread`` and ``balance`` of :func:`~mixtura.lm.upcycle.own_units.from_dense`.
    Returns:
        A native transformers family where one has the structure (Mixtral, Qwen2-MoE, Qwen3-MoE, FlexOlmo, OLMoE), else
        ``MixturaForCausalLM``; in evaluation mode.
    Raises:
        ValueError: unknown method, top_k above the experts, a mixture instead of a dense model, an unknown family, quantized
            weights, branches that differ; the message names what came and what would do.
        TypeError: an option that the method does not have, or one model where several are needed.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
        >>> dense = LlamaForCausalLM(tiny)
        >>> type(upcycle(dense, n_experts=4)).__name__
        'MixtralForCausalLM'
        >>> type(upcycle(dense, method="fine-grained", segments=4, shared=1)).__name__
        'Qwen2MoeForCausalLM'
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    if method.startswith("branch"):
        return _mixed(_named(model_or_models, method), method, n_experts, top_k, seed, options)
    if not isinstance(model_or_models, (PreTrainedModel, str, Path)):
        raise TypeError(
            f"method={method!r} takes one model, got {type(model_or_models).__name__}; use branch-attend-mix"
        )
    if method == "pyramid":
        if top_k not in (None, 1):
            raise ValueError(
                f"top_k must be 1 for a pyramid, where a token visits one expert and the fixed network, got {top_k}"
            )
        _check_options(PyramidConfig, options, method)
        return pyramid(
            model_or_models, PyramidConfig(num_experts=8 if n_experts is None else n_experts, seed=seed, **options)
        )
    if method == "own-units":
        return _own_units(model_or_models, n_experts, top_k, seed, options)
    if n_experts is not None and not isinstance(n_experts, int):
        raise TypeError(f"n_experts as a list goes with method='pyramid', got {n_experts!r} for {method!r}")
    if method == "interpretable":
        _check_options(WideCopyConfig, options, method)
        counts: dict[str, Any] = {
            "n_experts": 8 if n_experts is None else n_experts,
            "top_k": 2 if top_k is None else top_k,
        }
        return wide_copies(model_or_models, WideCopyConfig(**counts, seed=seed, **options))
    if method == "copy" and (extra := {"segments", "shared"} & set(options)):
        raise TypeError(f"method='copy' has no option {sorted(extra)}; use fine-grained")
    if method == "fine-grained":
        options = {"segments": 4, **options}
    _check_options(CopyConfig, options, method)
    config = CopyConfig(
        n_experts=8 if n_experts is None else n_experts, top_k=2 if top_k is None else top_k, seed=seed, **options
    )
    return copies(model_or_models, config)


def _own_units(
    model: Model, n_experts: int | Sequence[int] | None, top_k: int | None, seed: int, options: dict[str, Any]
) -> PreTrainedModel:
    known = ["batches", "segments", "shared", "spread", "balance"]
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(f"method='own-units' has no option {unknown}; it has {known}")
    if "batches" not in options:
        raise TypeError(
            "method='own-units' needs batches: token ids of shape (B, L), to see which hidden units are used"
        )
    options = {"shared": 1, **options}
    split, shared = options.pop("segments", 8), options["shared"]
    if n_experts is not None and n_experts != split - shared:
        raise ValueError(
            f"own-units makes segments - shared experts: n_experts must be {split - shared} or left out, got {n_experts}"
        )
    active = half_active(split, shared) if top_k is None else top_k
    return from_dense(model, split=split, active=active, generator=torch.Generator().manual_seed(seed), **options)


def _mixed(
    models: Mapping[str, Model],
    method: str,
    n_experts: int | Sequence[int] | None,
    top_k: int | None,
    seed: int,
    options: dict[str, Any],
) -> PreTrainedModel:
    if n_experts is not None and n_experts != len(models):
        raise ValueError(
            f"{method} makes one expert of each model: n_experts must be {len(models)} or left out, got {n_experts}"
        )
    if method == "branch-train-mix":
        if "attention" in options:
            raise TypeError(
                "branch-train-mix averages the attention and has no option 'attention'; use branch-attend-mix"
            )
        options = {**options, "attention": "average"}
    _check_options(BranchAttendConfig, options, method)
    config = BranchAttendConfig(ffn_top_k=1 if top_k is None else top_k, **options)
    model = mix(models, config, generator=torch.Generator().manual_seed(seed))
    return to_standard(model) if native_family(model.config) is not None else model


def _named(models: Any, method: str) -> Mapping[str, Model]:
    if isinstance(models, Mapping):
        return models
    if isinstance(models, Sequence) and not isinstance(models, str):
        return {f"expert {i}": model for i, model in enumerate(models)}
    raise TypeError(f"method={method!r} takes several models, by name or in a list, got one {type(models).__name__}")


def _check_options(config: Any, options: Mapping[str, Any], method: str) -> None:
    known = [
        f for f in config.__dataclass_fields__ if f not in ("n_experts", "num_experts", "top_k", "ffn_top_k", "seed")
    ]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"method={method!r} has no option {unknown}; it has {known}")
