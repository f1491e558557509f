"""Wavelet mixing beside its peers: the transform against PyWavelets and pytorch_wavelets, a block against the authors' package.

Both sides give the same numbers, which is checked before they are timed. One thread, processor time, rounds in turn.

    python benchmarks/wavelet_mixing.py           # writes docs/benchmarks/wavelet_mixing.json
    python benchmarks/wavelet_mixing.py --quick   # small, to try it; writes nothing

The peers: pip install PyWavelets einops 'setuptools<81'; pip install --no-deps wavemix==0.2.4 pytorch_wavelets
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import types
from typing import Any

import numpy as np
import torch
from _side_by_side import alternate, median, ratio, versions, write_record

from mixtura.core.wavelets import haar2d
from mixtura.vision.wavelet import WaveletMixing
from mixtura.vision.wavelet.reference import renamed

TRANSFORM_BAR, BLOCK_BAR = 1 / 5, 1 / 1.4  # of PyWavelets channel by channel; of the authors' block
NOTES = (
    "Ratios are our processor time over the rival's, one thread, median of paired rounds with the lowest and the highest. "
    "PyWavelets is called once a channel, in a loop, and once for all channels at once, which is how it is best used. "
    "The authors' package needs a module that NumPy 2 no longer has; an empty one is put in its place. It computes every level's "
    "transform from the input again, but most of a block's time is the transposed convolution, which both have: it cannot be "
    "1.4 times as fast where the rest alone differs."
)


def wavemix() -> Any:
    """The authors' package, whose unused import of a module that NumPy 2 has no longer would fail."""
    stub = types.ModuleType("numpy.lib.function_base")
    stub.hamming = np.hamming  # type: ignore[attr-defined]
    sys.modules.setdefault("numpy.lib.function_base", stub)
    return importlib.import_module("wavemix")


def transforms(side: int, rounds: int) -> list[dict[str, Any]]:
    """One level of Haar on 16 images of 16 channels."""
    import pywt
    from pytorch_wavelets import DWTForward

    x = torch.randn(16, 16, side, side)
    array = x.numpy()
    peer = DWTForward(J=1, wave="db1", mode="zero")

    def by_channel() -> np.ndarray:
        out = np.empty((16, 16, 4, side // 2, side // 2), dtype=np.float32)
        for i in range(16):
            for j in range(16):
                ll, details = pywt.dwt2(array[i, j], "db1", mode="zero")
                out[i, j, 0], out[i, j, 1:] = ll, details
        return out

    def at_once() -> np.ndarray:
        ll, details = pywt.dwt2(array, "db1", mode="zero")
        return np.stack([ll, *details], 2)

    def torch_peer() -> torch.Tensor:
        low, high = peer(x)
        return torch.cat((low[:, :, None], high[0]), 2)

    ours = haar2d(x)[0].numpy()
    for found in (by_channel(), at_once(), torch_peer().numpy()):
        np.testing.assert_allclose(found, ours, atol=1e-5)
    rivals = {
        "ours": lambda: haar2d(x),
        "PyWavelets, a channel at a time": by_channel,
        "PyWavelets, all at once": at_once,
        "pytorch_wavelets": torch_peer,
    }
    times = alternate(rivals, rounds, 2, time.process_time)
    rows = []
    for rival in list(rivals)[1:]:
        found = ratio(times, "ours", rival)
        row = {"case": f"Haar, 16 x 16 x {side} x {side}", "rival": rival, "ratio": str(found)}
        bar = TRANSFORM_BAR if rival.endswith("time") else None
        row |= {"bar": f"{bar:.2f}" if bar else "", "met": bool(found.median <= bar) if bar else ""}
        rows.append(row | {"ours, ms": round(1e3 * median(times)["ours"], 2)})
    return rows


def blocks(levels: int, side: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of one block, 64 channels, 4 images."""
    torch.manual_seed(0)
    theirs = getattr(wavemix(), f"Level{levels}Waveblock")(mult=2, ff_channel=64, final_dim=64, dropout=0.0)
    ours = WaveletMixing(64, levels=levels, dropout=0.0)
    state = renamed({f"layers.0.{name}": tensor for name, tensor in theirs.state_dict().items()})
    ours.load_state_dict({name.removeprefix("blocks.0."): tensor for name, tensor in state.items()})
    x = torch.randn(4, 64, side, side)
    torch.testing.assert_close(ours(x), x + theirs(x), atol=1e-4, rtol=1e-4)

    def step(block: torch.nn.Module) -> Any:
        def run() -> None:
            x.grad = None
            block(x.requires_grad_()).mean().backward()

        return run

    times = alternate({"ours": step(ours), "authors": step(theirs)}, rounds, 2, time.process_time)
    found = ratio(times, "ours", "authors")
    row = {"case": f"block of {levels} levels, 4 x 64 x {side} x {side}", "rival": "wavemix 0.2.4", "ratio": str(found)}
    bar = BLOCK_BAR if levels == 3 else None
    row |= {"bar": f"{bar:.2f}" if bar else "", "met": bool(found.median <= bar) if bar else ""}
    return row | {"ours, ms": round(1e3 * median(times)["ours"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small and unrecorded")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rounds = 3 if quick else 11
    rows = transforms(32 if quick else 128, rounds)
    rows += [blocks(levels, 16 if quick else 64, rounds) for levels in (1, 3)]
    for row in rows:
        print(row)
    if not quick:
        write_record(
            "wavelet_mixing",
            {
                "title": "Wavelet mixing",
                "what": "Our processor time over the rival's, one thread, at equal numbers.",
                "rows": rows,
                "notes": NOTES,
                "peers": versions("PyWavelets", "wavemix", "pytorch_wavelets"),
            },
        )


if __name__ == "__main__":
    main()
