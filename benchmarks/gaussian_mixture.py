"""Mixtures of Gaussians against scikit-learn and pomegranate: time, memory, and how both grow.

All sides start from the same mixture and take the same number of steps; before any timing their likelihoods are compared.
scikit-learn and we read the samples once more than there are steps, for the labels and the last likelihood. pomegranate does
not, so it is timed with one step more: as many readings. One thread and processor time, so that other work on the machine
changes little.

    python benchmarks/gaussian_mixture.py            # all, writes docs/benchmarks/gaussian_mixture.json and .png
    python benchmarks/gaussian_mixture.py --quick    # small shapes, no record
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from _side_by_side import RECORDS, Ratio, alternate, median, ratio, write_record
from pomegranate.distributions import Normal
from pomegranate.gmm import GeneralMixtureModel
from sklearn.mixture import GaussianMixture as Peer

from mixtura.core.gaussian import Gaussians
from mixtura.core.measure import Meter, resident_memory
from mixtura.core.natural_form import Frame, Pass, block_rows
from mixtura.core.page import new_figure
from mixtura.density import GaussianMixture

SAME = 1e-4  # nats a sample that two fits of the same steps may differ by (float32 of scikit-learn is 3e-5 off)


@dataclass(frozen=True)
class Case:
    """A shape, and the bars: ratios of the peer's time to ours that must be reached."""

    n: int
    f: int
    c: int
    covariance: str
    steps: int = 4
    bar_64: float = 1.0
    bar_32: float = 1.0
    pomegranate: float = 0.0  # 0: not compared

    def __str__(self) -> str:
        return f"{self.covariance}, {self.n:,} x {self.f}, {self.c} components"


CASES = [
    Case(200_000, 32, 32, "full", 2, 3.0, 4.0),
    Case(40_000, 32, 32, "full", 5, pomegranate=6.0),
    Case(100_000, 8, 16, "full", pomegranate=1.0),
    Case(10_000, 64, 64, "full", pomegranate=1.0),
    Case(1_000_000, 8, 64, "diag", 2, 2.0),
    Case(100_000, 32, 32, "diag", bar_64=2.0, pomegranate=1.0),
    Case(100_000, 32, 32, "tied"),
    Case(100_000, 32, 32, "spherical"),
]
QUICK = [Case(10_000, 32, 32, "full", 5, 3.0, 4.0, 6.0), Case(20_000, 8, 64, "diag", 5, 2.0, 1.0, 1.0)]


@dataclass(frozen=True)
class Data:
    """Samples of overlapping clouds, each with a covariance of its own, and the start: the clouds' centres, unit spreads."""

    X: np.ndarray
    start: dict[str, Any]


def data(case: Case) -> Data:
    """The samples of a case, float64."""
    rng, n, f, c = np.random.default_rng(0), case.n, case.f, case.c
    cloud = rng.integers(c, size=n)
    means, spread = rng.normal(scale=1.5, size=(c, f)), rng.uniform(0.5, 1.5, size=(c, f))
    inverse = {"full": np.stack([np.eye(f)] * c), "tied": np.eye(f), "diag": np.ones((c, f)), "spherical": np.ones(c)}
    start = {"means_init": means, "weights_init": np.full(c, 1 / c), "precisions_init": inverse[case.covariance]}
    return Data(means[cloud] + spread[cloud] * rng.normal(size=(n, f)), start)


def ours(given: Data, case: Case, steps: int | None = None) -> GaussianMixture:
    """Our fit."""
    more = {"tol": 0.0, "max_iter": steps or case.steps, **given.start}
    return GaussianMixture(case.c, covariance=case.covariance, reg_unit="absolute", **more).fit(given.X)


def peer(given: Data, case: Case, steps: int | None = None) -> Peer:
    """scikit-learn's fit."""
    more = {"tol": 0.0, "max_iter": steps or case.steps, **given.start}
    return Peer(case.c, covariance_type=case.covariance, **more).fit(given.X)


def pomegranate(X: torch.Tensor, given: Data, case: Case, steps: int) -> GeneralMixtureModel:
    """pomegranate's fit; it knows full and diag, in float32."""
    eye = torch.eye(case.f) if case.covariance == "full" else torch.ones(case.f)
    parts = [
        Normal(torch.tensor(mean, dtype=torch.float32), eye.clone(), covariance_type=case.covariance, min_cov=1e-6)
        for mean in given.start["means_init"]
    ]
    weights = torch.full((case.c,), 1 / case.c)
    return GeneralMixtureModel(parts, priors=weights, tol=-float("inf"), max_iter=steps).fit(X)


