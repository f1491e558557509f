"""Scores of separation, against mir_eval and against least squares."""

import warnings

import numpy as np
import pytest
import torch

from mixtura.audio.separate import bss_eval, si_sdr


def three(seed: int = 0):
    """Three coloured sources and noisy, filtered estimates of them."""
    rng = np.random.default_rng(seed)
    sources = np.stack(
        [np.convolve(rng.standard_normal(6000), rng.standard_normal(9 * (i + 1)), "same") for i in range(3)]
    )
    echo = np.roll(sources, 40, axis=1) * 0.4
    mixing = np.array([[1, 0.3, 0.1], [0.2, 0.8, 0], [0, 0.1, 1]])
    return sources, mixing @ sources + echo + 0.3 * rng.standard_normal(sources.shape)


def test_sdr_sir_and_sar_equal_mir_eval():
    separation = pytest.importorskip("mir_eval").separation
    sources, estimates = three()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sdr, sir, sar, _ = separation.bss_eval_sources(sources, estimates, compute_permutation=False)
    others = np.stack([np.roll(sources, -i, axis=0) for i in range(3)])  # the target first
    found = bss_eval(torch.from_numpy(estimates), torch.from_numpy(others))
    for mine, peer in ((found.sdr, sdr), (found.sir, sir), (found.sar, sar)):
        np.testing.assert_allclose(mine.numpy(), peer, atol=0.05)


def test_one_tap_is_a_projection_onto_the_sources():
    sources, estimates = three()
    e, s = estimates[0], sources
    found = bss_eval(torch.from_numpy(e), torch.from_numpy(s), taps=1)
    target = s[0] * (e @ s[0]) / (s[0] @ s[0])
    every = s.T @ np.linalg.lstsq(s.T, e, rcond=None)[0]

    def decibels(a, b):
        return 10 * np.log10((a @ a) / (b @ b))

    assert float(found.sdr) == pytest.approx(decibels(target, e - target), abs=1e-6)
    assert float(found.sir) == pytest.approx(decibels(target, every - target), abs=1e-6)
    assert float(found.sar) == pytest.approx(decibels(every, e - every), abs=1e-6)
    assert float(si_sdr(torch.from_numpy(e), torch.from_numpy(s[0]))) == pytest.approx(float(found.sdr), abs=1e-6)


def test_loudness_and_short_filters_do_not_count():
    sources, estimates = three()
    s = torch.from_numpy(sources)
    e = torch.from_numpy(estimates[0])
    assert float(bss_eval(7 * e, s).sdr) == pytest.approx(float(bss_eval(e, s).sdr), abs=1e-6)
    filtered = torch.from_numpy(np.convolve(sources[0], [1.0, -0.5, 0.2])[:6000])
    assert float(bss_eval(filtered, s).sdr) > 40 and float(si_sdr(filtered, s[0])) < 20


@pytest.mark.parametrize(
    ("estimate", "sources", "message"),
    [
        (torch.ones(600), torch.ones(2, 500), "one more dimension"),
        (torch.ones(600), torch.stack([torch.ones(600), torch.zeros(600)]), "silent"),
        (torch.ones(100), torch.ones(2, 100), "taps must lie between 1 and the 100 samples"),
    ],
)
def test_what_cannot_be_scored_is_named(estimate, sources, message: str):
    with pytest.raises(ValueError, match=message):
        bss_eval(estimate, sources)
