"""Lines to look up: records with random keys and numbers, and questions about them, as long as one wants.

The task behind LongEval's line retrieval (Li et al. 2023): nothing in it can be guessed, so an answer shows that the model
looked at the line.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Lookup", "lookups"]

ADJECTIVES = (
    "amber brave calm dusty eager fancy gentle hollow icy jolly keen lively mellow noble odd proud quiet rapid shiny tidy upset "
    "vivid wild young zesty bold crisp damp early faint"
)
NOUNS = (
    "apple bridge candle dragon engine forest garden hammer island jacket kettle ladder magnet needle ocean pencil quartz river "
    "saddle temple urchin valley window yogurt zebra anchor basket copper desert falcon"
)
HEAD = "Below is a record of lines.\n\n"


@dataclass(frozen=True)
class Lookup:
    """A record and questions about it, as tokens.

    Attributes:
        context: tokens of the record.
        questions: tokens of each question, up to where its answer begins.
        answers: tokens of each answer.
    """

    context: list[int]
    questions: list[list[int]]
    answers: list[list[int]]

    def sequence(self, answers: Sequence[Sequence[int]] | None = None) -> tuple[list[int], list[int]]:
        """Record, questions and answers one after another, and the positions of the answers' tokens."""
        ids, at = list(self.context), list[int]()
        for question, answer in zip(self.questions, self.answers if answers is None else answers, strict=True):
            ids += question
            at += range(len(ids), len(ids) + len(answer))
            ids += answer
        return ids, at


def lookups(
    encode: Callable[[str], list[int]], *, count: int, length: int, questions: int, rng: np.random.Generator
) -> list[Lookup]:
    """Records as long as fit, with questions about different lines.

    Args:
        encode: text to tokens, without special ones.
        count: records.
        length: most tokens of a record with its questions and answers.
        questions: questions a record.
        rng: draws keys, numbers and the lines that are asked for.
    Raises:
        ValueError: a length that holds fewer lines than questions.
    """
    pairs = [f"{adjective}-{noun}" for adjective in ADJECTIVES.split() for noun in NOUNS.split()]
    found = []
    for _ in range(count):
        names = [pairs[i] for i in rng.permutation(len(pairs))]
        numbers = [str(n) for n in rng.integers(10_000, 100_000, len(names))]
        answers = [encode(number) for number in numbers]
        asked = [encode(f"\nThe REGISTER_CONTENT in line {name} is ") for name in names]
        # The longest questions that may come, so that none has to be left out afterwards.
        room = length - questions * max(len(q) + len(a) for q, a in zip(asked, answers, strict=True))
        context, lines = encode(HEAD), 0
        for name, number in zip(names, numbers, strict=True):
            line = encode(f"line {name}: REGISTER_CONTENT is {number}\n")
            if len(context) + len(line) > room:
                break
            context += line
            lines += 1
        if lines < questions:
            raise ValueError(f"{length} tokens hold {lines} lines, fewer than the {questions} that are asked for")
        picked = rng.permutation(lines)[:questions]
        found.append(Lookup(context, [asked[i] for i in picked], [answers[i] for i in picked]))
    return found
