"""Self-contrast decoding inside transformers' own generate, on any mixture of experts."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import mixtura.lm
from mixtura.lm.decode.routing import RoutingRule

source, prompt = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(source)
tokenizer = AutoTokenizer.from_pretrained(source)
ids = tokenizer(prompt, return_tensors="pt").input_ids
plain = model.generate(ids, max_new_tokens=64, do_sample=False)
contrasted = model.generate(
    ids,
    max_new_tokens=64,
    do_sample=False,
    custom_generate=mixtura.lm.self_contrast,
    weak=RoutingRule.rank(2),
    beta=0.5,
)
for name, out in (("greedy", plain), ("self-contrast", contrasted)):
    print(f"{name}: {tokenizer.decode(out[0, ids.shape[1] :])}")
