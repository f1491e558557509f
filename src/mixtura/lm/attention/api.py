"""From a model and texts to a model with spans: answers of its own, profile, plan, conversion."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.lm.attention.span_model import attending, check, convert
from mixtura.lm.attention.span_plan import plan_spans
from mixtura.lm.attention.span_profile import AnswerSample, answer_samples, profile_spans, prompt_ids
from mixtura.lm.attention.span_rules import SpanPlan, uniform_plan

__all__ = ["QUESTION", "answer_loss", "give_spans", "long_contexts", "plan_from_texts"]

QUESTION = "Summarize the text above in a few sentences."
LONGEST_ANSWER = 128
JUDGED = 2  # answers that each plan on the front is judged by


def give_spans(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    density: float = 0.5,
    lengths: Sequence[int] = (2048,),
    samples: int = 8,
    block: int = 64,
    seed: int = 0,
    inplace: bool = False,
) -> Any:
    """Give every key/value head of a model a span of its own.

    Args:
        model, tokenizer: a causal language model of a family that :func:`mixtura.lm.attention.convert` knows.
        texts: long documents, or domain -> documents, that the model summarises for its calibration.
        density: mean share of the cache that is kept, at every length; in (0, 1].
        lengths: total lengths, prompt and answer, that are profiled; the longest is the longest that the result takes.
        samples: texts of each length.
        block: tokens a block; spans and sink are whole blocks.
        seed: which parts of the texts.
        inplace: change the model itself; it is then not copied.
    Returns:
        The model with spans; its plan stands in ``config.mixtura_spans``.
    Raises:
        ValueError: what :func:`plan_from_texts` and :func:`mixtura.lm.attention.convert` refuse.
    """
    plan = plan_from_texts(
        model, tokenizer, texts, density=density, lengths=lengths, samples=samples, block=block, seed=seed
    )
    return convert(model, plan, inplace=inplace)


def plan_from_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    density: float = 0.5,
    lengths: Sequence[int] = (2048,),
    samples: int = 8,
    block: int = 64,
    seed: int = 0,
) -> SpanPlan:
    """The plan that :func:`give_spans` puts on a model.

    With several lengths, the plans that no other beats at all of them are judged by the loss of answers at a length between the
    two longest, which was not profiled.

    Raises:
        ValueError: a length that no multiple of the block fits into twice, or past what the model can read; text that does not
            fill the longest; a density that whole blocks cannot have.
    """
    whole = sorted({-(-length // block) * block for length in lengths})
    if not whole or whole[0] < 4 * block:
        raise ValueError(f"lengths must be at least {4 * block} tokens, four blocks, got {list(lengths)}")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and whole[-1] > limit:
        raise ValueError(f"lengths go up to {whole[-1]} tokens, and this model reads {limit} (max_position_embeddings)")
    # A family or a density that cannot be is refused before anything is computed.
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads)
    check(model.config, uniform_plan(shape, whole[-1], 1.0, block))
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")
    influence: dict[int, Tensor] = {}
    for length in whole:
        found = _answers(model, tokenizer, texts, samples, length, seed)
        influence |= profile_spans(model, found, block=block)
    judge = None
    if len(whole) > 1:
        between = (whole[-2] + whole[-1]) // (2 * block) * block
        unseen = _answers(model, tokenizer, texts, JUDGED, between, seed + 1)

        def judge(plan: SpanPlan) -> float:
            with attending(model, plan):
                return answer_loss(model, unseen)

    return plan_spans(influence, density, validate=judge)


@torch.inference_mode()
def answer_loss(model: Any, samples: Sequence[AnswerSample]) -> float:
    """Mean negative log-likelihood of the answers' tokens, nats."""
    total, count = 0.0, 0
    for sample in samples:
        row, at = sample.ids.to(model.device)[None], sample.answer.to(model.device)
        logits = model(row, use_cache=False, logits_to_keep=at - 1).logits[0].float()
        total += F.cross_entropy(logits, row[0, at], reduction="sum").item()
        count += len(at)
    return total / count


def long_contexts(
    tokenizer: Any, texts: Sequence[str] | Mapping[str, Sequence[str]], count: int, tokens: int, seed: int
) -> list[str]:
    """Parts of the texts of about so many tokens, drawn evenly from the domains."""
    from mixtura.lm.compress.api import calibration_blocks

    rows = calibration_blocks(tokenizer, texts, count, tokens, seed=seed)
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def _answers(model: Any, tokenizer: Any, texts: Any, count: int, length: int, seed: int) -> list[AnswerSample]:
    room = min(LONGEST_ANSWER, length // 4)
    # Decoded and encoded again, a text may grow by a few tokens.
    frame = prompt_ids(tokenizer, f"\n\n{QUESTION}").shape[1] + length // 50 + 4
    contexts = long_contexts(tokenizer, texts, count, length - room - frame, seed)
    return answer_samples(model, tokenizer, contexts, [QUESTION] * len(contexts), max_new_tokens=room, length=length)
