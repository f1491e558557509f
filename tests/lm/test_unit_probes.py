"""Probes of hidden units against loops over units, thresholds and positions, and against units that are known to be right."""

import pytest
import torch

from mixtura.lm.unit_probes import LEVELS, BoardProbe, board_properties


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy(n=300, units=12, properties=5, seed=0):
    g = seeded(seed)
    truth = torch.rand(n, properties, generator=g) < torch.tensor([0.5, 0.3, 0.2, 0.1, 0.05])[:properties]
    z = torch.rand(n, units, generator=g) * (torch.rand(n, units, generator=g) < 0.4)
    z[:, :properties] += truth * torch.rand(n, properties, generator=g)
    z[:, -1] = 0  # dead
    return z, truth


def f1(said, truth):
    hits, both = sum(a and b for a, b in zip(said, truth, strict=True)), sum(said) + sum(truth)
    return 1.0 if both == 0 else 2 * hits / both


def test_coverage_and_reconstruction_are_those_of_a_loop_over_units_thresholds_and_positions():
    (fit_z, fit_b), (z, b) = noisy(), noisy(seed=1)
    probe = BoardProbe(precision=0.8, support=5).fit(fit_z, fit_b)
    chosen, said = [], [[False] * 5 for _ in range(len(z))]
    peaks = fit_z.amax(0)
    for g in range(5):
        best = (-1.0, None)
        for j in range(10):
            for u in range(11):
                over = (fit_z[:, u] > LEVELS[j] * peaks[u]).tolist()
                score = f1(over, fit_b[:, g].tolist())
                best = max(best, (score, (u, LEVELS[j] * peaks[u])), key=lambda pair: pair[0])
                hits = sum(o and t for o, t in zip(over, fit_b[:, g].tolist(), strict=True))
                if sum(over) >= 5 and hits >= 0.8 * sum(over):
                    for n, value in enumerate(z[:, u].tolist()):
                        said[n][g] |= bool(value > LEVELS[j] * peaks[u])
        u, threshold = best[1]
        chosen.append(f1((z[:, u] > threshold).tolist(), b[:, g].tolist()))
    assert probe.coverage(z, b) == pytest.approx(sum(chosen) / 5, abs=1e-6)
    want = sum(f1(row, truth) for row, truth in zip(said, b.tolist(), strict=True)) / len(z)
    assert 0.1 < want < 0.99
    assert probe.reconstruction(z, b) == pytest.approx(want, abs=1e-6)
    assert probe.dead_ == 1 and len(probe.alive_) == 11


def test_units_that_are_the_properties_score_one_and_noise_scores_what_chance_gives():
    _, truth = noisy(2000)
    probe = BoardProbe().fit(truth.float(), truth)
    _, other = noisy(500, seed=2)
    assert probe.coverage(other.float(), other) == 1.0 and probe.reconstruction(other.float(), other) == 1.0
    z = torch.rand(2000, 200, generator=seeded(5))
    noise = BoardProbe().fit(z, truth)
    fresh = torch.rand(500, 200, generator=seeded(6))
    # Always saying yes gives 2p / (1 + p) a property; nothing reaches a precision of 0.95 twenty times.
    p = other.float().mean(0)
    assert noise.coverage(fresh, other) <= float((2 * p / (1 + p)).mean()) + 0.03
    assert noise.reconstruction(fresh, other) <= float((other.sum(1) == 0).float().mean()) + 0.05


def test_names_of_units_and_scales_of_units_do_not_matter():
    (fit_z, fit_b), (z, b) = noisy(), noisy(seed=1)
    order, scale = torch.randperm(12, generator=seeded(3)), 2.0 ** torch.arange(12)
    plain, moved = BoardProbe().fit(fit_z, fit_b), BoardProbe().fit((fit_z * scale)[:, order], fit_b)
    assert moved.coverage((z * scale)[:, order], b) == pytest.approx(plain.coverage(z, b))
    assert moved.reconstruction((z * scale)[:, order], b) == pytest.approx(plain.reconstruction(z, b))


def test_constant_and_rare_properties_are_dropped_and_listed():
    z, b = noisy(1000)
    more = torch.cat([b, torch.ones(1000, 1).bool(), torch.zeros(1000, 1).bool()], 1)
    more[0, 6] = True
    probe = BoardProbe(names=["a", "b", "c", "d", "e", "always", "once"]).fit(z, more)
    assert probe.dropped_ == ["always", "once"] and len(probe.properties_) == 5
    assert probe.coverage(z, more) == BoardProbe().fit(z, b).coverage(z, b)
    rows = probe.table(z, more)
    assert [row["property"] for row in rows] == ["a", "b", "c", "d", "e"] and rows[0]["unit"] == 0
    assert sum(row["f1"] for row in rows) / 5 == pytest.approx(probe.coverage(z, more))


def test_boards_become_a_fact_for_every_piece_and_square():
    boards = torch.zeros(2, 64, dtype=torch.int8)
    boards[0, 3], boards[1, 63] = 1, 12
    facts = board_properties(boards)
    assert facts.shape == (2, 768) and facts.nonzero().tolist() == [[0, 3], [1, 11 * 64 + 63]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BoardProbe(precision=0.0), r"precision must be in \(0, 1\], got 0.0"),
        (lambda: BoardProbe(support=0), "support must be at least 1"),
        (lambda: BoardProbe(least=0.5, most=0.4), "least and most must be"),
        (lambda: BoardProbe().fit(torch.rand(3, 2), torch.ones(4, 2)), "must have one length"),
        (lambda: BoardProbe().fit(torch.rand(4, 2), torch.ones(4, 2)), "no property is true in 0.002 to 0.9"),
        (lambda: BoardProbe().fit(torch.zeros(4, 2), torch.eye(4)), "no unit ever fires"),
        (lambda: BoardProbe().fit(torch.full((4, 2), torch.nan), torch.eye(4)), r"units \[0, 1\] are not finite"),
        (lambda: BoardProbe(names=["a"]).fit(torch.rand(4, 2), torch.eye(4)), "names must name 4 properties, got 1"),
        (lambda: BoardProbe().coverage(torch.rand(4, 2), torch.eye(4)), "fit the probe first"),
        (lambda: BoardProbe().fit(*noisy()).coverage(torch.rand(4, 2), torch.eye(4)), "fitted on 12 units and 5 prop"),
        (
            lambda: BoardProbe().fit(*noisy(), games=torch.arange(300) // 10).coverage(*noisy(), torch.arange(300)),
            r"games \[0, 1, 2, 3, 4\] are among those the probe was fitted on",
        ),
        (lambda: BoardProbe().fit(*noisy(), games=torch.arange(3)), "games must name 300 positions' games, got 3"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
