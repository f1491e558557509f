"""What a hidden unit stands for, in words, and how well the words tell where it fires: detection scoring without a judge model.

For a unit, positions of the text at which it fires are drawn evenly over the tenths of its activation, and as many at which it
does not. Half of them teach a rule, the other half test it. A rule looks at one of three things about a position: the token, the
token before it, or the kind of characters in the token; it says "fires" for the values that were seen to fire more often than
not. Which of the three is decided by leaving out one example at a time, so that a rule does not win by heart.

Shapes: N rows, L positions, U units.
Source: Paulo et al. 2024 (2410.13928), sec. 4.1 (detection), with the rule in place of a language model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["KINDS", "Judge", "UnitRule", "detection_score", "kind_of", "mean_score"]

KINDS = ("lower case", "Capital", "UPPER CASE", "digits", "space", "brackets", "quotes", "punctuation", "other")
ASPECTS = ("token", "token before", "characters")
EXAMPLES = 100  # of each kind, for a unit; half of them to learn from
FEWEST = 20  # places at which a unit must fire to be judged

# (explanation, contexts with the token in question between guillemets) -> whether the unit fires there
Judge = Callable[[str, Sequence[str]], Sequence[bool]]


@dataclass(frozen=True)
class UnitRule:
    """A unit in words.

    Attributes:
        unit: its index.
        explanation: the rule, for a person.
        score: share of the test examples that it gets right; one half by chance.
        fires: share of all positions at which the unit fires.
        strongest: its largest activation.
    """

    unit: int
    explanation: str
    score: float
    fires: float
    strongest: float


def kind_of(token: str) -> int:
    """Index in :data:`KINDS` of a token's characters."""
    text = token.strip()
    if not text:
        return KINDS.index("space")
    if text.isdigit():
        return KINDS.index("digits")
    if text.isalpha():
        return 0 if text.islower() else 2 if len(text) > 1 and text.isupper() else 1
    if all(c in "()[]{}<>" for c in text):
        return KINDS.index("brackets")
    if all(c in "'\"`«»„“”‚‘’" for c in text):
        return KINDS.index("quotes")
    return KINDS.index("other") if any(c.isalnum() for c in text) else KINDS.index("punctuation")


def detection_score(
    activations: Tensor,
    ids: Tensor,
    tokenizer: Any,
    *,
    units: Sequence[int] | None = None,
    judge: Judge | None = None,
    seed: int = 0,
) -> list[UnitRule]:
    """Explain units by rules and score the explanations.

    Args:
        activations: of U units, (N, L, U); a unit fires where it is above 0.
        ids: token ids, (N, L).
        tokenizer: its tokenizer.
        units: names of the U columns; default: 0, 1, ...
        judge: who says from the explanation where a unit fires, in place of the rule itself.
        seed: of the drawn examples.
    Returns:
        One rule for every unit that fires, and does not, at :data:`FEWEST` positions and more; the others cannot be judged
        and are left out.
    Raises:
        ValueError: shapes that do not fit, or a judge that does not answer for each example.
    """
    n_units = activations.shape[-1]
    if activations.shape[:2] != ids.shape:
        raise ValueError(
            f"activations (N, L, U) and ids (N, L) must agree, got {tuple(activations.shape)} and {tuple(ids.shape)}"
        )
    names = list(range(n_units)) if units is None else list(units)
    if len(names) != n_units:
        raise ValueError(f"units must name {n_units} columns, got {len(names)}")
    aspects = _aspects(ids, tokenizer)
    rules = []
    for column, unit in enumerate(names):
        values = activations[:, 1:, column].flatten()  # the first position has no token before it
        draw = torch.Generator().manual_seed(seed * 1_000_003 + unit)
        places, labels = _examples(values, draw)
        if not len(places):
            continue
        learn, test = places[::2], places[1::2]
        aspect, chosen = _rule(aspects[:, learn], labels[::2])
        explanation = _words(aspect, chosen, aspects[aspect, learn], labels[::2], tokenizer)
        if judge is None:
            said = torch.isin(aspects[aspect, test], chosen)
        else:
            said = torch.as_tensor(judge(explanation, _contexts(ids, test, tokenizer)), dtype=torch.bool)
            if said.shape != test.shape:
                raise ValueError(f"judge must answer for {len(test)} examples, got {len(said)} answers")
        rules.append(
            UnitRule(
                unit=unit,
                explanation=explanation,
                score=float((said == labels[1::2]).float().mean()),
                fires=float((activations[..., column] > 0).float().mean()),
                strongest=float(activations[..., column].max()),
            )
        )
    return rules


