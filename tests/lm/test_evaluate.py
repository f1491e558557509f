"""Perplexity against hand-computed cases."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mixtura.lm.evaluate import perplexity, token_losses


class Table(nn.Module):
    """A language model whose next-token distribution is a row of a table."""

    def __init__(self, probabilities: list[list[float]]):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.logits[input_ids])


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    model = Table([[0.25] * 4] * 4)
    assert perplexity(model, torch.randint(0, 4, (5, 9))) == pytest.approx(4.0, rel=1e-5)


def test_losses_are_those_of_the_table():
    model = Table([[0.5, 0.5], [0.9, 0.1]])
    losses = token_losses(model, torch.tensor([[0, 1, 1], [1, 0, 0]]))
    want = -torch.tensor([[0.5, 0.1], [0.9, 0.5]]).log()
    torch.testing.assert_close(losses, want)


def test_the_batch_size_plays_no_part_and_the_mode_is_kept():
    model = Table(torch.rand(6, 6).softmax(-1).tolist()).train()
    rows = torch.randint(0, 6, (7, 5))
    assert perplexity(model, rows, batch_size=1) == pytest.approx(perplexity(model, rows, batch_size=100), rel=1e-6)
    assert model.training


def test_rows_of_one_token_are_refused():
    with pytest.raises(ValueError, match="L >= 2"):
        perplexity(Table([[1.0]]), torch.zeros(3, 1, dtype=torch.long))
