"""Unmixing beside pysptools: constrained least squares pixel by pixel and all at once, a large cube, and peak memory.

1. FCLS and NNLS of the same pixels and spectra: answers compared first, then timed in turn (one thread, CPU time).
2. A cube of 512 x 512 x 200: what `mixtura unmix` does (spectra from 50,000 pixels, then shares of all), beside VCA and pysptools
   FCLS; that is timed on 2,500 pixels and scaled, since a pixel costs it the same every time.
3. Peak memory of the command's work on a file, and on one ten times larger; each in a process of its own.
4. 300 iterations at the size of the scene Urban (307 x 307, 162 channels, 6 materials), with peak memory over the cube.

    python benchmarks/spectral_unmixing.py           # writes docs/benchmarks/spectral_unmixing.json
    python benchmarks/spectral_unmixing.py --short   # small, to try it; writes nothing
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _side_by_side import alternate, median, ratio, versions, write_record

from mixtura.core.measure import Meter, resident_memory
from mixtura.data.spectra import made_up_library, synthesize_scene
from mixtura.vision.unmixing import (
    Cube,
    SpectralUnmixing,
    abundance_rmse,
    fcls,
    match_endmembers,
    nnls_unmix,
    read_cube,
    vca,
)
from mixtura.vision.unmixing.whole_cube import learn_from, survey, unmix_blocks

MATERIALS = 6
BAR_FCLS, BAR_URBAN_SECONDS, BAR_MEMORY = 1 / 20, 40, 4
NOTES = (
    "Scenes are mixed from made-up smooth curves at 30 dB. pysptools solves each pixel by a quadratic program of cvxopt to its "
    "own tolerance, which is what the answers differ by. Its extractors of spectra stop on today's NumPy and SciPy (np.int, "
    "scipy.linalg._flinalg), so that it gets the pixels of plain VCA. The row of the large cube compares different work: least "
    "squares on those pixels there, spectra, shares and channel weights learned together here; 20 of the 200 channels are "
    "spoiled, which neither is told. Memory of a file is that beyond what the process held before it was opened."
)


def scene_of(side: int, channels: int, outliers: int = 0) -> Any:
    """A scene of six curves."""
    return synthesize_scene(
        made_up_library(channels=channels), MATERIALS, side, snr_db=30, outlier_channels=outliers, seed=5
    )


def least_squares(pixels: int, rounds: int) -> list[dict[str, Any]]:
    """Constrained least squares of both, same answer, times in turn."""
    from pysptools.abundance_maps.amaps import FCLS, NNLS

    scene = scene_of(int(pixels**0.5), 200)
    X = scene.cube.reshape(-1, 200).astype(np.float64)
    rows = []
    for name, ours, theirs in (("FCLS", fcls, FCLS), ("NNLS", nnls_unmix, NNLS)):
        mine, peers = ours(X, scene.endmembers), theirs(X, scene.endmembers)
        rmse = float(np.sqrt(((mine - peers) ** 2).mean()))
        if name == "FCLS":
            assert rmse < 1e-3, rmse
        calls = {
            "mixtura": lambda ours=ours: ours(X, scene.endmembers),
            "pysptools": lambda theirs=theirs: theirs(X, scene.endmembers),
        }
        times = alternate(calls, rounds, 1, time.process_time)
        spread, seconds = ratio(times, "mixtura", "pysptools"), median(times)
        row = {"case": f"{name}, {len(X):,} pixels, 200 channels, {MATERIALS} materials"}
        row |= {"mixtura, s": round(seconds["mixtura"], 4), "pysptools, s": round(seconds["pysptools"], 3)}
        row |= {"of its time": str(spread), "answers differ, RMSE": f"{rmse:.1e}"}
        if name == "FCLS":
            row |= {"bar": "at most 0.05 of its time", "met": bool(spread.median <= BAR_FCLS)}
        print(row, flush=True)
        rows.append(row)
    return rows


def unmixed(cube: Cube, iterations: int = 500) -> np.ndarray:
    """What the command does with a cube; the shares."""
    seen = survey(cube, sample=50_000)
    model = learn_from(cube, seen, SpectralUnmixing(MATERIALS, max_iter=iterations))
    parts: list[np.ndarray] = []
    unmix_blocks(cube, model, lambda rows, shares, guide: parts.append(shares))
    return np.concatenate(parts)


def whole_cube(side: int) -> list[dict[str, Any]]:
    """The command's work on a cube, and the peer's."""
    from pysptools.abundance_maps.amaps import FCLS

    scene = scene_of(side, 200, 20)
    true = scene.abundances.reshape(-1, MATERIALS)
    good = ~scene.outliers
    cube = Cube(scene.cube)
    start = time.process_time()
    seen = survey(cube, sample=50_000)
    model = learn_from(cube, seen, SpectralUnmixing(MATERIALS))
    learned = time.process_time() - start
    parts: list[np.ndarray] = []
    unmix_blocks(cube, model, lambda rows, shares, guide: parts.append(shares))
    ours = time.process_time() - start
    shares = np.concatenate(parts).reshape(-1, MATERIALS)
    mine = abundance_rmse(shares[:, match_endmembers(model.endmembers_, scene.endmembers, bands=good)], true)
    X = scene.cube.reshape(-1, 200).astype(np.float64)
    start = time.process_time()
    found = X[vca(X, MATERIALS)]
    finding = time.process_time() - start
    some = np.random.default_rng(0).permutation(len(X))[: min(2500, len(X))]
    start = time.process_time()
    theirs = FCLS(X[some], found)
    solving = (time.process_time() - start) * len(X) / len(some)
    peer = abundance_rmse(theirs[:, match_endmembers(found, scene.endmembers, bands=good)], true[some])
    row = {
        "case": f"{side} x {side} x 200, 20 channels spoiled",
        "mixtura, s": round(ours, 1),
        "of which learning": round(learned, 1),
        "pysptools, s": f"{finding + solving:.0f} (FCLS scaled from {len(some):,} pixels)",
        "of its time": f"{ours / (finding + solving):.2f}",
        "RMSE of shares": f"{mine:.3f}, pysptools {peer:.3f}",
    }
    print(row, flush=True)
    return [row]


def memory_of(path: str) -> None:
    """Print the peak memory of the work on a file, in a process of its own."""
    torch.set_num_threads(1)
    unmixed(Cube(np.ones((8, 8, 20), np.float32) * np.random.default_rng(0).random((8, 8, 20))), 2)  # what imports cost
    before = resident_memory()
    cube = read_cube(path)
    with Meter() as meter:
        seen = survey(cube, sample=50_000)
        model = learn_from(cube, seen, SpectralUnmixing(MATERIALS, max_iter=5))
        unmix_blocks(cube, model, lambda rows, shares, guide: None)
    print(json.dumps({"peak": meter.peak_bytes - before, "seconds": meter.seconds}))


def streaming(side: int) -> list[dict[str, Any]]:
    """Peak memory on a file and on one ten times longer."""
    scene = scene_of(side, 200, 20)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 10):
            path = Path(folder) / f"cube{times}.npy"
            with path.open("wb") as handle:
                shape = (side * times, side, 200)
                np.lib.format.write_array_header_1_0(handle, {"descr": "<f4", "fortran_order": False, "shape": shape})
                for _ in range(times):
                    scene.cube.tofile(handle)
            done = subprocess.run(
                [sys.executable, __file__, "--memory-of", str(path)], capture_output=True, text=True, check=True
            )
            found = json.loads(done.stdout.strip().splitlines()[-1])
            row = {"case": f"{shape[0]} x {side} x 200 from disk", "file, MB": round(path.stat().st_size / 1e6)}
            row["peak memory, MB"] = round(found["peak"] / 1e6)
            if rows:
                grown = found["peak"] / 1e6 / rows[0]["peak memory, MB"]
                row |= {"bar": "10 times the file: at most 1.2 of the memory", "met": bool(grown <= 1.2)}
            print(row, flush=True)
            rows.append(row)
    return rows


def urban(side: int, iterations: int) -> list[dict[str, Any]]:
    """The fit alone at the size of Urban, in memory."""
    X = scene_of(side, 162, 16).cube.reshape(-1, 162)
    before = resident_memory()
    start = time.process_time()
    with Meter() as meter:
        model = SpectralUnmixing(MATERIALS, max_iter=iterations, tol=0).fit(X)
    seconds = time.process_time() - start
    beyond = (meter.peak_bytes - before) / X.nbytes
    row = {
        "case": f"{side} x {side} x 162, {model.n_iter_} iterations in memory",
        "mixtura, s": round(seconds, 1),
        "peak memory over the cube": round(1 + beyond, 2),
        "bar": f"under {BAR_URBAN_SECONDS} s, at most {BAR_MEMORY} cubes",
        "met": bool(seconds < BAR_URBAN_SECONDS and 1 + beyond <= BAR_MEMORY),
    }
    print(row, flush=True)
    return [row]


def main() -> None:
    """Measure and write the record."""
    if "--memory-of" in sys.argv:
        memory_of(sys.argv[-1])
        return
    torch.set_num_threads(1)
    short = "--short" in sys.argv
    rows = least_squares(400 if short else 2500, 2 if short else 5)
    rows += whole_cube(96 if short else 512)
    rows += streaming(192 if short else 512)
    rows += urban(64 if short else 307, 50 if short else 300)
    if short:
        return
    header = list({key: "" for row in rows for key in row})
    payload = {
        "title": "Spectral unmixing",
        "what": "Unmixing beside pysptools, CPU seconds, one thread; then memory of cubes on disk and the fit alone.",
        "rows": [{key: row.get(key, "") for key in header} for row in rows],
        "notes": NOTES,
        "peers": versions("pysptools", "cvxopt"),
    }
    write_record("spectral_unmixing", payload)


if __name__ == "__main__":
    main()