def mean_score(rules: Sequence[UnitRule]) -> float:
    """Mean detection score; NaN where no unit could be judged."""
    return sum(rule.score for rule in rules) / len(rules) if rules else float("nan")


def _aspects(ids: Tensor, tokenizer: Any) -> Tensor:
    """Token, token before and kind of characters of every position but the first of each row: (3, N (L - 1))."""
    known, where = ids.unique(return_inverse=True)
    kinds = torch.tensor([kind_of(tokenizer.decode([token])) for token in known.tolist()])
    return torch.stack((ids[:, 1:].flatten(), ids[:, :-1].flatten(), kinds[where][:, 1:].flatten()))


def _examples(values: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places and whether the unit fires there, shuffled; empty for a unit that cannot be judged."""
    fires, silent = (values > 0).nonzero().flatten(), (values <= 0).nonzero().flatten()
    n = min(EXAMPLES, len(fires), len(silent))
    if n < FEWEST:
        return fires[:0], fires[:0].bool()
    order = fires[values[fires].argsort()]
    # One place out of each of n equal spans of the sorted activations: all tenths alike.
    offsets = torch.rand(n, generator=draw, dtype=torch.float64)
    picks = ((torch.arange(n) + offsets) * len(order) / n).long().clamp(max=len(order) - 1)
    quiet = silent[torch.randperm(len(silent), generator=draw)[:n]]
    places = torch.cat((order[picks], quiet))
    labels = torch.arange(2 * n) < n
    mix = torch.randperm(2 * n, generator=draw)
    return places[mix], labels[mix]


def _rule(aspects: Tensor, labels: Tensor) -> tuple[int, Tensor]:
    """The aspect (3, M) that tells best, each example judged by the others, and the values for which it says yes."""
    best = (-1.0, 0, labels[:0].long())
    for i, values in enumerate(aspects):
        seen, where = values.unique(return_inverse=True)
        yes = torch.bincount(where, labels.float(), minlength=len(seen))
        no = torch.bincount(where, (~labels).float(), minlength=len(seen))
        without = (yes[where] - labels.float()) > (no[where] - (~labels).float())
        right = float((without == labels).float().mean())
        if right > best[0]:
            best = (right, i, seen[yes > no])
    return best[1], best[2]


def _words(aspect: int, chosen: Tensor, values: Tensor, labels: Tensor, tokenizer: Any) -> str:
    if not len(chosen):
        return "nothing that its token, the one before or its characters would tell"
    seen, counts = values[labels].unique(return_counts=True)
    often = [v for v in seen[counts.argsort(descending=True, stable=True)].tolist() if v in set(chosen.tolist())][:6]
    if ASPECTS[aspect] == "characters":
        return "tokens of " + " or ".join(KINDS[v] for v in often)
    shown = " ".join(repr(tokenizer.decode([v])) for v in often)
    more = f" and {len(chosen) - len(often)} others" if len(chosen) > len(often) else ""
    return f"{'' if ASPECTS[aspect] == 'token' else 'what follows '}{shown}{more}"


def _contexts(ids: Tensor, places: Tensor, tokenizer: Any, around: int = 8) -> list[str]:
    width = ids.shape[1] - 1
    out = []
    for place in places.tolist():  # only where somebody else judges
        row, at = ids[place // width].tolist(), place % width + 1
        before, after = tokenizer.decode(row[max(0, at - around) : at]), tokenizer.decode(row[at + 1 : at + 1 + around])
        out.append(f"{before}«{tokenizer.decode([row[at]])}»{after}")
    return out
