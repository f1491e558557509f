"""Processes of wide networks: against neural-tangents, against the bare linear algebra, and what a sweep of priors costs.

Before any timing both sides are shown to agree: all eight kernels to 1e-10, predictions to 1e-8. Then they take turns in one
process, on one thread, in float64, by processor time. neural-tangents' kernels are compiled before they are timed, and its
Cholesky factor and solves are jax's; its own ``predict`` also makes the covariance of all test inputs, which nobody asked
for here, and is left out.

    python benchmarks/wide_network_process.py            # writes docs/benchmarks/wide_network_process.json
    python benchmarks/wide_network_process.py --quick    # small shapes, no record
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from _side_by_side import Ratio, alternate, median, ratio, write_record
from _tangents import kernel_function

from mixtura.density import InverseGamma, ScaleMixtureRegressor, WideNetworkKernel

NOISE, WEIGHT, BIAS = 0.1, 2.0, 0.1
SHAPES = (0.5, 1.0, 1.5, 2.0, 4.0, 8.0)  # of the priors that are swept: 36 pairs


def images(architecture: str) -> bool:
    """Whether an architecture takes images."""
    return architecture in ("cnn", "wide_resnet")


def same_kernels() -> None:
    """All architectures and activations agree with neural-tangents."""
    rng = np.random.default_rng(0)
    for architecture in ("mlp", "resnet", "cnn", "wide_resnet"):
        for activation in ("relu", "erf"):
            shape = (8, 8, 1) if images(architecture) else (10,)
            X, Y = rng.normal(size=(4, *shape)), rng.normal(size=(3, *shape))
            theirs = kernel_function(architecture, 1, activation, WEIGHT, BIAS, 1.0)(X, Y, ("nngp", "ntk"))
            ours = WideNetworkKernel(1, activation, WEIGHT, BIAS, architecture)
            np.testing.assert_allclose(ours(X, Y), theirs.nngp, rtol=1e-10)
            np.testing.assert_allclose(ours.ntk(X, Y), theirs.ntk, rtol=1e-10)
    print("all kernels agree to 1e-10")


def whole(n: int, features: int, depth: int, rounds: int) -> dict[str, Ratio]:
    """Kernel, fit and prediction with variances, on n training and n test inputs."""
    rng = np.random.default_rng(0)
    X, Z, y = rng.normal(size=(n, features)), rng.normal(size=(n, features)), rng.normal(size=n)
    kernel = WideNetworkKernel(depth, "relu", WEIGHT, BIAS)
    x, z, target = (torch.from_numpy(v) for v in (X, Z, y[:, None]))
    theirs = kernel_function("mlp", depth, "relu", WEIGHT, BIAS, 1.0)

    def ours() -> tuple[np.ndarray, np.ndarray]:
        model = ScaleMixtureRegressor(kernel, noise=NOISE, optimize=False, normalize_y=False).fit(X, y)
        found: Any = model.predict_distribution(Z)
        return found.location, found.scale * np.sqrt(model.scale_posterior_.a / model.scale_posterior_.b)

    def bare() -> tuple[torch.Tensor, torch.Tensor]:
        gram, cross = x @ x.T, x @ z.T
        gram.diagonal().add_(features)
        lower = torch.linalg.cholesky(gram)
        white = torch.linalg.solve_triangular(lower, cross, upper=False)
        return cross.T @ torch.cholesky_solve(target, lower), white.square_().sum(0)

    @jax.jit
    def peer(a: Any, b: Any, t: Any) -> Any:
        gram, cross = theirs(a, None, "nngp"), theirs(a, b, "nngp")
        lower = jnp.linalg.cholesky(gram + NOISE * jnp.eye(len(a)))
        solved = jax.scipy.linalg.cho_solve((lower, True), t)
        white = jax.scipy.linalg.solve_triangular(lower, cross, lower=True)
        return cross.T @ solved, (white**2).sum(0)

    def tangents() -> Any:
        return jax.block_until_ready(peer(X, Z, y))

    location, width = ours()
    their_location, explained = tangents()
    np.testing.assert_allclose(location, their_location, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(width**2, kernel.diag(Z) - explained + NOISE, rtol=1e-7)
    times = alternate({"ours": ours, "bare": bare, "nt": tangents}, rounds, 1, time.process_time)
    print({name: f"{seconds:.3f} s" for name, seconds in median(times).items()})
    return {"bare": ratio(times, "ours", "bare"), "neural-tangents": ratio(times, "ours", "nt")}


def gram(architecture: str, activation: str, n: int, depth: int, rounds: int) -> Ratio:
    """The Gram matrix alone."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 8, 8, 1) if images(architecture) else (n, 10))
    kernel = WideNetworkKernel(depth, activation, WEIGHT, BIAS, architecture)
    function = kernel_function(architecture, depth, activation, WEIGHT, BIAS, 1.0)
    theirs = jax.jit(lambda x: function(x, None, "nngp"))
    np.testing.assert_allclose(kernel(X), theirs(X), rtol=1e-7)
    times = alternate(
        {"ours": lambda: kernel(X), "nt": lambda: theirs(X).block_until_ready()}, rounds, 1, time.process_time
    )
    return ratio(times, "ours", "nt")


