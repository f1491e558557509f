"""Separation by query: real-time factors and memory beside htdemucs, many queries beside one, scores beside mir_eval.

The separator is the paper's size (16 kHz, 256 bands, seven levels of 64 to 512 channels) with random weights, and so is
htdemucs: neither's time depends on what the weights are. Both get the same 60 seconds at 16 kHz.

    pip install --no-deps demucs julius einops && python benchmarks/query_separation.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _side_by_side import alternate, median, ratio, versions, write_record

from mixtura.audio import QuerySeparator
from mixtura.audio.separate import bss_eval

RATE = 16_000


def ours(quick: bool) -> QuerySeparator:
    """The separator of the paper's size, or a small one."""
    torch.manual_seed(0)
    if quick:
        return QuerySeparator(512, maps=8, depth=3, width=8, bands=64).eval()
    return QuerySeparator(512).eval()


def htdemucs() -> Any:
    """The peer as its authors configure it, with random weights."""
    from demucs.htdemucs import HTDemucs

    torch.manual_seed(0)
    return HTDemucs(sources=["drums", "bass", "other", "vocals"]).eval()


def peer_call(model: Any, wave: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Separation of stereo in the peer's own windows, without its random shifts."""
    from demucs.apply import apply_model

    stereo = wave.expand(2, -1)[None]
    return lambda: apply_model(model, stereo, shifts=0, split=True, overlap=0.25, progress=False)


def audio(seconds: float) -> torch.Tensor:
    """Noise: what it sounds like does not matter for time."""
    return 0.1 * torch.randn(1, round(seconds * RATE), generator=torch.Generator().manual_seed(0))


def memory(which: str, seconds: float, quick: bool) -> float:
    """Peak memory in MB that a separation adds, in a process of its own."""
    command = [sys.executable, __file__, "--memory", which, "--seconds", str(seconds)] + (["--quick"] if quick else [])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def print_memory(which: str, seconds: float, quick: bool) -> None:
    """What one separation adds to the peak of this process."""

    def peak() -> float:
        # Not getrusage: its peak survives exec, so a child starts with that of the process that started it.
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024

    if which == "peer":
        model, wave = htdemucs(), audio(seconds)
        before = peak()
        with torch.inference_mode():
            peer_call(model, wave)()
    else:
        separator = ours(quick)
        before = peak()
        # As the command does it: blocks come and go, nothing of the recording is held.
        blocks = (audio(10.0) for _ in range(round(seconds / 10)))
        for _ in separator.stream(blocks, torch.randn(1, 512)):
            pass
    print(peak() - before)


def scores(rounds: int) -> dict[str, Any]:
    """SDR, SIR and SAR of eight estimates of two sources of four seconds, against mir_eval."""
    import mir_eval

    rng = np.random.default_rng(0)
    sources = rng.standard_normal((8, 2, 32_000))
    estimates = sources[:, 0] + 0.5 * sources[:, 1] + 0.2 * rng.standard_normal((8, 32_000))
    e, s = torch.from_numpy(estimates), torch.from_numpy(sources)

    def peer() -> np.ndarray:
        found = []
        for estimate, pair in zip(estimates, sources, strict=True):
            both = np.stack([estimate, pair.sum(0) - estimate])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found.append(mir_eval.separation.bss_eval_sources(pair, both, compute_permutation=False)[0][0])
        return np.array(found)

    off = float(np.abs(bss_eval(e, s).sdr.numpy() - peer()).max())
    assert off < 0.05, off
    times = alternate({"ours": lambda: bss_eval(e, s), "mir_eval": peer}, rounds, 1, time.process_time)
    # mir_eval scores both sources of a pair; ours only the one that was asked for.
    return {
        "off": off,
        "ratio": ratio({"ours": times["ours"], "half": [t / 2 for t in times["mir_eval"]]}, "ours", "half"),
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--memory", choices=("ours", "peer"))
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    torch.set_num_threads(1 if given.quick else 2)
    seconds = 10.0 if given.quick else given.seconds
    if given.memory:
        print_memory(given.memory, given.seconds, given.quick)
        return
    rounds = 1 if given.quick else 5
    scored = scores(rounds)
    print(f"scores: {scored['off']:.1e} dB from mir_eval, {scored['ratio']} of its time")
    model, wave = ours(given.quick), audio(seconds)
    queries = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    rivals: dict[str, Callable[[], object]] = {
        "one": lambda: model.separate(wave, queries[:1]),
        "eight": lambda: model.separate(wave, queries),
    }
    with torch.inference_mode():
        rivals["peer"] = peer_call(htdemucs(), wave)
        times = alternate(rivals, rounds, 0 if given.quick else 1)
    took = median(times)
    print({name: f"{found:.2f} s" for name, found in took.items()})
    eight, peer = ratio(times, "eight", "one"), ratio(times, "one", "peer")
    megabytes = {
        "ours": memory("ours", seconds, given.quick),
        "longer": memory("ours", 10 * seconds, given.quick),
        "peer": memory("peer", seconds, given.quick),
    }
    print({name: f"{found:.0f} MB" for name, found in megabytes.items()})
    if given.quick:
        return
    share, growth = megabytes["ours"] / megabytes["peer"], megabytes["longer"] / megabytes["ours"]
    write_record(
        "query_separation",
        {
            "title": "Separation by query",
            "what": (
                "60 seconds at 16 kHz, float32, two threads. The separator has the paper's size; htdemucs is its authors' "
                "configuration, in its own windows, on the same samples as stereo. Both with random weights."
            ),
            "rows": [
                {
                    "case": "one query",
                    "rival": "real time",
                    "ratio": f"{took['one'] / seconds:.3f} ({took['one']:.1f} s)",
                    "bar": "at most 0.1",
                    "reached": took["one"] <= 0.1 * seconds,
                },
                {
                    "case": "eight queries",
                    "rival": "one query",
                    "ratio": str(eight),
                    "bar": "at most 1.3",
                    "reached": eight.median <= 1.3,
                },
                {
                    "case": "one query",
                    "rival": f"htdemucs ({took['peer']:.1f} s)",
                    "ratio": str(peer),
                    "bar": "at most 0.33",
                    "reached": peer.median <= 1 / 3,
                },
                {
                    "case": "memory that one query adds",
                    "rival": f"htdemucs ({megabytes['peer']:.0f} MB)",
                    "ratio": f"{share:.2f} ({megabytes['ours']:.0f} MB)",
                    "bar": "at most 0.33",
                    "reached": share <= 1 / 3,
                },
                {
                    "case": "memory on ten times the length",
                    "rival": "60 seconds",
                    "ratio": f"{growth:.2f} ({megabytes['longer']:.0f} MB)",
                    "bar": "at most 1.2",
                    "reached": growth <= 1.2,
                },
                {
                    "case": "SDR, SIR and SAR of an estimate",
                    "rival": "mir_eval",
                    "ratio": str(scored["ratio"]),
                    "bar": "at most 1",
                    "reached": scored["ratio"].median <= 1,
                },
            ],
            "notes": (
                f"SDR differs from mir_eval's by at most {scored['off']:.0e} dB. htdemucs gives four fixed stems in one pass "
                "at its full bandwidth; the separator gives what is asked for and hears up to 8 kHz. Which separates better "
                "cannot be read from random weights."
            ),
            "versions of peers": versions("demucs", "mir_eval"),
        },
    )


if __name__ == "__main__":
    main()
