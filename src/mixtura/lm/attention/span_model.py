"""A model whose attention follows a plan of spans: its weights, a class that makes the right cache, the plan in its config.

A converted Llama is a ``SpansLlamaForCausalLM`` of model type ``mixtura-spans-llama``: transformers refuses it without
``import mixtura`` instead of quietly attending to everything. Classes are made from the family's own when one is wanted.
"""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation.configuration_utils import GenerationMode

from mixtura.lm.attention.late import FAMILIES, PREFIX
from mixtura.lm.attention.span_cache import SpanCache
from mixtura.lm.attention.span_mask import BACKENDS, NAME, register
from mixtura.lm.attention.span_rules import SpanPlan

__all__ = ["attending", "check", "convert", "spans_classes"]

HEADROOM = 256  # tokens a cache is made for beyond the prompt where nobody says how many will come


def convert(model: Any, plan: SpanPlan, *, inplace: bool = False, backend: str = "windowed") -> Any:
    """Let every key/value head of a model attend to, and keep, what a plan says.

    Args:
        model: a causal language model of one of the families that are named in the error otherwise; quantized ones too.
        plan: made for this model.
        inplace: change ``model`` itself instead of a copy.
        backend: of the attention over prompts: ``"windowed"``; ``"flex"``, torch's FlexAttention, faster once it is compiled
            (a C++ compiler on a CPU, where it has no gradients); or ``"reference"`` (the whole mask).
    Returns:
        The model; it generates, saves and loads (after ``import mixtura``) like any other.
    Raises:
        ValueError: a family whose attention cannot be cut, a model that slides already or has spans, a plan of other layers or
            heads (both are named), or an unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    check(model.config, plan)
    if not inplace:
        model = copy.deepcopy(model)
    family = model.config.model_type
    config_class, model_class = spans_classes(family, type(model))  # type: ignore[arg-type]
    # One object is the config of all modules, so all of them see the plan.
    model.config.__class__ = config_class
    model.config.mixtura_spans = {"family": family, "backend": backend, **asdict(plan)}
    model.__class__ = model_class
    register()
    model.config._attn_implementation = NAME
    return model


@contextmanager
def attending(model: Any, plan: SpanPlan, *, backend: str = "windowed") -> Iterator[None]:
    """Let a model attend by a plan for a while, without a cache: for judging plans on one model in memory."""
    check(model.config, plan)
    register()
    before = model.config._attn_implementation
    model.config.mixtura_spans = {"backend": backend, **asdict(plan)}
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        del model.config.mixtura_spans


def check(config: Any, plan: SpanPlan) -> None:
    """Raise a ValueError where a plan cannot be put on a model of this configuration."""
    kind = str(config.model_type)
    if kind.startswith(PREFIX):
        raise ValueError("this model has spans already; plan from the model that it was made of")
    if kind not in FAMILIES:
        latent = (
            " (its heads share one latent vector a token, so there is nothing a head could drop)"
            if "deepseek" in kind
            else ""
        )
        raise ValueError(f"attention of {kind!r} models cannot be given spans{latent}; families: {', '.join(FAMILIES)}")
    if slides(config):
        raise ValueError(f"this {kind} model has sliding windows of its own (sliding_window={config.sliding_window})")
    have = (config.num_hidden_layers, config.num_key_value_heads)
    if plan.shape != have:
        raise ValueError(
            f"the plan is for {plan.shape[0]} layers of {plan.shape[1]} key/value heads, the model has {have[0]} of {have[1]}"
        )


def slides(config: Any) -> bool:
    """Whether some layer of a model has a sliding window of its own."""
    if getattr(config, "layer_types", None) is not None:
        return any(kind != "full_attention" for kind in config.layer_types)
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


@functools.cache
def spans_classes(family: str, base: Any = None) -> tuple[type[PreTrainedConfig], type]:
    """Configuration and model class of a family with spans, known to transformers' Auto classes afterwards."""
    name = FAMILIES[family]
    base_config = getattr(import_module(f"transformers.models.{family}.configuration_{family}"), f"{name}Config")
    base = base or getattr(import_module(f"transformers.models.{family}.modeling_{family}"), f"{name}ForCausalLM")
    kind = PREFIX + family.replace("_", "-")
    config_class = type(
        f"Spans{name}Config", (base_config,), {"model_type": kind, "__module__": __name__, "__annotations__": {}}
    )
    body = {
        "config_class": config_class,
        "__module__": __name__,
        "__init__": _init(base),
        "forward": _forward(base),
        "_prepare_cache_for_generation": _prepare_cache(base),
        "__doc__": f"{base.__name__} whose heads keep what ``config.mixtura_spans`` says.",
    }
    model_class = type(f"Spans{base.__name__}", (base,), body)
    # How a family's tensors on disk become those in memory is filed under its model type.
    if (mapping := get_checkpoint_conversion_mapping(family)) is not None:
        register_checkpoint_conversion_mapping(kind, mapping, overwrite=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


def _init(base: Any) -> Any:
    def construct(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        register()
        if config._attn_implementation not in (None, NAME):
            raise ValueError(
                f"a model with spans attends by {NAME!r}, and attn_implementation={config._attn_implementation!r} was asked for; "
                "leave it out"
            )
        config._attn_implementation = NAME
        base.__init__(self, config, *args, **kwargs)

    return construct


def _forward(base: Any) -> Any:
    signature = inspect.signature(base.forward)

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        cache, wanted = given.get("past_key_values"), given.get("use_cache")
        if cache is not None:
            if not isinstance(cache, SpanCache):
                raise ValueError(
                    f"a model with spans keeps keys and values in a SpanCache, got {type(cache).__name__}; leave past_key_values "
                    "out, or pass SpanCache(model, length)"
                )
            return base.forward(self, *args, **kwargs)
        if wanted or (wanted is None and self.config.use_cache):
            if self.training and torch.is_grad_enabled():
                kwargs["use_cache"] = False
            else:
                ids = given.get("input_ids")
                length = (ids if ids is not None else given["inputs_embeds"]).shape[1]
                longest = self.config.mixtura_spans.get("longest")
                room = length + HEADROOM if longest is None else max(length, min(length + HEADROOM, longest))
                kwargs["past_key_values"] = SpanCache(self, room)
        return base.forward(self, *args, **kwargs)

    return forward


def _prepare_cache(base: Any) -> Any:
    @functools.wraps(base._prepare_cache_for_generation)
    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted decoding takes tokens back, and what left a window is gone; decode without an assistant"
            )
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not fit: a model with spans makes its own"
            )
        limit = getattr(self.config, "max_position_embeddings", None)
        if limit is not None and generation_config.max_length > limit:
            raise ValueError(
                f"prompt and answer together would be {generation_config.max_length} tokens, and this model reads {limit} "
                "(max_position_embeddings); shorten the prompt, or ask for fewer new tokens"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = SpanCache(self, generation_config.max_length)
        return base._prepare_cache_for_generation(
            self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    return _prepare_cache_for_generation
