"""Gated regression: fits against a plain PyTorch gradient fit at equal likelihood, an EM iteration beside its products.

    python benchmarks/gated_regression.py [--quick]

Equal likelihood: the rival runs until its mean log density is within 1e-6 nats of ours, or its steps are used up; both
start from the same parameters.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _side_by_side import Ratio, alternate, median, ratio, write_record

from mixtura.density.gated_em import Given, expectation, experts_step, fit_em
from mixtura.density.gated_law import GateRule, Layout, Likelihood, Pairs, slow_log_density
from mixtura.density.gated_polish import polish
from mixtura.density.gated_regression import GatedRegression
from mixtura.density.rates import Truth
from mixtura.density.voronoi import MixingMeasure

CLOSE = 1e-6  # nats a pair
STEPS = 20_000
RATE = 0.05  # of Adam, the best of 0.01, 0.02, 0.05 and 0.1 at 4000 pairs


def two_lines(gate: str) -> Truth:
    """The truth of the temperature claim; the top-k gate has no temperature."""
    rule = {"linear": GateRule("temperature"), "tanh": GateRule("activation"), "topk": GateRule("top-k", top_k=2)}[gate]
    tau = 1.0 if gate == "topk" else 0.6
    if gate == "topk":
        atoms = MixingMeasure.of(
            [0.6, 1.35, 1.0], [[4.0], [-4.0], [0.0]], tau, [[2.0], [-2.0], [0.5]], [1.5, -1.5, -3.0], [0.3, 0.3, 0.25]
        )
    else:
        atoms = MixingMeasure.of([1.65, 1.0], [[3.0], [0.0]], tau, [[2.0], [-1.5]], [1.0, -1.0], [0.25, 0.36])
    return Truth(atoms, rule)


class Plain(torch.nn.Module):
    """The same law as anyone would write it in PyTorch: samples first, gradients by autograd."""

    def __init__(self, truth: Truth, theta: torch.Tensor) -> None:
        super().__init__()
        parts = truth.layout.split(theta)
        self.rule = truth.rule
        self.slope = torch.nn.Parameter(parts.slope[0, :-1].clone())
        self.bias = torch.nn.Parameter(parts.bias[0, :-1].clone())
        self.coef = torch.nn.Parameter(parts.coef[0].clone())
        self.intercept = torch.nn.Parameter(parts.intercept[0].clone())
        self.log_variance = torch.nn.Parameter(parts.log_variance[0].clone())
        self.log_tau = torch.nn.Parameter(parts.log_temperature[0].clone())

    def forward(self, X: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(self.slope[:1])
        score = X @ torch.cat([self.slope, zero]).T
        value = torch.tanh(score) if self.rule.kind == "activation" else score
        logits = value + torch.cat([self.bias, zero[:, 0]])
        if self.rule.has_temperature:
            logits = logits / self.log_tau.exp()
        if self.rule.kind == "top-k":
            kept = score.topk(self.rule.top_k, dim=-1).indices
            mask = torch.full_like(logits, -torch.inf).scatter(-1, kept, 0.0)
            logits = logits + mask
        normal = torch.distributions.Normal(X @ self.coef.T + self.intercept, (self.log_variance / 2).exp())
        return torch.logsumexp(logits.log_softmax(-1) + normal.log_prob(y[:, None]), -1).mean()


def plain_fit(
    truth: Truth, theta: torch.Tensor, X: torch.Tensor, y: torch.Tensor, goal: float, optimiser: str
) -> Plain:
    """Gradient ascent until the goal is reached or the steps are used up."""
    model = Plain(truth, theta)
    if optimiser == "Adam":
        steps: Any = torch.optim.Adam(model.parameters(), lr=RATE)
        for _ in range(STEPS):
            steps.zero_grad()
            loss = -model(X, y)
            if -loss.item() >= goal:
                break
            loss.backward()
            steps.step()
        return model
    steps = torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe", tolerance_change=0.0)
    for _ in range(STEPS // 20):

        def closure() -> torch.Tensor:
            steps.zero_grad()
            loss = -model(X, y)
            loss.backward()
            return loss

        if -float(steps.step(closure).detach()) >= goal:
            break
    return model


def fits(gate: str, n: int, optimiser: str, rounds: int) -> tuple[Ratio, Ratio]:
    """Time of ours over the rival's from the same start, and what the rival lacks of our likelihood, in CLOSE."""
    truth = two_lines(gate)
    X, y = truth.sample(n, [torch.Generator().manual_seed(0)])
    free = truth.layout.free(truth.rule, temperature=True)
    noise = 0.2 * free * torch.randn(len(free), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = truth.theta + noise
    given = Given(truth.rule, truth.layout, Pairs.of(X, y), free)
    goal = float(polish(given, start).value) - CLOSE
    same = Plain(truth, start)(X[0], y[0]).item()
    assert abs(same - float(given.likelihood.value(start))) < 1e-10
    missing = goal + CLOSE - plain_fit(truth, start, X[0], y[0], goal, optimiser)(X[0], y[0]).item()
    times = alternate(
        {
            "ours": lambda: polish(given, start),
            "plain": lambda: plain_fit(truth, start, X[0], y[0], goal, optimiser),
        },
        rounds,
        0,
        time.process_time,
    )
    return ratio(times, "ours", "plain"), Ratio(missing, missing, missing)


def problem(n: int, d: int, e: int, rule: GateRule) -> tuple[Given, torch.Tensor]:
    """A large problem and parameters somewhere."""
    g = torch.Generator().manual_seed(0)
    layout = Layout(e, d)
    X, y = torch.randn(n, d, generator=g, dtype=torch.float64), torch.randn(n, generator=g, dtype=torch.float64)
    theta = 0.5 * torch.randn(1, layout.n_parameters, generator=g, dtype=torch.float64)
    free = layout.free(rule, temperature=False)
    theta[:, ~free] = 0.0
    return Given(rule, layout, Pairs.of(X, y), free), theta


def iteration(given: Given, theta: torch.Tensor, whole: bool) -> torch.Tensor:
    """One iteration of EM as a fit does it, or its expectation and experts only."""
    if whole:
        return fit_em(given, theta, max_iter=1, tol=0.0)[0]
    return experts_step(given, theta, expectation(given, theta)[1])


def beside_products(n: int, d: int, e: int, rounds: int, whole: bool) -> Ratio:
    """One iteration over the two products it cannot do without: scores with lines, and moments."""
    given, theta = problem(n, d, e, GateRule())
    x_dN = given.pairs.x[0]
    lines = torch.randn(2 * e, d + 1, dtype=torch.float64)
    r_EN = torch.rand(e, n, dtype=torch.float64)
    features = torch.randn((d + 1) * (d + 2) // 2 + d + 2, n, dtype=torch.float64)

    def products() -> None:
        lines @ x_dN
        r_EN @ features.T

    times = alternate(
        {"ours": lambda: iteration(given, theta, whole), "products": products}, rounds, 1, time.process_time
    )
    return ratio(times, "ours", "products")


def sparse_over_dense(n: int, d: int, e: int, k: int, rounds: int, whole: bool) -> Ratio:
    """One iteration of a top-k gate over that of a dense one."""
    calls: dict[str, Callable[[], object]] = {}
    for name, rule in (("dense", GateRule()), ("sparse", GateRule("top-k", top_k=k))):
        given, theta = problem(n, d, e, rule)
        calls[name] = lambda g=given, t=theta: iteration(g, t, whole)  # type: ignore[misc]
    return ratio(alternate(calls, rounds, 1, time.process_time), "sparse", "dense")


def per_row(n: int, rounds: int) -> Ratio:
    """The likelihood over that of a loop over rows and experts."""
    truth = two_lines("topk")
    X, y = truth.sample(n, [torch.Generator().manual_seed(0)])
    likelihood = Likelihood(truth.rule, truth.layout, Pairs.of(X, y))
    slow = slow_log_density(truth.rule, truth.layout, truth.theta[0], X[0], y[0]).mean()
    assert abs(float(likelihood.value(truth.theta) - slow)) < 1e-10
    times = alternate(
        {
            "ours": lambda: likelihood.at(truth.theta),
            "loop": lambda: slow_log_density(truth.rule, truth.layout, truth.theta[0], X[0], y[0]),
        },
        rounds,
        1,
        time.process_time,
    )
    return ratio(times, "ours", "loop")


def whole_fits(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Seconds of `GatedRegression(2).fit` with its five starts over n, and of one EM run."""
    rows = []
    for n in sizes:
        X, y = (v[0].numpy() for v in two_lines("linear").sample(n, [torch.Generator().manual_seed(0)]))
        given = Given(
            GateRule(),
            Layout(2, 1),
            Pairs.of(*map(torch.from_numpy, (X, y))),
            Layout(2, 1).free(GateRule(), temperature=False),
        )
        start = two_lines("linear").theta.clone()
        start[:, -1] = 0.0
        calls: dict[str, Callable[[], object]] = {
            "fit": lambda X=X, y=y: GatedRegression(2).fit(X, y),  # type: ignore[misc]
            "10 iterations of EM": lambda g=given, s=start: fit_em(g, s, max_iter=10, tol=0.0),  # type: ignore[misc]
        }
        rows.append({"n": n, **median(alternate(calls, 3, 1, time.process_time))})
    return rows


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    np.seterr(all="raise", under="ignore")
    rounds = 1 if quick else 3
    rows: list[dict[str, Any]] = []
    for gate in ("linear", "tanh", "topk"):
        for optimiser in ("Adam", "LBFGS"):
            n = 500 if quick else 4000
            found, missing = fits(gate, n, optimiser, rounds)
            short = "" if missing.median <= 2 * CLOSE else f", which stays {missing.median:.1e} nats short"
            rows.append(
                {"case": f"fit, {gate} gate, n={n}", "rival": f"plain PyTorch, {optimiser}{short}", "ratio": found}
            )
    n = 20_000 if quick else 200_000
    for whole, part in ((False, "expectation and experts"), (True, "whole iteration of EM")):
        case = f"{part}, n={n}, d=8"
        rows += [
            {
                "case": f"{case}, 8 experts",
                "rival": "the two products it contains",
                "ratio": beside_products(n, 8, 8, rounds, whole),
                "bar": 4.0,
            },
            {
                "case": f"{case}, top 2 of 16",
                "rival": "dense gate of 16",
                "ratio": sparse_over_dense(n, 8, 16, 2, rounds, whole),
                "bar": 1.3,
            },
        ]
    rows += [
        {
            "case": "likelihood and gradient, top-k, n=2000",
            "rival": "a loop over rows (no gradient)",
            "ratio": per_row(2000, rounds),
            "bar": 1 / 50,
        },
    ]
    for row in rows:
        row.setdefault("bar", 1.0)
        row["reached"] = row["ratio"].median <= row["bar"]
        print(
            f"{row['case']}: {row['ratio']} of {row['rival']}, bar {row['bar']:.2f}: {'reached' if row['reached'] else 'MISSED'}"
        )
    growth = whole_fits((2000, 8000) if quick else (2000, 8000, 32_000))
    for line in growth:
        print(line)
    if quick:
        return
    payload = {
        "title": "Gated regression",
        "what": (
            "Time over the rival's, float64, one thread, processor time. Both start at the same parameters and have the same "
            "likelihood there to 1e-10; the rival runs until it is within 1e-6 nats a pair of ours."
        ),
        "rows": [{**row, "ratio": str(row["ratio"]), "bar": round(row["bar"], 3)} for row in rows],
        "notes": "Whole fits with five starts take "
        + ", ".join(f"{r['fit']:.2f} s at n={r['n']:,}" for r in growth)
        + ".",
        "growth": growth,
    }
    write_record("gated_regression", payload)


if __name__ == "__main__":
    main()
