"""Blending pairs: counted pixels, the law of clipped boxes, and targets in the same proportion."""

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest

from mixtura.core.blend import draw_shares, mix_pairs, soft_cross_entropy, soft_targets


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_mixup_is_the_weighted_mean_of_each_pair(lam):
    x, other = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    mixed = mix_pairs(x, other, lam)
    torch.testing.assert_close(mixed.inputs, lam * x + (1 - lam) * other)
    assert float(mixed.lam) == pytest.approx(lam)
    assert torch.equal(mix_pairs(x, other, 1.0).inputs, x) and torch.equal(mix_pairs(x, other, 0.0).inputs, other)


def test_a_share_a_row_mixes_each_row_by_its_own():
    x, other, lam = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0.0, 0.2, 0.7, 1.0])
    got = mix_pairs(x, other, lam).inputs
    for i in range(4):
        torch.testing.assert_close(got[i], mix_pairs(x[i : i + 1], other[i : i + 1], lam[i]).inputs[0])


def test_the_share_after_cutmix_is_the_counted_one_at_the_borders_too():
    # 10,000 draws on a lopsided image; ones from x, zeros from the other, so the mean is the share that is left.
    n, shape = 10_000, (1, 7, 12)
    x, other = torch.ones(n, *shape), torch.zeros(n, *shape)
    drawn = draw_shares(1.0, n, generator=generator())
    mixed = mix_pairs(x, other, drawn, "cutmix", generator(1))
    counted = mixed.inputs.flatten(1).sum(1) / 84
    # A quotient of small integers and one minus its complement: one rounding apart in float32.
    torch.testing.assert_close(mixed.lam, counted, rtol=0, atol=1e-6)
    # The clipped box of a naive lam would be another: most draws that touch a border differ.
    assert ((mixed.lam - drawn).abs() > 0.01).float().mean() > 0.5
    clipped = mixed.inputs[:, 0, 0, 0] == 0
    assert clipped.any() and (mixed.inputs[:, 0, 3, 6] == 0).any()


def test_the_mean_area_of_the_box_is_that_of_the_clipped_law():
    height, width, n = 9, 16, 50_000
    x = torch.ones(n, 1, height, width)
    lam = draw_shares(2.0, n, generator=generator(3))
    area = 1 - mix_pairs(x, torch.zeros_like(x), lam, "cutmix", generator(4)).lam.double().mean()

    def expected(side: int, length: int) -> float:
        places = [min(side, c - length // 2 + length) - max(0, c - length // 2) for c in range(side)]
        return sum(max(0, covered) for covered in places) / side / side

    # E over lam by quadrature; given lam, row and column are independent.
    sides = np.sqrt(1 - beta.ppf((np.arange(4000) + 0.5) / 4000, 2, 2))
    want = sum(expected(height, int(height * r)) * expected(width, int(width * r)) for r in sides) / 4000
    assert abs(float(area) - want) < 0.01 * want


def test_one_share_for_the_batch_means_one_box_for_the_batch():
    x = torch.ones(6, 2, 8, 8)
    mixed = mix_pairs(x, torch.zeros_like(x), 0.5, "cutmix", generator())
    assert mixed.lam.shape == () and all(torch.equal(image, mixed.inputs[0]) for image in mixed.inputs)
    rows = mix_pairs(x, torch.zeros_like(x), torch.full((6,), 0.5), "cutmix", generator())
    assert rows.lam.shape == (6,) and not all(torch.equal(image, rows.inputs[0]) for image in rows.inputs)


def test_cutmix_pastes_the_other_into_x_and_limits_hold():
    x, other = torch.randn(3, 1, 6, 6), torch.randn(3, 1, 6, 6)
    mixed = mix_pairs(x, other, torch.full((3,), 0.6), "cutmix", generator())
    from_x, from_other = mixed.inputs == x, mixed.inputs == other
    assert (from_x ^ from_other).all()
    kept = mix_pairs(x, other, 1.0, "cutmix", generator())
    assert torch.equal(kept.inputs, x) and float(kept.lam) == 1


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_shares_follow_the_beta_law_and_repeat_with_their_generator(alpha):
    drawn = draw_shares(alpha, 4000, generator=generator(5))
    # One test in 10,000 fails by chance.
    assert kstest(drawn.double().numpy(), beta(alpha, alpha).cdf).pvalue > 1e-4
    assert torch.equal(drawn, draw_shares(alpha, 4000, generator=generator(5)))
    assert draw_shares(alpha, generator=generator()).shape == ()


def test_targets_hold_the_share_of_the_class_and_the_rest_evenly():
    y = torch.tensor([2, 0])
    torch.testing.assert_close(
        soft_targets(y, torch.tensor([0.4, 1.0]), 3), torch.tensor([[0.2, 0.2, 0.6], [1.0, 0.0, 0.0]])
    )
    pair = soft_targets(y, 0.25, 3, other=torch.tensor([1, 0]))
    torch.testing.assert_close(pair, torch.tensor([[0.0, 0.75, 0.25], [1.0, 0.0, 0.0]]))


def test_soft_cross_entropy_is_torchs_and_stays_finite_for_huge_logits():
    logits, targets = torch.randn(6, 4), torch.rand(6, 4).softmax(1)
    want = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), want)
    assert soft_cross_entropy(logits, targets, "none").shape == (6,)
    torch.testing.assert_close(soft_cross_entropy(logits, targets, "sum"), 6 * want)
    assert torch.isfinite(soft_cross_entropy(torch.tensor([[1e4, -1e4]]), torch.tensor([[0.5, 0.5]])))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: mix_pairs(x, x[:2], 0.5), ValueError, r"must have one shape, got \(3, 4\) and \(2, 4\)"),
        (lambda x: mix_pairs(x, x, 0.5, "cutmix"), ValueError, r"cutmix needs images .* got \(3, 4\)"),
        (lambda x: mix_pairs(x, x, 0.5, "paste"), ValueError, "op must be one of"),
        (lambda x: mix_pairs(x, x, 1.5), ValueError, "lam is a share and must be between 0 and 1, got 1.5"),
        (lambda x: mix_pairs(x, x, float("nan")), ValueError, "between 0 and 1, got nan"),
        (lambda x: mix_pairs(x, x, torch.rand(2)), ValueError, r"have shape \(3,\), one a row, got \(2,\)"),
        (lambda x: draw_shares(0.0), ValueError, "alpha must be > 0, got 0.0"),
        (lambda x: soft_targets(torch.tensor([3]), 0.5, 3), ValueError, r"y must lie in \[0, 3\), got 3 to 3"),
        (lambda x: soft_targets(torch.tensor([0.0]), 0.5, 3), TypeError, "y must hold integers, got torch.float32"),
        (lambda x: soft_targets(torch.tensor([0]), 0.5, 1), ValueError, "num_classes must be at least 2, got 1"),
        (lambda x: soft_cross_entropy(x, x[:2]), ValueError, "logits and targets must have one shape"),
        (lambda x: soft_cross_entropy(x, x, "max"), ValueError, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
    ],
)
def test_what_can_not_be_mixed_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4))
