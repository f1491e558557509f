"""What would be lost if an attention value were cut: one backward pass, then layer by layer from what the pass left.

With A the attention after softmax and G = dL/dA, cutting A_ij and renormalising its row changes the loss by
``-(A_ij / (1 - A_ij)) (G_ij - sum_n G_in A_in)`` to first order (MoA 2406.14909, eq. 3). G = dO V^T and sum_n G_in A_in =
dO_i . O_i, so queries, keys, values and the gradient of the output are all that is needed; A is rebuilt strip by strip.

Signs must not let losses pay for each other, so absolute values are taken: of each block's sum, since a block is what is cut
(``pool="block"``), or of each value as the authors' code has it (``pool="value"``). The latter counts thousands of small
values of either sign, which cancel when they are cut, like one large one: in SmolLM2-135M the first ten layers, which hardly
matter, then get most of the budget.

Shapes: L layers, H query heads, G key/value heads, N tokens, n blocks, C width of a head.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from transformers import AttentionInterface

from mixtura.core.progress import progress

__all__ = ["AnswerSample", "answer_samples", "influence_blocks", "profile_spans"]

log = logging.getLogger(__name__)

Pool = Literal["block", "value"]
RECORDER = "mixtura-span-profile"
STRIP = 512  # rows of attention that are rebuilt together
CLOSE = 1e-6  # least 1 - A


@dataclass(frozen=True)
class AnswerSample:
    """A prompt and what the model itself answered.

    Attributes:
        ids: tokens of both, shape (N,).
        answer: positions of the answer's tokens, whose loss alone counts, each at least 1, int64.
        length: total length that the sample stands for; its own, in whole blocks, where None.
    """

    ids: Tensor
    answer: Tensor
    length: int | None = None


@torch.no_grad()
def answer_samples(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[str],
    questions: Sequence[str],
    *,
    max_new_tokens: int = 64,
    length: int | None = None,
) -> list[AnswerSample]:
    """Let a model answer questions about long contexts, greedily; its answers are what spans are profiled on.

    Calibrating on the model's own answers, and on nothing but the answers, is what makes the profile find the heads that look
    far (MoA, table 2).

    Args:
        model, tokenizer: the dense model; its chat template is used where it has one.
        contexts: long texts.
        questions: one for each, answerable from it.
        max_new_tokens: longest answer.
        length: total length that the samples stand for.
    Raises:
        ValueError: lists of different lengths, an empty answer to every question, or a prompt that leaves no room in ``length``.
    """
    if len(contexts) != len(questions):
        raise ValueError(f"there are {len(contexts)} contexts and {len(questions)} questions; each context needs one")
    found = []
    mode = model.training
    model.eval()
    try:
        for context, question in progress(
            list(zip(contexts, questions, strict=True)), desc="the model's own answers", unit="answer"
        ):
            prompt = prompt_ids(tokenizer, f"{context}\n\n{question}")
            if length is not None and prompt.shape[1] >= length:
                raise ValueError(
                    f"a prompt of {prompt.shape[1]} tokens leaves no room for an answer within length={length}"
                )
            room = max_new_tokens if length is None else min(max_new_tokens, length - prompt.shape[1])
            prompt = prompt.to(model.device)
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=room,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            )[0]
            if len(ids) > prompt.shape[1] + 1:
                found.append(AnswerSample(ids.cpu(), torch.arange(prompt.shape[1], len(ids)), length))
    finally:
        model.train(mode)
    if not found:
        raise ValueError("the model answered nothing to any question; give contexts and questions that it can answer")
    return found


def prompt_ids(tokenizer: Any, text: str) -> Tensor:
    """Tokens of a user's message, (1, N), in the chat template where there is one."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]])
    return torch.tensor([tokenizer(text, verbose=False)["input_ids"]])


