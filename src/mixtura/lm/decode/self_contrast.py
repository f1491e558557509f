"""Self-contrast decoding: the next token is moved away from what the same model says when routed to a lesser expert.

Two passes read the same tokens: *strong*, with the gate's own routing, and *weak*, by default with the second-ranked
expert alone. Each keeps its own keys and values from the first position of the prompt on, since hidden states differ
from the first mixture layer. Both run as one batch of 2B rows, so weights are read once.

Shapes: B rows, L positions, V vocabulary.
Source: SCMoE (2405.14507), eq. 4-6.
"""

import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixtura.lm.anatomy import find_moe
from mixtura.lm.decode.routing import Renorm, RoutingRule, routed

__all__ = ["ContrastOutput", "contrast_logits", "generate", "self_contrast"]

log = logging.getLogger(__name__)

STRONG, WEAK = RoutingRule.default(), RoutingRule.rank(2)
# What transformers' generate hands over besides the inputs of a text model; the loop makes its own.
OWN_INPUTS = {"past_key_values", "use_cache", "position_ids", "logits_to_keep", "cache_position"}


@dataclass(frozen=True)
class ContrastOutput:
    """What a generation produced.

    Attributes:
        sequences: prompt and new tokens, shape (B, L + new).
        scores: contrasted logits of every new token, each (B, V), -inf outside the mask.
        strong, weak: logits of the two passes, each (B, V).
    """

    sequences: Tensor
    scores: tuple[Tensor, ...]
    strong: tuple[Tensor, ...]
    weak: tuple[Tensor, ...]


