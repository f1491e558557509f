"""Continue a prompt: greedy, sampled, or contrasted with the model's own lesser experts."""

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mixtura.core.measure import Meter

__all__ = ["Decode", "Speed", "cache_bytes", "generate", "parse_rule", "speed"]

Decode = Literal["greedy", "sample", "self-contrast"]
DECODES: tuple[Decode, ...] = ("greedy", "sample", "self-contrast")


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    decode: Decode = "greedy",
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    contrast: str = "rank:2",
    alpha: float = 0.1,
    beta: float = 0.5,
    chat: bool = False,
    seed: int = 0,
) -> str:
    """Text that continues ``prompt``.

    Args:
        model, tokenizer: a causal language model and its tokenizer.
        prompt: what to continue; not empty.
        decode: ``"greedy"``, ``"sample"`` or ``"self-contrast"`` (a mixture of experts only).
        max_new_tokens: longest continuation, >= 1.
        temperature, top_p: of sampling.
        contrast: weak routing of self-contrast, as :func:`parse_rule` reads it.
        alpha, beta: mask and strength of self-contrast.
        chat: wrap the prompt in the tokenizer's chat template.
        seed: of sampling.
    Returns:
        The new text, without the prompt and without special tokens.
    Raises:
        ValueError: an unknown way to decode, an empty prompt, a prompt longer than the model's context.
    """
    if decode not in DECODES:
        raise ValueError(f"decode must be one of {list(DECODES)}, got {decode!r}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    ids = _encode(tokenizer, prompt, chat).to(next(model.parameters()).device)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens, and with max_new_tokens={max_new_tokens} that is more than "
            f"the model's context of {limit}; shorten one of them"
        )
    # Sampling inside transformers draws from the global generator; it is put back afterwards.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if decode == "self-contrast":
            from mixtura.lm.decode.self_contrast import generate as contrasted

            new: Any = contrasted(
                model, ids, weak=parse_rule(contrast), alpha=alpha, beta=beta, max_new_tokens=max_new_tokens
            )
        else:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if decode == "sample" else {}
            new = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **({"do_sample": False} | sampling),
            )
    return str(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))


def parse_rule(text: str) -> Any:
    """A routing rule from ``rank:2``, ``ranks:2,3``, ``top:1``, ``random:1`` or ``threshold:0.4``."""
    from mixtura.lm.decode.routing import RoutingRule

    match = re.fullmatch(r"(rank|ranks|top|random|threshold):([\d.,]+)", text)
    if match is None:
        raise ValueError(f"a routing must look like rank:2, ranks:2,3, top:1, random:1 or threshold:0.4, got {text!r}")
    kind, value = match.groups()
    try:
        if kind == "ranks":
            return RoutingRule.ranks([int(part) for part in value.split(",")])
        if kind == "threshold":
            return RoutingRule.threshold(float(value))
        return getattr(RoutingRule, kind)(int(value))
    except ValueError as error:
        raise ValueError(f"routing {text!r} cannot be read: {error}") from error


@dataclass(frozen=True)
class Speed:
    """Tokens a second of reading a prompt and of writing one token after another; bytes of keys and values after the prompt."""

    prefill: float
    decode: float
    cache: int


@torch.inference_mode()
def speed(model: Any, ids: torch.Tensor, *, new_tokens: int = 16) -> Speed:
    """Measure greedy generation of one row, once, after a warm-up.

    Args:
        model: a causal language model.
        ids: prompt, shape (1, L).
        new_tokens: steps of decoding, one token each with the cache.
    """
    mode = model.training
    model.eval()
    ids = ids.to(next(model.parameters()).device)
    try:
        model(input_ids=ids[:, :8], use_cache=False)
        with Meter() as prefill:
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token, cache = out.logits[:, -1:].argmax(-1), cache_bytes(out.past_key_values)
        with Meter() as decode:
            for _ in range(new_tokens):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
    finally:
        model.train(mode)
    return Speed(ids.shape[1] / prefill.seconds, new_tokens / decode.seconds, cache)


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache of transformers holds; a cache that counts its own (``nbytes``) is asked."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    kept = [tensor for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    if not prompt.strip():
        raise ValueError("the prompt is empty; give some text to continue")
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("this tokenizer has no chat template; leave chat off")
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    return torch.tensor([tokenizer(prompt)["input_ids"]])
