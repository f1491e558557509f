"""Peak memory of loading, upcycling and saving, over the bytes of the checkpoint that comes out.

A dense Llama of about half a gigabyte becomes eight experts. Each way runs in a process of its own; what the interpreter, torch
and transformers take before any model is there is subtracted. The bar: at most 1.2 times the resulting checkpoint.

    python benchmarks/upcycle_memory.py            # writes docs/benchmarks/upcycle_memory.json
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _side_by_side import write_record

BAR = 1.2
WAYS = {
    "from a path": "upcycled = upcycle(SOURCE, n_experts=8, top_k=2)",
    "from a path, segments": "upcycled = upcycle(SOURCE, method='fine-grained', n_experts=8, segments=4, shared=1)",
    "from a loaded model, which stays": (
        "model = transformers.AutoModelForCausalLM.from_pretrained(SOURCE); "
        "upcycled = upcycle(model, n_experts=8, top_k=2)"
    ),
    "four branches from paths, BAM": "upcycled = upcycle([SOURCE] * 4, method='branch-attend-mix')",
}
CHILD = """
import json, sys, torch, transformers
from pathlib import Path
from mixtura.lm.families.save import save_checkpoint
from mixtura.lm.upcycle import upcycle
transformers.MixtralForCausalLM, transformers.Qwen2MoeForCausalLM, transformers.LlamaForCausalLM
import mixtura.lm.model.decoder
SOURCE, target = sys.argv[1], Path(sys.argv[2])
torch.set_num_threads(1)

def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

before = peak()
{way}
built = peak()
save_checkpoint(upcycled, target, shard_bytes=128_000_000)
saved = peak()
size = sum(f.stat().st_size for f in target.glob("*.safetensors"))
print(json.dumps(dict(before=before, built=built, saved=saved, checkpoint=size, family=upcycled.config.model_type)))
"""


def dense(folder: Path) -> int:
    """Write a dense model in a process of its own, so that this one stays small; its size in bytes."""
    script = f"""
import torch, transformers
config = transformers.LlamaConfig(vocab_size=20000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                                  num_attention_heads=12, num_key_value_heads=4)
transformers.LlamaForCausalLM(config).save_pretrained({str(folder)!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def main() -> None:
    """Run every way and write the record."""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "dense"
        size = dense(source)
        for name, way in WAYS.items():
            target = Path(scratch) / name.replace(" ", "-")
            command = [sys.executable, "-c", CHILD.replace("{way}", way), str(source), str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.strip().splitlines()[-1])
            row["built_over_checkpoint"] = (row["built"] - row["before"]) / row["checkpoint"]
            row["saved_over_checkpoint"] = (row["saved"] - row["before"]) / row["checkpoint"]
            rows[name] = row
            print(
                f"{name}: {row['checkpoint'] / 1e9:.2f} GB of {row['family']}, peak {row['built_over_checkpoint']:.3f} of it, "
                f"with saving {row['saved_over_checkpoint']:.3f}",
                flush=True,
            )
            for file in target.glob("*"):
                file.unlink()
    judged = rows["from a path"]["saved_over_checkpoint"]
    print(f"bar {BAR}: {'reached' if judged <= BAR else 'MISSED'}")
    write_record("upcycle_memory", {"bar": BAR, "dense_bytes": size, "reached": judged <= BAR, "ways": rows})


if __name__ == "__main__":
    main()
