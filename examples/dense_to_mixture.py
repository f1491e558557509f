"""From a dense checkpoint to a mixture of experts that transformers loads without mixtura."""

import sys

from transformers import AutoTokenizer

from mixtura.lm import find_moe, upcycle
from mixtura.lm.loading import save

source, destination = sys.argv[1:3]
model = upcycle(source, method="copy", n_experts=8, top_k=2)
tokenizer = AutoTokenizer.from_pretrained(source)
save(
    model,
    tokenizer,
    destination,
    card={"title": destination, "base": [source], "recipe": "Sparse upcycling by copy.", "command": " ".join(sys.argv)},
)
for layer in find_moe(model):
    print(layer.name, layer.n_experts, "experts,", layer.k, "active")