def contrast_logits(
    strong: Tensor, weak: Tensor, *, alpha: float = 0.1, beta: float = 0.5, t_strong: float = 1.0, t_weak: float = 1.0
) -> Tensor:
    """Contrasted logits, float32, shape (..., V); -inf where the strong pass finds a token implausible.

    valid = { i : strong_i >= log(alpha) + max_j strong_j }; (1 + beta) strong_i - beta weak_i for i in valid.

    Args:
        strong, weak: logits before the softmax, shape (..., V).
        alpha: plausibility, in (0, 1]; 1 leaves the likeliest token alone.
        beta: how far to push away, >= 0; 0 is the strong pass.
        t_strong, t_weak: temperatures that divide the logits first, > 0.
    Source:
        2405.14507, eq. 5-6.
    Example:
        >>> contrast_logits(torch.tensor([2.0, 1.9, -9.0]), torch.tensor([2.0, 0.0, 0.0]), beta=1.0)
        tensor([2.0000, 3.8000,   -inf])
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be >= 0, got {beta}")
    if t_strong <= 0 or t_weak <= 0:
        raise ValueError(f"t_strong and t_weak must be > 0, got {t_strong} and {t_weak}")
    strong, weak = strong.float() / t_strong, weak.float() / t_weak
    valid = strong >= math.log(alpha) + strong.amax(-1, keepdim=True)
    # A weak logit of -inf would push its token to +inf; a very small number says the same and stays a number.
    weak = weak.clamp(min=-1e30)
    return torch.where(valid, (1 + beta) * strong - beta * weak, -torch.inf)


@torch.inference_mode()
def generate(
    model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    strong: RoutingRule = STRONG,
    weak: RoutingRule = WEAK,
    alpha: float = 0.1,
    beta: float = 0.5,
    t_strong: float = 1.0,
    t_weak: float = 1.0,
    renorm: Renorm = True,
    do_sample: bool = False,
    batched: bool = True,
    max_new_tokens: int,
    stopping_criteria: Sequence[Callable[..., Any]] | None = None,
    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
    return_dict: bool = False,
) -> Tensor | ContrastOutput:
    """Continue prompts by self-contrast.

    Args:
        model: any mixture of experts of transformers or mixtura.
        input_ids: prompts, shape (B, L), padded on the left.
        attention_mask: 0 at padding, shape (B, L); may be left out where there is none.
        strong, weak: routing of the two passes, applied in every mixture layer at every position, the prompt included.
        alpha, beta, t_strong, t_weak: see :func:`contrast_logits`.
        renorm: see :func:`~mixtura.lm.decode.routing.routed`; concerns rules other than the default.
        do_sample: draw from the softmax of the contrasted logits instead of taking the largest.
        batched: both passes in one batch; ``False`` runs them one after the other, with half the activations.
        max_new_tokens: longest continuation, >= 1.
        stopping_criteria: transformers' criteria, asked about the sequences of B rows.
        logits_processor: transformers' processors, applied to the contrasted logits. Where they forbid all that the mask
            allows, the strong logits take over.
        eos_token_id, pad_token_id: the model's own by default. A finished row goes on with padding.
        generator: draws of sampling and of random routing.
        return_dict: return a :class:`ContrastOutput` with the logits of every step.
    Returns:
        Prompt and new tokens, shape (B, L + new), or the record.
    Raises:
        ValueError: a dense model (its class is named), a rank beyond the experts, values out of range, padding on the right.
    """
    contrast_logits(torch.zeros(1), torch.zeros(1), alpha=alpha, beta=beta, t_strong=t_strong, t_weak=t_weak)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    mask = _checked_mask(input_ids, attention_mask)
    ends = _ends(model, eos_token_id)
    pad = _pad(model, pad_token_id, ends, len(input_ids))
    passes = _Passes(model, strong, weak, renorm, batched, mask, len(input_ids), generator)
    sequences, fed = input_ids, input_ids
    open_rows = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    mode = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            z_strong, z_weak = passes.step(fed)
            scores = contrast_logits(z_strong, z_weak, alpha=alpha, beta=beta, t_strong=t_strong, t_weak=t_weak)
            if logits_processor is not None:
                scores = _processed(logits_processor, sequences, scores, z_strong / t_strong)
            token = _draw(scores, do_sample, generator)
            token = torch.where(open_rows, token, pad)
            sequences, fed = torch.cat([sequences, token[:, None]], dim=1), token[:, None]
            if return_dict:
                kept.append((scores, z_strong, z_weak))
            open_rows = open_rows & ~_finished(sequences, scores, ends, stopping_criteria or ())
            if not bool(open_rows.any()):
                break
    finally:
        model.train(mode)
    if not return_dict:
        return sequences
    by_step = tuple(zip(*kept, strict=True))
    return ContrastOutput(sequences, *by_step)


def self_contrast(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    strong: RoutingRule = STRONG,
    weak: RoutingRule = WEAK,
    alpha: float = 0.1,
    beta: float = 0.5,
    t_strong: float = 1.0,
    t_weak: float = 1.0,
    renorm: Renorm = True,
    batched: bool = True,
    generator: torch.Generator | None = None,
    attention_mask: Tensor | None = None,
    **model_kwargs: Any,
) -> Tensor | ContrastOutput:
    """Self-contrast inside transformers: ``model.generate(..., custom_generate=mixtura.lm.self_contrast, beta=0.5)``.

    Length, sampling, processors, end and padding tokens come from ``generate``'s own arguments.

    Raises:
        ValueError: beam search, which compares sums of log-probabilities that contrasted logits are not.
        TypeError: a cache of a fixed kind or one that already holds tokens, which cannot be had twice; inputs beside text.
    """
    config = generation_config
    if (config.num_beams or 1) > 1:
        raise ValueError(f"self-contrast has no beam search; set num_beams=1, got {config.num_beams}")
    if config.cache_implementation not in (None, "dynamic", "dynamic_full"):
        raise TypeError(
            f"self-contrast keeps two growing caches of its own; cache_implementation={config.cache_implementation!r} "
            "cannot be doubled, leave it out"
        )
    _check_inputs(model_kwargs)
    pad = config.pad_token_id
    return generate(
        model,
        input_ids,
        attention_mask=attention_mask,
        strong=strong,
        weak=weak,
        alpha=alpha,
        beta=beta,
        t_strong=t_strong,
        t_weak=t_weak,
        renorm=renorm,
        batched=batched,
        do_sample=bool(config.do_sample),
        max_new_tokens=config.max_length - input_ids.shape[1],
        # Lengths are counted and end tokens are seen by the loop itself.
        stopping_criteria=[
            c for c in stopping_criteria or () if not hasattr(c, "max_length") and not hasattr(c, "eos_token_id")
        ],
        logits_processor=logits_processor or None,
        eos_token_id=config.eos_token_id if config.eos_token_id is not None else (),
        pad_token_id=pad if pad is None or isinstance(pad, int) else int(pad[0]),
        generator=generator,
        return_dict=bool(config.return_dict_in_generate),
    )


def _check_inputs(model_kwargs: Mapping[str, Any]) -> None:
    from transformers import QuantizedCache, StaticCache

    cache = model_kwargs.get("past_key_values")
    if isinstance(cache, (StaticCache, QuantizedCache)):
        raise TypeError(
            f"self-contrast keeps two growing caches of its own; a {type(cache).__name__} cannot be doubled, leave "
            "past_key_values out"
        )
    if cache is not None and any(getattr(layer, "is_initialized", False) for layer in getattr(cache, "layers", ())):
        raise TypeError(
            "past_key_values already holds tokens of one routing, and self-contrast needs those of two; give the whole "
            "prompt instead"
        )
    extra = sorted(name for name, value in model_kwargs.items() if isinstance(value, Tensor) and name not in OWN_INPUTS)
    if extra:
        raise TypeError(f"self-contrast reads text only, got also {', '.join(extra)}")


def _processed(processor: Callable[[Tensor, Tensor], Tensor], ids: Tensor, scores: Tensor, strong: Tensor) -> Tensor:
    done = processor(ids, scores)
    # An end token that is forbidden as yet may be the only one inside the mask: something has to be said all the same.
    empty = done.isneginf().all(-1, keepdim=True)
    return torch.where(empty, processor(ids, strong), done) if bool(empty.any()) else done


class _Passes:
    """The two forward passes over the same tokens, with a cache for each routing."""

    def __init__(
        self,
        model: Any,
        strong: RoutingRule,
        weak: RoutingRule,
        renorm: Renorm,
        batched: bool,
        mask: Tensor | None,
        rows: int,
        generator: torch.Generator | None,
    ):
        self.model, self.renorm, self.generator, self.mask = model, renorm, generator, mask
        self.blocks = find_moe(model) or model  # found once, and not for every token
        both = [strong] * rows + [weak] * rows
        self.rules: list[RoutingRule | list[RoutingRule]] = [both] if batched else [strong, weak]
        self.caches: list[Any] = [None] * len(self.rules)
        accepted = inspect.signature(model.forward).parameters
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def step(self, fed: Tensor) -> tuple[Tensor, Tensor]:
        """Strong and weak logits of the last position, float32, each (B, V), after the tokens ``fed`` (B, new)."""
        if self.mask is not None and self.caches[0] is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(fed), fed.shape[1])], dim=1)
        found = [self._forward(i, fed) for i in range(len(self.rules))]
        if len(found) == 1:
            strong, weak = found[0].split(len(fed))
            return strong, weak
        return found[0], found[1]

    def _forward(self, i: int, fed: Tensor) -> Tensor:
        twice = 2 if len(self.rules) == 1 else 1
        inputs: dict[str, Any] = {"input_ids": fed.repeat(twice, 1)}
        if self.mask is not None:
            mask = self.mask.repeat(twice, 1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            inputs |= {"attention_mask": mask, "position_ids": positions[:, -fed.shape[1] :]}
        with routed(self.blocks, self.rules[i], renorm=self.renorm, generator=self.generator):
            out = self.model(**inputs, past_key_values=self.caches[i], use_cache=True, **self.last_only)
        self.caches[i] = out.past_key_values
        return out.logits[:, -1].float()


def _draw(scores: Tensor, do_sample: bool, generator: torch.Generator | None) -> Tensor:
    if not do_sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def _finished(sequences: Tensor, scores: Tensor, ends: Tensor, criteria: Sequence[Callable[..., Any]]) -> Tensor:
    """Rows that end with the token just chosen, boolean (B,)."""
    done = torch.isin(sequences[:, -1], ends)
    for criterion in criteria:
        done = done | torch.as_tensor(criterion(sequences, scores), device=done.device)
    return done


def _checked_mask(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    if input_ids.dim() != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must have shape (B, L) with L >= 1, got {tuple(input_ids.shape)}")
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    if not bool(attention_mask[:, -1].all()):
        raise ValueError("prompts must be padded on the left; set tokenizer.padding_side = 'left'")
    return attention_mask


def _ends(model: Any, given: int | Iterable[int] | None) -> Tensor:
    if given is None:
        given = getattr(model.generation_config, "eos_token_id", None)
        given = () if given is None else given
    ids = [given] if isinstance(given, int) else [int(i) for i in given]
    return torch.tensor(ids, dtype=torch.long, device=next(model.parameters()).device)


def _pad(model: Any, given: int | None, ends: Tensor, rows: int) -> Tensor:
    if given is None:
        given = getattr(model.generation_config, "pad_token_id", None)
    if given is None:
        given = int(ends[0]) if ends.numel() else 0
        if rows > 1 and ends.numel():
            log.warning("no pad_token_id is set; finished rows go on with the end token %d", given)
    return torch.tensor(given, device=ends.device)