def product_rate(case: Case, dtype: torch.dtype) -> float:
    """Seconds a sample of the two matrix products alone, on the shapes of a block."""
    rows = block_rows(case.f, case.c, "full", dtype, "cpu")
    p = 1 + case.f + case.f * (case.f + 1) // 2
    theta, phi, r = (torch.randn(s, dtype=dtype) for s in ((case.c, p), (p, rows), (case.c, rows)))
    times = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(8):
            torch.mm(theta, phi)
            torch.mm(r, phi.mT)
        times.append((time.process_time() - began) / 8 / rows)
    return min(times)


def compare(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Times of one shape in both types; a row a rival."""
    wide = data(case)
    narrow = replace(wide, X=wide.X.astype(np.float32))
    some = wide.X[:20_000]
    truth = peer(wide, case).score(some)
    assert abs(ours(wide, case).score(some) - truth) < 1e-7, "the same steps must give the same likelihood"
    assert abs(ours(narrow, case).score(some) - truth) < SAME
    rivals: dict[str, Any] = {
        "ours 64": lambda: ours(wide, case),
        "peer 64": lambda: peer(wide, case),
        "ours 32": lambda: ours(narrow, case),
        "peer 32": lambda: peer(narrow, case),
    }
    if case.pomegranate:
        tensor = torch.from_numpy(narrow.X)
        found = pomegranate(tensor, wide, case, case.steps)
        far = abs(float(found.log_probability(tensor[: len(some)]).mean()) - truth)
        print(f"  pomegranate's likelihood differs by {far:.1g} nats a sample", flush=True)
        rivals["pomegranate"] = lambda: pomegranate(tensor, wide, case, case.steps + 1)
    times = alternate(rivals, rounds=rounds, warmup=0, clock=time.process_time)
    rows = [
        _row(f"{case}: scikit-learn over ours, float64", ratio(times, "peer 64", "ours 64"), case.bar_64),
        _row(f"{case}: scikit-learn over ours, float32", ratio(times, "peer 32", "ours 32"), case.bar_32),
    ]
    if case.covariance == "full":
        best = ratio(times, "peer 64", "ours 32")
        bar = 6.0 if case.n == 200_000 else 1.0
        rows.append(_row(f"{case}: scikit-learn float64 over ours float32, likelihoods equal to 1e-4", best, bar))
    if case.pomegranate:
        rows.append(
            _row(f"{case}: pomegranate over ours, float32", ratio(times, "pomegranate", "ours 32"), case.pomegranate)
        )
    seconds = median(times)
    print("  seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()), flush=True)
    return rows


def memory(case: Case) -> list[dict[str, Any]]:
    """Peak memory above the samples of both, in MB."""
    given = data(case)
    few = replace(given, X=given.X[:5000])
    ours(few, case, 1), peer(few, case, 1)  # what is loaded and kept once is no part of a fit
    rows = []
    for name, call, bar in (("ours", ours, 64.0), ("scikit-learn", peer, None)):
        before = resident_memory()
        with Meter() as meter:
            call(given, case, 1)
        used = (meter.peak_bytes - before) / 1e6
        rows.append(
            {
                "case": f"{case}: peak memory above the samples, {name}, MB",
                "measured": f"{used:.0f}",
                "bar": "" if bar is None else f"<= {bar:.0f}",
                "reached": "" if bar is None else used <= bar,
            }
        )
    return rows


def share_of_products(case: Case) -> dict[str, Any]:
    """How much of one pass the two matrix products take, against the same products alone."""
    X = torch.from_numpy(data(replace(case, n=min(case.n, 40_000))).X)
    rng = np.random.default_rng(0)
    mixture = Gaussians.build(
        torch.full((case.c,), 1 / case.c).double(),
        torch.from_numpy(rng.normal(size=(case.c, case.f))),
        torch.eye(case.f).double().expand(case.c, -1, -1),
        "full",
    )
    frame, rows = Frame(X.mean(0), X.std(0)), block_rows(case.f, case.c, "full", torch.float64, "cpu")
    times = []
    for _ in range(3):
        began = time.process_time()
        run = Pass(frame.enter(mixture), frame)
        for block in X.split(rows):
            run.add(block)
        run.statistics()
        times.append((time.process_time() - began) / len(X))
    share = product_rate(case, torch.float64) / min(times)
    return {
        "case": f"{case}: the two products alone over a whole pass, float64",
        "measured": f"{share:.2f}",
        "bar": ">= 0.55",
        "reached": share >= 0.55,
    }


def growth(path: Any, scale: int) -> dict[str, list[tuple[int, float, float]]]:
    """Seconds a step over n, F and C for both, and the picture."""
    base = Case(20_000 // scale, 16, 16, "full")
    axes = {
        "samples n": [Case(base.n * k, 16, 16, "full") for k in (1, 2, 4, 8)],
        "features F": [Case(base.n, f, 16, "full") for f in (4, 8, 16, 32, 64, 128)],
        "components C": [Case(base.n, 16, c, "full") for c in (4, 8, 16, 32, 64)],
    }
    formula = {
        "samples n": lambda k: k.n,
        "features F": lambda k: k.f * (k.f + 3),
        "components C": lambda k: k.c,
    }
    figure = new_figure(12.0, 4.0)
    panels = figure.subplots(1, 3)
    found: dict[str, list[tuple[int, float, float]]] = {}
    for panel, (name, cases) in zip(panels, axes.items(), strict=True):
        rows = []
        for case in cases:
            given = data(case)
            calls = {"a": partial(ours, given, case, 1), "b": partial(peer, given, case, 1)}
            times = alternate(calls, rounds=3, warmup=0, clock=time.process_time)
            x = {"samples n": case.n, "features F": case.f, "components C": case.c}[name]
            rows.append((x, min(times["a"]) / 2, min(times["b"]) / 2))
        found[name] = rows
        xs = [row[0] for row in rows]
        panel.loglog(xs, [row[2] for row in rows], "s--", color="#9a9aa0", label="scikit-learn")
        panel.loglog(xs, [row[1] for row in rows], "o-", color="#0072B2", label="mixtura")
        shape = np.array([float(formula[name](case)) for case in cases])
        panel.loglog(xs, shape / shape[-1] * rows[-1][1], ":", color="#D55E00", label="n C F (F + 3), scaled")
        panel.set_xticks(xs, [f"{x:,}" for x in xs])
        panel.minorticks_off()
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds a step, one thread")
    panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"full covariance, float64; where not varied n = {base.n:,}, F = 16, C = 16", fontsize=10)
    figure.savefig(path, dpi=130)
    return found


def _row(case: str, found: Ratio, bar: float) -> dict[str, Any]:
    reached = found.median >= bar
    print(f"{case}: {found} (bar {bar}) {'' if reached else 'MISSED'}", flush=True)
    return {"case": case, "measured": str(found), "bar": f">= {bar:g}", "reached": reached}


def main() -> None:
    """Run everything and write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small shapes, no record")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    for case in QUICK if quick else CASES:
        rows += compare(case, rounds=2 if quick else 3)
    rows += memory(QUICK[0] if quick else CASES[0])
    rows.append(share_of_products(CASES[0]))
    picture = RECORDS / "gaussian_mixture.png" if not quick else "/tmp/gaussian_mixture.png"
    grown = growth(picture, 4 if quick else 1)
    for row in rows[-3:]:
        print(row)
    for name, line in grown.items():
        print(name, [(x, f"{a:.3f}", f"{b:.3f}") for x, a, b in line])
    if not quick:
        write_record(
            "gaussian_mixture",
            {
                "title": "Mixtures of Gaussians",
                "what": (
                    "A few steps of EM and the labels, from the same start, against scikit-learn and pomegranate: ratio of "
                    "the rival's processor time to ours on one thread (above 1 we are faster), median of the rounds with the "
                    "lowest and the highest."
                ),
                "rows": rows,
                "growth": grown,
                "notes": (
                    "![growth with samples, features and components](gaussian_mixture.png)\n\nTime of a step grows as "
                    "n C F (F + 3); the dotted lines have that shape."
                ),
            },
        )


if __name__ == "__main__":
    main()
