"""Membership programs by thin factors and by alternating directions, against SCS through cvxpy, and their growth.

Every solver gets the same samples and shapes (5 columns, 3 groups, true covariances). First all answers are shown to have the
same objective to what each promises, and to lie above the certified bound; then each solve is timed, one thread, CPU time.
SCS runs once a data set: at n = 400 it takes minutes.

    python benchmarks/membership_programs.py      # writes docs/benchmarks/membership_programs.json
"""

import time
from typing import Any

import numpy as np
import torch
from _side_by_side import alternate, median, versions, write_record

from mixtura.claims.adjusted_sdp import Row, draw
from mixtura.density import solve_membership_sdp
from mixtura.density.semidefinite import SDPResult

K, F = 3, 5
THIN, WIDE, EXACT, PEER = "thin, r=2", "thin, r=6", "admm", "SCS"
SOLVERS: dict[str, dict[str, Any]] = {
    THIN: {"rank": 2},
    WIDE: {"rank": 2 * K},
    EXACT: {"solver": "admm", "tol": 1e-5},
    PEER: {"solver": "scs", "tol": 1e-5},
}
# n -> how many times as fast as SCS, and how much above its objective at most.
BARS = {THIN: ({240: 25, 400: 100}, 2e-3), WIDE: ({240: 10, 400: 35}, 5e-4), EXACT: ({240: 2, 400: 2}, 1e-4)}
SIDE_BY_SIDE, ALONE, GROWTH = (240, 400), (480, 960, 1920), 1.3
NOTES = (
    "Thin factors are a local method: the bound is what makes them trustworthy; it needs n x n matrices and is not timed here. "
    "Growth is the slope of log time over log n of the solves alone."
)


def samples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples and the groups' true covariances."""
    X, _, covariances = draw(Row(n, F, K, 3.5, 1.0), (1, n))
    return X, covariances


def case(n: int) -> list[dict[str, Any]]:
    """One size, all solvers: agreement, then time."""
    X, shapes = samples(n)
    answers: dict[str, SDPResult] = {}

    def solve(name: str) -> SDPResult:
        answers[name] = solve_membership_sdp(X, shapes, **SOLVERS[name])
        return answers[name]

    seconds = alternate({name: lambda name=name: solve(name) for name in (PEER, EXACT)}, 1, 0, time.process_time)
    seconds |= alternate({name: lambda name=name: solve(name) for name in (THIN, WIDE)}, 3, 1, time.process_time)
    bound = solve_membership_sdp(X, shapes, start=answers[WIDE], rank=2 * K, certify=True).lower_bound
    peer, times = answers[PEER].value, median(seconds)
    rows = []
    for name, found in answers.items():
        above = (found.value - peer) / abs(peer)
        assert found.value > bound - 1e-4 * abs(bound), f"{name} lies below the bound"
        row = {
            "n": n,
            "solver": name,
            "seconds": times[name],
            "SCS over it": times[PEER] / times[name],
            "objective": round(found.value, 3),
            "above SCS": f"{above:.1e}",
            "gap to the bound": f"{(found.value - bound) / abs(bound):.1e}",
        }
        if name in BARS:
            ratio, most = BARS[name][0][n], BARS[name][1]
            row["bar"] = f"{ratio} times as fast, {most:g} above"
            row["met"] = bool(times[PEER] / times[name] >= ratio and above <= most)
        print(row, flush=True)
        rows.append(row)
    return rows


def growth() -> tuple[list[dict[str, Any]], float]:
    """Time of thin factors alone over n, and the slope."""
    rows, sizes = [], (*SIDE_BY_SIDE, *ALONE)
    for n in sizes:
        X, shapes = samples(n)
        times = alternate({THIN: lambda X=X, shapes=shapes: solve_membership_sdp(X, shapes)}, 3, 1, time.process_time)
        rows.append({"n": n, "seconds": median(times)[THIN]})
        print(rows[-1], flush=True)
    slope = np.polyfit(np.log([r["n"] for r in rows]), np.log([r["seconds"] for r in rows]), 1)[0]
    return rows, float(slope)


def warm_over_cold() -> float:
    """Time of a solve from the answer to shapes that differ by a tenth, over that from nothing."""
    X, shapes = samples(240)
    before = solve_membership_sdp(X, 1.1 * shapes)
    rivals = {
        "warm": lambda: solve_membership_sdp(X, shapes, start=before),
        "cold": lambda: solve_membership_sdp(X, shapes),
    }
    times = median(alternate(rivals, 5, 1, time.process_time))
    return times["warm"] / times["cold"]


def main() -> None:
    """Measure and write the record."""
    torch.set_num_threads(1)
    warm = warm_over_cold()
    alone, slope = growth()
    print(f"growth n^{slope:.2f} (bar {GROWTH}), warm over cold {warm:.2f} (bar 0.5)")
    rows = [row for n in SIDE_BY_SIDE for row in case(n)]
    header = list(rows[0] | {"bar": "", "met": ""})
    payload = {
        "title": "Membership programs",
        "what": (
            f"One solve of the likelihood-adjusted program (5 columns, 3 groups), CPU seconds, one thread, beside cvxpy with SCS "
            f"at eps 1e-5. Thin factors alone, n = {', '.join(str(r['n']) for r in alone)}: "
            f"{', '.join(format(r['seconds'], '.2g') for r in alone)} s, growth n^{slope:.2f} (bar {GROWTH}). A warm start takes "
            f"{warm:.2f} of a cold one (bar 0.5)."
        ),
        "rows": [{key: row.get(key, "") for key in header} for row in rows],
        "notes": NOTES,
        "alone": alone,
        "growth": slope,
        "warm_over_cold": warm,
        "peers": versions("cvxpy", "scs", "scipy"),
    }
    write_record("membership_programs", payload)


if __name__ == "__main__":
    main()
