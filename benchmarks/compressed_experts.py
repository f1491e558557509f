"""Compressed experts: bytes against the bit budget, products against float32, decoding against bfloat16.

python benchmarks/compressed_experts.py            # writes docs/benchmarks/compressed_experts.json
python benchmarks/compressed_experts.py --busy     # on a machine with other work: one thread, processor time
"""

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _side_by_side import alternate, median, ratio, write_record
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

import mixtura.lm.experts_forward  # noqa: F401 (registers the engine)
from mixtura.core.quantize import nearest
from mixtura.lm.anatomy import find_moe
from mixtura.lm.compress.mixed_experts import convert
from mixtura.lm.compress.packed_experts import PackedExperts
from mixtura.lm.loading import directory_bytes, save

Clock = Callable[[], float]
EXPERTS, LAYERS, BITS = 8, 6, 2.5
ALLOCATION = [3, 3, 3, 3, 2, 2, 2, 2]  # 2.5 on average


def config(layers: int) -> MixtralConfig:
    """SmolLM2-135M's shape with eight experts a layer, and fewer layers."""
    return MixtralConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    )


def models() -> tuple[Any, Any]:
    """The bfloat16 model and its compressed form."""
    torch.manual_seed(0)
    plain = MixtralForCausalLM(config(LAYERS)).bfloat16().eval()
    plain.set_experts_implementation("mixtura")
    ids = torch.randint(0, 49152, (4, 64))
    small = convert(plain, ids, allocation=torch.tensor([ALLOCATION] * LAYERS), rounding="nearest")
    return plain, small


def bytes_rows(plain: Any, small: Any) -> list[dict[str, Any]]:
    """On the disk against what the bits say, and resident against bits/16 of bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        save(
            small, None, Path(folder) / "m", card={"title": "m", "base": ["none"], "recipe": "none", "command": "none"}
        )
        disk = directory_bytes(Path(folder) / "m")
    # float16 scale and a byte of zero point a group: 96 inputs for width 576, 128 for width 1536.
    up, down = 2 * 1536 * 576, 576 * 1536
    experts = LAYERS * EXPERTS * (up * (BITS + 24 / 96) + down * (BITS + 24 / 128)) / 8
    attention = LAYERS * (2 * 576 * 576 + 2 * 576 * 192) * (4 + 24 / 96) / 8
    rest = 2 * (49152 * 576 + LAYERS * (EXPERTS * 576 + 2 * 576) + 576)
    stated = experts + attention + rest
    resident = sum(block.experts.nbytes for block in find_moe(small))
    bound = BITS / 16 * sum(p.numel() * 2 for block in find_moe(plain) for p in block.experts.parameters())
    return [
        _row(
            "bytes on disk over those of the bit budget", disk / stated, "0.95 to 1.05", 0.95 <= disk / stated <= 1.05
        ),
        _row("resident expert bytes over bits/16 of bfloat16", resident / bound, "<= 1.15", resident / bound <= 1.15),
    ]


def product_rows(clock: Clock) -> list[dict[str, Any]]:
    """Packed experts against float32 linear layers of the same two experts, tokens a second."""
    torch.manual_seed(0)
    plain = MixtralForCausalLM(config(1)).eval()
    experts: Any = find_moe(plain)[0].experts
    packed = PackedExperts.like(experts, ALLOCATION, up_group=96, down_group=128)
    for e, b in enumerate(ALLOCATION):
        packed.up.put(e, nearest(experts.gate_up_proj[e].detach(), b, 96))
        packed.down.put(e, nearest(experts.down_proj[e].detach(), b, 128))
    rows = []
    for tokens in (1, 32):
        x = torch.randn(tokens, 576)
        indices = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
        weights = torch.full((tokens, 2), 0.5)

        def float32(x=x, indices=indices) -> torch.Tensor:
            out = torch.zeros_like(x)
            for e in indices.unique().tolist():
                t = (indices == e).any(-1).nonzero()[:, 0]
                gate, up = F.linear(x[t], experts.gate_up_proj[e]).chunk(2, -1)
                out.index_add_(0, t, 0.5 * F.linear(F.silu(gate) * up, experts.down_proj[e]))
            return out

        for name, dtype in (("float32", torch.float32), ("bfloat16 activations", torch.bfloat16)):
            y = x.to(dtype)
            with torch.inference_mode():
                times = alternate(
                    {"float32": float32, "packed": partial(packed, y, indices, weights.to(dtype))},
                    rounds=15,
                    warmup=3,
                    clock=clock,
                )
            found = ratio(times, "float32", "packed")
            bar = ">= 0.5" if dtype == torch.float32 else "reported"
            row = _row(
                f"packed over float32 tokens a second, {tokens} tokens, {name}", found.median, bar, found.median >= 0.5
            )
            rows.append(row | {"low": found.low, "high": found.high})
    return rows


def decode_rows(plain: Any, small: Any, clock: Clock) -> list[dict[str, Any]]:
    """Sixteen tokens after a prompt of 32, greedy, batch 1; and the prompt itself, for the record."""
    prompt = torch.randint(0, 49152, (1, 32))
    kept = {}

    def read(name: str, model: Any) -> None:
        with torch.inference_mode():
            kept[name] = model(input_ids=prompt, use_cache=True, logits_to_keep=1)

    def decode(name: str, model: Any, n: int = 16) -> None:
        out = kept[name]
        with torch.inference_mode():
            for _ in range(n):
                token = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            out.past_key_values.crop(-n)  # the next round starts from the prompt again

    rows = []
    for what, call, bar in (("prefill", read, "reported"), ("decode", decode, "<= 1")):
        times = alternate(
            {"bfloat16": partial(call, "bfloat16", plain), "compressed": partial(call, "compressed", small)},
            rounds=9,
            clock=clock,
        )
        found = ratio(times, "compressed", "bfloat16")
        row = _row(f"{what} time, compressed over bfloat16", found.median, bar, found.median <= 1)
        rows.append(row | {"low": found.low, "high": found.high, "seconds": median(times)["compressed"]})
    return rows


def _row(what: str, value: float, bar: str, met: bool) -> dict[str, Any]:
    return {"what": what, "value": value, "low": value, "high": value, "bar": bar, "met": met, "seconds": ""}


def main() -> None:
    """Measure and write the record."""
    busy = "--busy" in sys.argv  # one thread and processor time, for a machine with other work
    torch.set_num_threads(1 if busy else 2)
    clock = time.process_time if busy else time.perf_counter
    plain, small = models()
    rows = [*bytes_rows(plain, small), *product_rows(clock), *decode_rows(plain, small, clock)]
    for row in rows:
        print(
            f"{row['what']}: {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f}), bar {row['bar']}, met {row['met']}"
        )
    what = (
        "Experts at 2.5 bits, everything else at 4, of SmolLM2-135M's shape with 8 experts top-2 and 6 layers; random weights, "
        "which cost the same as trained ones. The rival of decoding is the same model in bfloat16, with the faster experts."
    )
    notes = (
        "The bfloat16 rival reads two bytes a weight. Codes are unpacked in registers and multiplied by a small C kernel; where "
        "no compiler is found, torch's int8 kernel or a conversion to float takes its place and decoding is slower. "
        "Many rows, as in prefill, are multiplied with one dequantized matrix at a time."
    )
    payload = {"title": "Compressed experts", "what": what, "rows": rows, "notes": notes, "clock": clock.__name__}
    write_record("compressed_experts", payload)


if __name__ == "__main__":
    main()
