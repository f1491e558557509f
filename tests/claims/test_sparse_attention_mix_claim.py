"""What the claim of attention spans measures."""

import numpy as np
import pytest
import torch

from mixtura.claims.sparse_attention_mix import CLAIM, look_up, ratios, shuffled
from mixtura.data.registers import lookups
from mixtura.lm.attention import SpanPlan


class Oracle(torch.nn.Module):
    """Says the next token of the row with a certainty, except at every fifth of the places asked for."""

    device = torch.device("cpu")

    def __init__(self, wrong: bool):
        super().__init__()
        self.wrong = wrong

    def forward(self, ids, use_cache, logits_to_keep):
        logits = torch.zeros(1, len(logits_to_keep), 200)
        logits[0, torch.arange(len(logits_to_keep)), ids[0, logits_to_keep + 1]] = 9.0
        if self.wrong:
            logits[0, ::5] = 0
            logits[0, ::5, 199] = 9.0
        return type("Output", (), {"logits": logits})


def test_numbers_count_whole_and_losses_by_digit():
    found = lookups(lambda text: [ord(c) for c in text], count=2, length=800, questions=3, rng=np.random.default_rng(0))
    loss, hits = look_up(Oracle(wrong=False), found)
    assert hits == 1 and loss == pytest.approx(float(torch.tensor([9.0] + [0.0] * 199).logsumexp(0)) - 9, rel=1e-5)
    worse, none = look_up(Oracle(wrong=True), found)
    assert none == 0 and worse == pytest.approx(loss + 9 / 5, rel=1e-5)


def test_dealing_spans_by_chance_keeps_their_sum():
    plan = SpanPlan([[64.0, 128.0, 32.0], [16.0, 16.0, 200.0]], [[0.0, 0.5, 0.0], [0.1, 0.0, 0.0]], block=16)
    dealt = shuffled(plan, np.random.default_rng(0))
    assert dealt != plan and dealt.density(512) == pytest.approx(plan.density(512))
    pairs = lambda p: sorted(zip(np.ravel(p.alphas), np.ravel(p.betas), strict=True))  # noqa: E731
    assert pairs(dealt) == pairs(plan)


def test_ratios_are_those_of_losses_over_the_whole_cache():
    figures = {"dense_loss": 1.0, "dense_hits": 0.5, "dense_long_loss": 2.0}
    for percent in (50, 25):
        losses = {"uniform": 3.0, "layers": 1.5, "heads": 1.2, "shuffled": 2.0}
        figures |= {f"{name}_{percent}_loss": loss for name, loss in losses.items()}
        figures |= {f"heads_{percent}_hits": 0.45, f"uniform_{percent}_hits": 0.1}
    figures |= {"heads_long_loss": 2.3, "uniform_long_loss": 3.0}
    found = ratios(figures)
    assert found["over_uniform_50"] == pytest.approx(0.1) and found["over_layers_25"] == pytest.approx(0.4)
    assert found["shuffled_25"] == pytest.approx(5) and found["kept_50"] == pytest.approx(0.9)
    assert found["over_uniform_long"] == pytest.approx(0.3)
    assert {check.figure for check in CLAIM.checks} <= set(found)
