"""Several processes: the model of one, whatever the shards; an error in one reaches all."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_mixture import blobs

from mixtura.density import GaussianMixture, select_components

# One script for all cases, since starting a process costs more than any fit here. Every rank writes what it found.
SCRIPT = """
import sys, warnings
from pathlib import Path
import numpy as np, torch
import torch.distributed as dist
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from mixtura.density import GaussianMixture, select_components
from mixtura.core.processes import join

folder, cuts = Path(sys.argv[1]), [int(c) for c in sys.argv[2].split(",")]
everything = np.load(folder / "x.npz")
X, y, w = everything["X"], everything["y"], everything["w"]
rank = join("auto").rank
mine = slice(cuts[rank], cuts[rank + 1])
found = {}

def keep(name, model):
    found[name + " means"] = model.means_
    found[name + " covariances"] = model.covariances_
    found[name + " bounds"] = model.lower_bounds_
    found[name + " labels"] = model.labels_

for covariance in ("full", "tied", "diag", "spherical"):
    keep(covariance, GaussianMixture(3, covariance=covariance, random_state=0).fit(X[mine]))
keep("labels", GaussianMixture(3, random_state=0).fit(X[mine], y[mine], sample_weight=w[mine]))
keep("batches", GaussianMixture(3, random_state=0).fit(np.array_split(X[mine], 3)))
keep("gaps", GaussianMixture(3, missing="expect", random_state=0).fit(np.where(everything["gone"], np.nan, X)[mine]))
far = np.vstack([X.mean(0), X[0], X[0] + 1e6])
unit = np.stack([np.eye(3)] * 3)
keep("reseeded", GaussianMixture(3, means_init=far, weights_init=np.full(3, 1 / 3), precisions_init=unit).fit(X[mine]))
found["unseeded"] = GaussianMixture(3, init="random", max_iter=2).fit(X[mine]).means_
model, curve = select_components(X[mine], range(1, 5), random_state=0)
found["curve"] = curve.bic

def complaint(*arguments):
    try:
        GaussianMixture(3, random_state=0).fit(*arguments)
    except ValueError as error:
        return str(error)
    return "no error"

broken = X[mine].copy()
if rank == 0:
    broken[1, 2] = np.nan
found["nan"] = complaint(broken)
found["features"] = complaint(X[mine][:, :2] if rank == 1 else X[mine])
found["labels differ"] = complaint(X[mine], y[mine][: -1 if rank == 0 else None])
alone = GaussianMixture(1, distributed=False).fit(X[:50] + rank)
found["alone"] = alone.means_
np.savez(folder / f"rank{rank}.npz", **found)
dist.destroy_process_group()
"""

CUTS = {"2 uneven shards": [0, 37, 400], "3 shards, one empty": [0, 150, 150, 400]}


@pytest.fixture(scope="module", params=sorted(CUTS))
def run(request, tmp_path_factory):
    """The samples, and what each rank found."""
    folder, cuts = tmp_path_factory.mktemp("shards"), CUTS[request.param]
    X, cloud = blobs(400)
    rng = np.random.default_rng(0)
    given = {
        "X": X,
        "y": np.where(rng.random(400) < 0.1, cloud, -1),
        "w": rng.uniform(0, 2, size=400),
        "gone": rng.random(X.shape) < 0.1,
    }
    np.savez(folder / "x.npz", **given)
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(cuts) - 1}"]
    done = subprocess.run(
        [*command, str(folder / "script.py"), str(folder), ",".join(map(str, cuts))],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [np.load(folder / f"rank{r}.npz") for r in range(len(cuts) - 1)]
    assert not list(Path(folder).glob("rank9*"))
    return given, cuts, ranks


def alone(given):
    """The same fits in one process."""
    X = given["X"]
    for covariance in ("full", "tied", "diag", "spherical"):
        yield covariance, GaussianMixture(3, covariance=covariance, random_state=0).fit(X)
    yield "labels", GaussianMixture(3, random_state=0).fit(X, given["y"], sample_weight=given["w"])
    yield "batches", GaussianMixture(3, random_state=0).fit(X)
    yield "gaps", GaussianMixture(3, missing="expect", random_state=0).fit(np.where(given["gone"], np.nan, X))
    far = np.vstack([X.mean(0), X[0], X[0] + 1e6])
    unit = np.stack([np.eye(3)] * 3)
    yield "reseeded", GaussianMixture(3, means_init=far, weights_init=np.full(3, 1 / 3), precisions_init=unit).fit(X)


def test_every_rank_has_the_model_of_one_process(run):
    given, cuts, ranks = run
    for name, want in alone(given):
        for r, found in enumerate(ranks):
            np.testing.assert_allclose(found[f"{name} means"], want.means_, rtol=1e-10, err_msg=name)
            np.testing.assert_allclose(found[f"{name} covariances"], want.covariances_, rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(found[f"{name} bounds"], want.lower_bounds_, rtol=1e-10)
            np.testing.assert_array_equal(found[f"{name} labels"], want.labels_[cuts[r] : cuts[r + 1]])
        assert all((found[f"{name} means"] == ranks[0][f"{name} means"]).all() for found in ranks)


def test_ranks_without_a_seed_start_from_the_same_samples(run):
    _, _, ranks = run
    assert all((found["unseeded"] == ranks[0]["unseeded"]).all() for found in ranks)


def test_every_rank_chooses_by_the_same_curve(run):
    given, _, ranks = run
    want = select_components(given["X"], range(1, 5), random_state=0)[1].bic
    for found in ranks:
        np.testing.assert_allclose(found["curve"], want, rtol=1e-8)


def test_an_error_in_one_process_is_raised_in_all(run):
    _, cuts, ranks = run
    for found in ranks:
        assert str(found["nan"]).startswith("process 0: X contains 1 NaN values, the first in row 1, column 2")
        assert str(found["labels differ"]).startswith("process 0: y has")
        if cuts[1] != cuts[2]:
            assert (
                str(found["features"])
                == "process 0 has samples of 3 features and process 1 of 2; all must have the same"
            )


def test_a_process_may_fit_alone(run):
    given, _, ranks = run
    for r, found in enumerate(ranks):
        np.testing.assert_allclose(found["alone"][0], given["X"][:50].mean(0) + r)
