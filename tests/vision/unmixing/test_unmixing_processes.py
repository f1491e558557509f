"""Several processes that unmix together: the spectra of one, whatever the shards; an error in one reaches all."""

import os
import subprocess
import sys

import numpy as np
import pytest

from mixtura.data.spectra import made_up_library, synthesize_scene
from mixtura.vision.unmixing import SpectralUnmixing

# One script for all cases, since starting a process costs more than any fit here. Every rank writes what it found.
SCRIPT = """
import sys
from pathlib import Path
import numpy as np, torch
import torch.distributed as dist
torch.set_num_threads(1)
from mixtura.core.processes import join
from mixtura.vision.unmixing import SpectralUnmixing

folder = Path(sys.argv[1])
given = np.load(folder / "x.npz")
X, M, A = given["X"], given["M"], given["A"]
rank = join("auto").rank
found = {}

def keep(name, model, parts):
    for part in parts:
        found[f"{name} {part}"] = getattr(model, part)

for name, cuts in (("uneven", (0, 70, 400)), ("empty", (0, 0, 400))):
    mine = slice(cuts[rank], cuts[rank + 1])
    for init in ("vca-whitened", "vca", "nmf-random"):
        keep(f"{name} {init}", SpectralUnmixing(3, init=init, max_iter=30).fit(X[mine]), sys.argv[2].split(","))
    keep(f"{name} given", SpectralUnmixing(3, max_iter=30).fit(X[mine], M_init=M, A_init=A[mine]), sys.argv[2].split(","))
stream = SpectralUnmixing(3, max_iter=30)
for block in (slice(0, 200), slice(200, 400)):
    stream.partial_fit(X[block][:50] if rank == 0 else X[block][50:])
keep("stream", stream, ["endmembers_", "channel_weight_"])
found["transform"] = stream.transform(X[:20])

def complaint(X):
    try:
        SpectralUnmixing(3, max_iter=2).fit(X)
    except ValueError as error:
        return str(error)
    return "no error"

broken = X[:20].copy()
if rank == 0:
    broken[1, 2] = np.nan
found["nan"] = complaint(broken)
found["channels"] = complaint(X[:20, : 40 - rank])
found["few"] = complaint(X[: 2 - rank])
found["none"] = complaint(X[:0])
found["alone"] = SpectralUnmixing(3, max_iter=30, distributed=False).fit(X).endmembers_
np.savez(folder / f"rank{rank}.npz", **found)
dist.destroy_process_group()
"""

KEPT = ("endmembers_", "channel_weight_", "objective_", "abundances_", "guidance_")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What was given, and what each of two ranks found."""
    folder = tmp_path_factory.mktemp("shards")
    scene = synthesize_scene(made_up_library(channels=40), 3, 20, snr_db=30, outlier_channels=6, seed=2)
    X = scene.cube.reshape(-1, 40).astype(np.float64)
    rng = np.random.default_rng(0)
    given = {"X": X, "M": X[[5, 100, 300]], "A": rng.dirichlet(np.ones(3), 400)}
    np.savez(folder / "x.npz", **given)
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(folder / "script.py"), str(folder), ",".join(KEPT)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return given, [np.load(folder / f"rank{r}.npz") for r in (0, 1)]


def agree(got, want, name):
    # Sums are taken in another order; thirty multiplicative steps in float64 widen that a little.
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(("name", "cut"), [("uneven", 70), ("empty", 0)])
@pytest.mark.parametrize("start", ["vca-whitened", "vca", "nmf-random", "given"])
def test_two_processes_find_what_one_finds_and_each_keeps_its_own_shares(run, name, cut, start):
    given, ranks = run
    options = {} if start == "given" else {"init": start}
    inits = {"M_init": given["M"], "A_init": given["A"]} if start == "given" else {}
    want = SpectralUnmixing(3, max_iter=30, **options).fit(given["X"], **inits)
    for r, found in enumerate(ranks):
        for part in KEPT[:3]:
            agree(found[f"{name} {start} {part}"], getattr(want, part), part)
        shard = slice(0, cut) if r == 0 else slice(cut, None)
        for part in KEPT[3:]:
            agree(found[f"{name} {start} {part}"], getattr(want, part)[shard], part)
    for part in KEPT[:3]:
        np.testing.assert_array_equal(*(found[f"{name} {start} {part}"] for found in ranks))


def test_a_stream_over_processes_is_that_of_one(run):
    given, ranks = run
    want = SpectralUnmixing(3, max_iter=30).partial_fit(given["X"][:200]).partial_fit(given["X"][200:])
    for found in ranks:
        agree(found["stream endmembers_"], want.endmembers_, "spectra")
        agree(found["stream channel_weight_"], want.channel_weight_, "weights")
        agree(found["transform"], want.transform(given["X"][:20]), "shares")


def test_an_error_in_one_process_is_raised_in_all(run):
    _, ranks = run
    for found in ranks:
        assert str(found["nan"]).startswith("process 0: X must be finite; it contains NaN or infinity 1 times")
        assert str(found["channels"]).startswith("process 0 has pixels of 40 channels and process 1 of 39")
        assert "3 endmembers need at least 4 pixels, got n_samples = 3" in str(found["few"])
        assert str(found["none"]) == "X has no pixel in any process"


def test_a_process_may_fit_alone(run):
    given, ranks = run
    want = SpectralUnmixing(3, max_iter=30).fit(given["X"]).endmembers_
    for found in ranks:
        np.testing.assert_array_equal(found["alone"], want)
