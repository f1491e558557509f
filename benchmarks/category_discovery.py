"""Discovering classes beside scikit-learn's two ways to a number of components: BIC over a range, and a Bayesian mixture.

20,000 rows of 64 columns from 40 Gaussians, 20 of them known. Every way's matched share of the unlabelled rows is shown beside
its time (one thread, CPU time, one round). BIC is timed for three numbers of components near the truth, which a user would
not know, and for all up to 50 by what those cost. Then embeddings of width 256 alone: time, and memory beyond the embeddings,
over growing n.

    python benchmarks/category_discovery.py           # writes docs/benchmarks/category_discovery.json
    python benchmarks/category_discovery.py --short   # a twentieth of the rows, to try it; writes nothing
"""

import sys
import time
from typing import Any

import numpy as np
import torch
from _side_by_side import alternate, median, versions, write_record
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

from mixtura.core.measure import Meter, resident_memory
from mixtura.density import CategoryDiscovery, discovery_accuracy

GROUPS, KNOWN, WIDTH = 40, 20, 64
BIC_TRIED = (36, 40, 44)
MOST = 50
BAR_SECONDS = 60
NOTES = (
    "Discovery is told the classes of half of the rows of 20 groups; the others take no labels. BIC's time for 1 to 50 "
    "components is that of the three numbers timed, scaled by components. One start each; discovery has two runs of its own."
)


def rows_of(n: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n rows around 40 centres, labels of half of the first 20 groups, and all groups."""
    rng = np.random.default_rng(seed)
    t = rng.integers(GROUPS, size=n)
    X = rng.normal(size=(GROUPS, width))[t] * 2 + rng.normal(size=(n, width))
    return X, np.where((t < KNOWN) & (rng.random(n) < 0.5), t, -1), t


def side_by_side(n: int) -> list[dict[str, Any]]:
    """Discovery, BIC and the Bayesian mixture on the same rows."""
    X, y, t = rows_of(n, WIDTH, 0)
    unlabelled = y < 0
    found: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}

    def discover() -> None:
        model = CategoryDiscovery(pca=None).fit(X, y)
        found["discovery"], counts["discovery"] = model.labels_, model.n_classes_

    def bic() -> None:
        fits = [GaussianMixture(n_components=k, random_state=0).fit(X) for k in BIC_TRIED]
        best = min(fits, key=lambda model: model.bic(X))
        found["BIC"], counts["BIC"] = best.predict(X), best.n_components

    def bayesian() -> None:
        labels = BayesianGaussianMixture(n_components=MOST, random_state=0).fit_predict(X)
        found["Bayesian"], counts["Bayesian"] = labels, len(np.unique(labels))

    times = median(alternate({"discovery": discover, "BIC": bic, "Bayesian": bayesian}, 1, 0, time.process_time))
    bic_range = times["BIC"] * (MOST * (MOST + 1) / 2) / sum(BIC_TRIED)
    rows = []
    for name, seconds in times.items():
        score = discovery_accuracy(t[unlabelled], found[name][unlabelled], range(KNOWN))
        row = {"n": n, "width": WIDTH, "way": name, "seconds": round(seconds, 2), "groups found": counts[name]}
        row |= {"matched share": round(score.all, 4), "over discovery's time": round(seconds / times["discovery"], 2)}
        if name == "discovery":
            row |= {"bar": f"under {BAR_SECONDS} s", "met": bool(seconds < BAR_SECONDS)}
        if name == "BIC":
            row["all of 1 to 50, seconds"] = round(bic_range, 1)
        print(row, flush=True)
        rows.append(row)
    return rows


def alone(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Discovery on wide embeddings: time, and memory beyond the embeddings."""
    rows = []
    for n in sizes:
        X, y, t = rows_of(n, 256, 1)
        before, start = resident_memory(), time.process_time()
        with Meter() as meter:
            model = CategoryDiscovery().fit(X, y)
        seconds = time.process_time() - start
        share = discovery_accuracy(t[y < 0], model.labels_[y < 0], range(KNOWN)).all
        row = {"n": n, "width": 256, "way": "discovery", "seconds": round(seconds, 2), "groups found": model.n_classes_}
        row |= {"matched share": round(share, 4), "bytes a row beyond X": round((meter.peak_bytes - before) / n)}
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Measure and write the record."""
    torch.set_num_threads(1)
    short = "--short" in sys.argv
    rows = side_by_side(1000 if short else 20_000)
    rows += alone((1000, 2000) if short else (25_000, 50_000, 100_000))
    if short:
        return
    header = list({key: "" for row in rows for key in row})
    payload = {
        "title": "Discovering classes",
        "what": "One fit, CPU seconds, one thread, beside scikit-learn's mixtures; then wide embeddings alone.",
        "rows": [{key: row.get(key, "") for key in header} for row in rows],
        "notes": NOTES,
        "peers": versions("scikit-learn"),
    }
    write_record("category_discovery", payload)


if __name__ == "__main__":
    main()