def sweep(n: int, rounds: int) -> Ratio:
    """A fit and 36 priors on it, over the fit alone."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(n, 10)), rng.normal(size=n)
    model = ScaleMixtureRegressor(WideNetworkKernel(4, "relu", WEIGHT, BIAS), noise=NOISE, optimize=False)

    def one() -> Any:
        return model.fit(X, y)

    def all_pairs() -> list[float]:
        model.fit(X, y)
        return [model.with_prior(InverseGamma(a, b)).log_evidence_ for a in SHAPES for b in SHAPES]

    times = alternate({"36 priors": all_pairs, "one": one}, rounds, 1, time.process_time)
    return ratio(times, "36 priors", "one")


def growth(sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """Seconds of a fit, and of its Gram matrix, over n."""
    rows = []
    for n in sizes:
        X, y = np.random.default_rng(0).normal(size=(n, 10)), np.zeros(n) + np.arange(n) % 7
        kernel = WideNetworkKernel(4, "relu", WEIGHT, BIAS)
        calls: dict[str, Callable[[], object]] = {
            "gram": lambda X=X, k=kernel: k(X),  # type: ignore[misc]
            "fit": lambda X=X, y=y, k=kernel: ScaleMixtureRegressor(k, optimize=False).fit(X, y),  # type: ignore[misc]
        }
        rows.append({"n": n, **median(alternate(calls, 3, 1, time.process_time))})
    return rows


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="`FanIn`")
    n, rounds = (300, 1) if quick else (2000, 5)
    same_kernels()
    found = whole(n, 10, 4, rounds)
    rows = [
        (
            "kernel, fit and predict",
            f"{n} + {n} inputs, 10 features, depth 4",
            "bare GEMM, Cholesky, solves",
            found["bare"],
            1.5,
        ),
        (
            "kernel, fit and predict",
            f"{n} + {n} inputs, 10 features, depth 4",
            "neural-tangents",
            found["neural-tangents"],
            1.0,
        ),
        ("a fit and 36 priors", f"{n} inputs", "the fit alone", sweep(n, rounds), 1.05),
    ]
    for architecture, activation, size, depth in (
        ("mlp", "relu", n, 4),
        ("mlp", "erf", n, 4),
        ("resnet", "relu", n, 4),
        ("cnn", "relu", n // 8, 4),
        ("cnn", "erf", n // 8, 4),
    ):
        measured = gram(architecture, activation, size, depth, rounds)
        rows.append(
            (
                f"Gram matrix, {architecture}, {activation}",
                f"{size} inputs, depth {depth}",
                "neural-tangents",
                measured,
                1.0,
            )
        )
    for case, size, rival, measured, bar in rows:
        print(f"{case}, {size}: {measured} of {rival}, bar {bar}: {'reached' if measured.median <= bar else 'MISSED'}")
    if quick:
        return
    payload = {
        "title": "Processes of wide networks",
        "what": (
            "Time over the rival's, float64, one thread, processor time. Kernels agree to 1e-10 and predictions to 1e-7 before "
            "anything is timed."
        ),
        "rows": [
            {"case": c, "size": s, "rival": r, "ratio": str(m), "bar": b, "reached": m.median <= b}
            for c, s, r, m, b in rows
        ],
        "notes": NOTES,
        "growth": growth((500, 1000, 2000, 4000)),
    }
    write_record("wide_network_process", payload)


NOTES = (
    "ReLU layers of dense networks take one pass in C where a compiler is there, and without one about 20 ns a pair and layer. "
    "neural-tangents 0.6.5 runs under a current jax by stepping over its package file, which imports names that jax has dropped; "
    "its layers and their compiled code are its own."
)


if __name__ == "__main__":
    main()