def profile_spans(
    model: Any,
    samples: Sequence[AnswerSample],
    *,
    block: int = 64,
    pool: Pool = "block",
    device: str | torch.device | None = None,
) -> dict[int, Tensor]:
    """Influence of every block of attention on the loss of the answers, averaged over samples.

    With torch.distributed initialised, each process profiles its own samples, at least one, and all get the average.

    Args:
        model: the dense model; its weights get no gradients.
        samples: prompts with the model's answers.
        block: tokens a block.
        pool: what absolute values are taken of, a ``"block"``'s sum or every ``"value"``.
        device: where to compute; the model's own where None.
    Returns:
        Length -> [L, G, n, n] float32, >= 0: row the query's block, column the key's; a key/value head has the sum of its query
        heads.
    Raises:
        ValueError: no sample, or one without an answer to learn from; a quantized model, whose gradients rounding hides.
    """
    if pool not in ("block", "value"):
        raise ValueError(f'pool must be "block" or "value", got {pool!r}')
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            "this model is quantized, and rounding hides gradients; profile the model that it was made of, and convert this one "
            "by that plan"
        )
    if not samples:
        raise ValueError("profiling needs at least one sample")
    if device is not None:
        model = model.to(device)
    total: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    for sample in progress(samples, desc="profile", unit="sample"):
        if not len(sample.answer) or not 1 <= int(sample.answer.min()) <= int(sample.answer.max()) < len(sample.ids):
            raise ValueError(
                f"a sample of {len(sample.ids)} tokens has its answer at positions {sample.answer.tolist()}; they must lie "
                f"between 1 and {len(sample.ids) - 1}, and there must be some"
            )
        length = -(-(sample.length or len(sample.ids)) // block) * block
        if sample.length is not None and length != sample.length:
            log.warning("length %d is no multiple of the block of %d tokens; %d is taken", sample.length, block, length)
        found = _profile_one(model, sample, length // block, block, pool)
        total[length] = total[length] + found if length in total else found
        counts[length] = counts.get(length, 0) + 1
    if dist.is_available() and dist.is_initialized():
        total, counts = _shared(total, counts, model.device if dist.get_backend() == "nccl" else torch.device("cpu"))
    return {length: total[length] / counts[length] for length in sorted(total)}


def _shared(
    total: dict[int, Tensor], counts: dict[int, int], device: torch.device
) -> tuple[dict[int, Tensor], dict[int, int]]:
    """Sums over all processes; one that has no sample of some length adds nothing there."""
    some = next(iter(total.values()))
    block = next(iter(total)) // some.shape[-1]
    lengths = sorted(total)
    most = torch.tensor(len(lengths), device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    mine = torch.tensor(lengths + [0] * (int(most) - len(lengths)), device=device)
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, mine)
    sums, numbers = {}, {}
    for length in sorted({int(n) for found in theirs for n in found} - {0}):
        n = length // block
        part = total[length] if length in total else some.new_zeros(*some.shape[:2], n, n)
        part, count = part.to(device), torch.tensor(counts.get(length, 0), device=device)
        dist.all_reduce(part)
        dist.all_reduce(count)
        sums[length], numbers[length] = part.cpu(), int(count)
    return sums, numbers


@dataclass
class _Seen:
    """What the attention of one layer saw and gave."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    scale: float


@dataclass
class _Record:
    layers: list[_Seen] = field(default_factory=list)


_records: list[_Record] = []  # the innermost recording is the last


def _recorded_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    repeats = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale)
    out.retain_grad()
    _records[-1].layers.append(_Seen(query.detach(), key.detach(), value.detach(), out, scale))
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def _recording(model: Any) -> Iterator[_Record]:
    """Attention that remembers; weights without gradients; everything as before afterwards."""
    AttentionInterface.register(RECORDER, _recorded_attention)
    before, mode = model.config._attn_implementation, model.training
    wanted = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    for p in wanted:
        p.requires_grad_(False)
    model.eval()
    model.set_attn_implementation(RECORDER)
    _records.append(_Record())
    try:
        yield _records[-1]
    finally:
        _records.pop()
        model.set_attn_implementation(before)
        model.train(mode)
        for p in wanted:
            p.requires_grad_(True)


def _profile_one(model: Any, sample: AnswerSample, n: int, block: int, pool: Pool) -> Tensor:
    """Shape (L, G, n, n)."""
    with _recording(model) as record, torch.enable_grad():
        ids = sample.ids.to(model.device)[None]
        inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
        answer = sample.answer.to(model.device)
        logits = model(inputs_embeds=inputs, use_cache=False, logits_to_keep=answer - 1).logits[0].float()
        loss = F.cross_entropy(logits, ids[0, answer])
        loss.backward()
    return torch.stack([_layer(seen, n, block, pool) for seen in record.layers])


def _layer(seen: _Seen, n: int, block: int, pool: Pool) -> Tensor:
    assert seen.out.grad is not None
    found = influence_blocks(
        seen.query[0],
        seen.key[0],
        seen.value[0],
        seen.out.detach()[0],
        seen.out.grad[0],
        n,
        block,
        scale=seen.scale,
        pool=pool,
    )
    seen.out.grad = None
    heads, groups = len(found), seen.key.shape[1]
    return found.view(groups, heads // groups, n, n).sum(1).float().cpu()


def influence_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    gradient: Tensor,
    n: int,
    block: int,
    *,
    scale: float,
    pool: Pool = "block",
) -> Tensor:
    """Absolute influence of every block of attention.

    Args:
        query, key, value: (H, N, C), (G, N, C), (G, N, C).
        out, gradient: output of the attention and dL/d(output), (H, N, C).
        n: blocks of the result, at least those that N tokens fill.
        scale: of the scores.
        pool: absolute value of each block's sum, or of each value before it is summed.
    Returns:
        (H, n, n), zero above the diagonal.
    """
    h, total, c = query.shape
    groups = len(key)
    # Low precision would lose 1 - A; what was double stays double.
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v, o, d = (x.to(wide) for x in (query, key, value, out, gradient))
    q, d = q.view(groups, h // groups, total, c), d.view(groups, h // groups, total, c)
    mean = (d * o.view_as(d)).sum(-1)
    found = query.new_zeros(h, n, n, dtype=wide)
    strip = max(block, STRIP // block * block)
    for begin in range(0, total, strip):
        end = min(total, begin + strip)
        a = (q[:, :, begin:end] @ k[:, None, :end].mT) * scale
        hidden = torch.ones(end - begin, end, dtype=torch.bool, device=a.device).triu(begin + 1)
        a = a.masked_fill(hidden, -torch.inf).softmax(-1)
        e = d[:, :, begin:end] @ v[:, None, :end].mT
        e = a / (1 - a).clamp(min=CLOSE) * (mean[:, :, begin:end, None] - e)
        if pool == "value":
            e = e.abs()
        if begin == 0:
            e[:, :, 0] = 0  # a single key cannot be cut
        rows, columns = -(-(end - begin) // block), -(-end // block)
        e = F.pad(e.flatten(0, 1), (0, columns * block - end, 0, rows * block - (end - begin)))
        pooled = e.view(h, rows, block, columns, block).sum((2, 4))
        found[:, begin // block : begin // block + rows, :columns] = pooled.abs()
    return found
