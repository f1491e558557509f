"""Half the cache: every key/value head of a small model gets a span of its own, and what it writes stays.

python examples/half_the_cache.py
"""

import torch

from mixtura.data.models import smollm2
from mixtura.data.texts import corpus
from mixtura.lm.attention import convert
from mixtura.lm.attention.api import plan_from_texts
from mixtura.lm.generation import cache_bytes
from mixtura.lm.loading import load

model, tokenizer = load(smollm2())
texts = corpus("code", characters=200_000)
plan = plan_from_texts(model, tokenizer, texts.train, density=0.5, lengths=(512,), samples=2, block=16)
small = convert(model, plan)
print("tokens of 512 that each head keeps, layer by layer:", *plan.spans(512).tolist(), sep="\n")

prompt = tokenizer(texts.held_out[0][:1500], return_tensors="pt")["input_ids"][:, :480]
for name, one in {"whole": model, "spans": small}.items():
    with torch.inference_mode():
        out = one.generate(prompt, max_new_tokens=32, do_sample=False, return_dict_in_generate=True)
    print(f"{name}: {cache_bytes(out.past_key_values) / 1e6:.1f} MB of cache")
    print(tokenizer.decode(out.sequences[0, prompt.shape[1] :]))
