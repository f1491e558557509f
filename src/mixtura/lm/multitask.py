"""One model, many languages, two tasks: translation from pairs, and repairing damaged text of one language.

A source begins with its task and the language that is wanted, ``<mt> <2de> ...``; the target is the text and the end token. The
two tasks take turns, one a step. Within a task a row's language is drawn with probability proportional to n^(1/temperature)
of its n texts, so that small languages are seen more often than their share.

Shapes: B rows, S positions of the source, L of the target; both are padded at the right to the longest row.
Source: 2109.10465, sec. 4; temperature sampling: Arivazhagan et al. 2019 (1907.05019), sec. 4; the noise: BART (1910.13461),
sec. 2.2, and Lample et al. 2018 (1711.00043), sec. 2.3. The paper doesn't say how much noise; the defaults are ours.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from mixtura.lm.token_loss import IGNORED

__all__ = [
    "MASK",
    "TASKS",
    "TaskMixture",
    "denoise",
    "language_token",
    "multitask_tokenizer",
    "task_token",
    "texts_by_language",
    "translate",
]

TASKS = ("mt", "dae")
MASK = "<mask>"

Batch = dict[str, Tensor]


def task_token(task: str) -> str:
    """The token that names a task: ``<mt>`` translates, ``<dae>`` (denoising autoencoder) repairs."""
    return f"<{task}>"


def language_token(language: str) -> str:
    """The token that asks for a language: ``<2de>``."""
    return f"<2{language}>"


def multitask_tokenizer(texts: Sequence[str], vocab_size: int, languages: Sequence[str]) -> Any:
    """Byte-pair tokenizer of ``vocab_size`` tokens, those of tasks and languages, padding and the mask included.

    Raises:
        ValueError: no room for them beside the 256 bytes and the end token.
    """
    from mixtura.lm.tokens import byte_pair_tokenizer

    extra = ["<pad>", MASK, *map(task_token, TASKS), *map(language_token, languages)]
    if vocab_size < 257 + len(extra):
        raise ValueError(
            f"vocab_size must be at least {257 + len(extra)} (256 bytes, an end token and {len(extra)} for padding, mask, tasks "
            f"and languages), got {vocab_size}"
        )
    tokenizer = byte_pair_tokenizer(texts, vocab_size - len(extra))
    tokenizer.add_special_tokens({"pad_token": "<pad>", "mask_token": MASK})
    tokenizer.add_tokens(extra[2:], special_tokens=True)
    return tokenizer


def denoise(
    ids: Tensor,
    *,
    mask_id: int,
    ratio: float = 0.35,
    span: float = 3.5,
    drop: float = 0.1,
    blank: float = 0.1,
    shuffle: int = 3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A damaged copy of a text, from which a denoising autoencoder restores it.

    In this order: tokens are dropped; the rest are shuffled locally; some are blanked; and spans are replaced by one mask each.

    Args:
        ids: token ids of the text alone, int64, shape (L,).
        mask_id: the mask token.
        ratio: share of the remaining tokens that spans cover.
        span: mean length of a span, Poisson distributed; one of length 0 only puts a mask in.
        drop, blank: probability that a token is dropped, or replaced by the mask.
        shuffle: how many places a token may move.
        generator: source of chance.
    Returns:
        int64, shape (L',).
    Raises:
        ValueError: a share outside [0, 1], span <= 0, shuffle < 0, or ids that are no vector.
    Example:
        >>> denoise(torch.arange(4), mask_id=9, ratio=0, drop=0, blank=0, shuffle=0)
        tensor([0, 1, 2, 3])
    """
    if ids.dim() != 1:
        raise ValueError(f"ids must have shape (L,), got {tuple(ids.shape)}")
    for name, share in (("ratio", ratio), ("drop", drop), ("blank", blank)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is a share and must be between 0 and 1, got {share}")
    if not span > 0 or shuffle < 0:
        raise ValueError(f"span must be > 0 and shuffle >= 0, got {span} and {shuffle}")

    def uniform(n: int) -> Tensor:
        return torch.rand(n, generator=generator, device=ids.device)

    ids = ids[uniform(len(ids)) >= drop]
    # A token overtakes another by at most `shuffle` places: its rank is its place plus less than shuffle + 1.
    ids = ids[(torch.arange(len(ids), device=ids.device) + uniform(len(ids)) * (shuffle + 1)).argsort(stable=True)]
    ids = ids.masked_fill(uniform(len(ids)) < blank, mask_id)
    return _infilled(ids, round(ratio * len(ids)), span, mask_id, generator)


def _infilled(ids: Tensor, budget: int, span: float, mask_id: int, generator: torch.Generator | None) -> Tensor:
    """``budget`` tokens in spans, each replaced by one mask."""
    if budget == 0:
        return ids
    lengths = torch.poisson(torch.full((2 * budget + 8,), span, device=ids.device), generator=generator).long()
    # Spans until the budget is spent; the last is cut. Should all together fall short, the last takes the rest.
    ends = lengths.cumsum(0)
    k = min(int((ends < budget).sum()) + 1, len(lengths))
    lengths = lengths[:k].clone()
    lengths[-1] += budget - lengths.sum()
    kept = len(ids) - budget
    # Every arrangement of k masks among the kept tokens is equally likely.
    slots = torch.randperm(kept + k, generator=generator, device=ids.device)[:k].sort().values
    is_mask = torch.zeros(kept + k, dtype=torch.bool, device=ids.device)
    is_mask[slots] = True
    removed = torch.zeros(kept + k, dtype=torch.long, device=ids.device)
    removed[slots] = lengths
    # A kept token stood as far to the right as it stands now, without the masks before it and with what they cover.
    origin = torch.arange(kept + k, device=ids.device) - is_mask.long().cumsum(0) + removed.cumsum(0)
    return ids[origin.clamp(max=len(ids) - 1)].masked_fill(is_mask, mask_id)


def translate(
    model: Any, tokenizer: Any, texts: Sequence[str], language: str, *, length: int = 128, **options: Any
) -> list[str]:
    """Texts in another language.

    Args:
        model, tokenizer: of an encoder-decoder that was trained on :class:`TaskMixture`.
        texts: in a language that it was trained to translate from.
        language: to translate into.
        length: longest source in tokens; the rest is cut off. Most new tokens, unless ``max_new_tokens`` is given.
        options: of ``generate``: ``num_beams``, ``do_sample`` and so on.
    Raises:
        ValueError: a language that the tokenizer has no token for.
    """
    vocabulary = tokenizer.get_vocab()
    lead = [task_token("mt"), language_token(language)]
    if missing := [token for token in lead if token not in vocabulary]:
        known = sorted(token[2:-1] for token in vocabulary if token.startswith("<2"))
        raise ValueError(f"the tokenizer lacks {missing}; languages must be among {known}, got {language!r}")
    device = next(model.parameters()).device
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    first = [vocabulary[token] for token in lead]
    sources = [torch.tensor([*first, *row[: length - 3], tokenizer.eos_token_id]) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=tokenizer.pad_token_id).to(device)
    made = model.generate(
        input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), **{"max_new_tokens": length, **options}
    )
    return [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]


