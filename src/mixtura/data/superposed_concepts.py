"""Inputs in which more concepts than dimensions lie over one another, with the list of those that are there.

Made up, and honest as a test of whether hidden units stand for concepts: the true concepts are known, the input shows them in
superposition, and nothing tells a model which is which. 192 concepts belong to 16 topics; an input shows two topics, and
each of their 24 concepts with probability 1/6.

    x = sum of strength_c a_c,   y = sum of tanh(2 strength_c) b_c over the shown concepts,   strength uniform in [0.5, 1.5]

a_c and b_c are fixed random directions in 64 dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SuperposedConcepts"]


DIRECTIONS = 500_000  # distance of the directions' stream from those of the steps


@dataclass(frozen=True, kw_only=True)
class SuperposedConcepts:
    """The task; two of the same seed are the same.

    Attributes:
        width: dimensions of input and target.
        concepts, topics: numbers of both; every topic has equally many concepts.
        shown_topics: topics of an input.
        shown: concepts of an input on average, over its topics.
        seed: of the directions and of every batch.
    """

    width: int = 64
    concepts: int = 192
    topics: int = 16
    shown_topics: int = 2
    shown: float = 4.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.topics < 1 or self.concepts % self.topics:
            raise ValueError(f"topics must divide concepts={self.concepts}, got {self.topics}")
        if not 1 <= self.shown_topics <= self.topics:
            raise ValueError(f"shown_topics must be between 1 and topics={self.topics}, got {self.shown_topics}")
        most = self.shown_topics * self.concepts // self.topics
        if not 0 < self.shown <= most:
            raise ValueError(
                f"shown must be above 0 and at most {most}, the concepts of the shown topics, got {self.shown}"
            )
        # A stream of its own: a layer that starts from the same small seed would start with the concepts' directions as rows.
        draw = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 - DIRECTIONS)
        directions = torch.randn(2, self.concepts, self.width, generator=draw) * self.width**-0.5
        object.__setattr__(self, "_directions", directions)

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets (size, width) and shown concepts (size, concepts), bool, of a step; equal for equal steps.

        Example:
            >>> x, y, shown = SuperposedConcepts().batch(0, 5)
            >>> x.shape, y.shape, shown.shape
            (torch.Size([5, 64]), torch.Size([5, 64]), torch.Size([5, 192]))
        """
        draw = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step)
        each = self.concepts // self.topics
        topics_NS = torch.rand(size, self.topics, generator=draw).argsort(-1)[:, : self.shown_topics]
        open_NM = torch.zeros(size, self.topics, dtype=torch.bool).scatter(1, topics_NS, True)
        chance = self.shown / (self.shown_topics * each)
        shown_NC = open_NM.repeat_interleave(each, 1) & (torch.rand(size, self.concepts, generator=draw) < chance)
        strength_NC = (0.5 + torch.rand(size, self.concepts, generator=draw)) * shown_NC
        into, out = self._directions  # type: ignore[attr-defined]
        return strength_NC @ into, (2 * strength_NC).tanh() @ out, shown_NC