class TaskMixture(IterableDataset[Batch]):
    """Batches of a task a step, endless; :meth:`batch_at` gives the one of a step, whatever was drawn before.

    Give it to a ``DataLoader`` with ``batch_size=None``; several workers share the steps among them.

    Args:
        tokenizer: has the tokens of the tasks and the languages, see :func:`multitask_tokenizer`.
        pairs: (source language, target language) -> texts with their translations.
        mono: language -> texts to repair; by default the targets, and with them the sources, of the pairs.
        tasks: those that take turns.
        temperature: 1 draws languages by their number of texts, infinity all alike.
        batch_size: rows B.
        length: longest source and longest target, in tokens with the ones added; the rest is cut off.
        noise: options of :func:`denoise`.
        seed: of everything that is drawn.
    Raises:
        ValueError: an unknown task, no pair or an empty one (it is named), a token that the tokenizer lacks, temperature
            <= 0, or a size below 1 (length below 4).
    """

    def __init__(
        self,
        tokenizer: Any,
        pairs: Mapping[tuple[str, str], Sequence[tuple[str, str]]],
        mono: Mapping[str, Sequence[str]] | None = None,
        *,
        tasks: Sequence[str] = TASKS,
        temperature: float = 5.0,
        batch_size: int = 32,
        length: int = 128,
        noise: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(tasks) - set(TASKS)):
            raise ValueError(f"tasks must be among {list(TASKS)}, got {unknown}")
        if not tasks:
            raise ValueError(f"tasks must name at least one of {list(TASKS)}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if batch_size < 1 or length < 4:
            raise ValueError(f"batch_size must be at least 1 and length at least 4, got {batch_size} and {length}")
        self.tasks, self.temperature = tuple(tasks), temperature
        self.batch_size, self.length, self.seed = batch_size, length, seed
        self.noise = dict(noise or {})
        if mono is None:
            mono = texts_by_language(pairs)
        self._check(pairs, mono)
        self.pad = tokenizer.pad_token_id
        self.end = tokenizer.eos_token_id
        self.mask = tokenizer.convert_tokens_to_ids(MASK)
        vocabulary = tokenizer.get_vocab()
        languages = {target for _, target in pairs} if "mt" in self.tasks else set()
        languages |= set(mono) if "dae" in self.tasks else set()
        wanted = [*map(task_token, self.tasks), *map(language_token, sorted(languages))]
        wanted += [MASK] if "dae" in self.tasks else []
        if missing := [token for token in wanted if token not in vocabulary]:
            raise ValueError(f"the tokenizer lacks {missing}; make one with multitask_tokenizer, or add them")
        if self.pad is None or self.end is None or self.pad == self.end:
            raise ValueError("the tokenizer must have a padding and an end token that differ")
        self.prefix = {token: vocabulary[token] for token in wanted}
        self.pairs = {
            key: (self._encoded(tokenizer, [a for a, _ in part]), self._encoded(tokenizer, [b for _, b in part]))
            for key, part in (pairs.items() if "mt" in self.tasks else ())
        }
        self.mono = {key: self._encoded(tokenizer, part) for key, part in (mono.items() if "dae" in self.tasks else ())}

    def shares(self, task: str) -> dict[Any, float]:
        """Probability of each pair (``mt``) or language (``dae``) in a row of the task."""
        sizes = {key: len(part[0]) for key, part in self.pairs.items()} if task == "mt" else _sizes(self.mono)
        weights = {key: n ** (1.0 / self.temperature) for key, n in sizes.items()}
        total = sum(weights.values())
        return {key: weight / total for key, weight in weights.items()}

    def batch_at(self, step: int) -> Batch:
        """``input_ids`` and ``attention_mask`` (B, S), and ``labels`` (B, L), -100 at padding."""
        task = self.tasks[step % len(self.tasks)]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        shares = self.shares(task)
        keys = list(shares)
        weights = torch.tensor([shares[key] for key in keys], dtype=torch.float64)
        picks = torch.multinomial(weights, self.batch_size, replacement=True, generator=generator).tolist()
        rows = [self._row(task, keys[pick], generator) for pick in picks]
        return self.padded(rows)

    def only(self, languages: Sequence[str]) -> TaskMixture:
        """The same mixture with these languages as targets alone.

        Raises:
            ValueError: a task that has none of them.
        """
        part = copy.copy(self)
        part.pairs = {key: texts for key, texts in self.pairs.items() if key[1] in languages}
        part.mono = {key: texts for key, texts in self.mono.items() if key in languages}
        for task, texts in (("mt", part.pairs), ("dae", part.mono)):
            if task in self.tasks and not texts:
                raise ValueError(f"languages must name a target of the task {task!r}, got {list(languages)}")
        return part

    def rows(self, task: str, key: Any, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """All rows of a pair (``mt``) or language (``dae``), source and target, in order; for measuring."""
        generator = torch.Generator().manual_seed(seed)
        n = len(self.pairs[key][0]) if task == "mt" else len(self.mono[key])
        return [self._row(task, key, generator, i) for i in range(n)]

    def padded(self, rows: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        """Rows of source and target as one batch."""
        sources, targets = ([row[side] for row in rows] for side in (0, 1))
        ids = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True, padding_value=self.pad)
        labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED)
        return {"input_ids": ids, "attention_mask": (ids != self.pad).long(), "labels": labels}

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        step, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while True:
            yield self.batch_at(step)
            step += stride

    def _row(self, task: str, key: Any, generator: torch.Generator, i: int | None = None) -> tuple[Tensor, Tensor]:
        if task == "mt":
            sources, targets = self.pairs[key]
            language = key[1]
        else:
            sources = targets = self.mono[key]
            language = key
        i = int(torch.randint(len(targets), (), generator=generator)) if i is None else i
        source, target = sources[i][: self.length - 3], targets[i][: self.length - 1]
        if task == "dae":
            source = denoise(target, mask_id=self.mask, generator=generator, **self.noise)[: self.length - 3]
        lead = torch.tensor([self.prefix[task_token(task)], self.prefix[language_token(language)]])
        end = torch.tensor([self.end])
        return torch.cat([lead, source, end]), torch.cat([target, end])

    def _check(self, pairs: Mapping[Any, Sequence[Any]], mono: Mapping[str, Sequence[str]]) -> None:
        if "mt" in self.tasks:
            if not pairs:
                raise ValueError("pairs must hold at least one pair of languages for the task 'mt', got none")
            if empty := [key for key, part in pairs.items() if not len(part)]:
                raise ValueError(f"pairs holds no text for {empty}")
        if "dae" in self.tasks and (not mono or any(not len(part) for part in mono.values())):
            raise ValueError(
                f"mono must hold texts of every language for the task 'dae', got { {k: len(v) for k, v in mono.items()} }"
            )

    def _encoded(self, tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
        # Characters beyond what the length can hold need not be encoded: no token is longer than a few dozen.
        ids = tokenizer([text[: 16 * self.length] for text in texts], add_special_tokens=False)["input_ids"]
        return [torch.tensor(row[: self.length], dtype=torch.long) for row in ids]


def texts_by_language(pairs: Mapping[tuple[str, str], Sequence[tuple[str, str]]]) -> dict[str, list[str]]:
    """Texts of every language in the pairs, each once, in order."""
    found: dict[str, dict[str, None]] = {}
    for (source, target), part in pairs.items():
        for a, b in part:
            found.setdefault(source, {})[a] = None
            found.setdefault(target, {})[b] = None
    return {language: list(texts) for language, texts in found.items()}


def _sizes(parts: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    return {key: len(part) for key, part in parts.items()}
