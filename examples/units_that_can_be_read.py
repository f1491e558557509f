"""A small language model whose hidden units can be read, and the page that says what they stand for.

    python examples/units_that_can_be_read.py

Needs mixtura[lm]; about two minutes on one core. Writes units.html and units.json.
"""

import torch

from mixtura.data.texts import corpus
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.tokens import byte_pair_tokenizer
from mixtura.lm.training import train
from mixtura.lm.unit_report import unit_report

text = corpus("prose", characters=400_000)  # Python's own reference
tokenizer = byte_pair_tokenizer(text.train, 1024)
torch.manual_seed(0)
model = MixturaForCausalLM(
    MixturaConfig(
        vocab_size=1024,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        moe_intermediate_size=192,  # half of a dense layer's 384: two experts cost what it costs
        num_experts=8,
        num_experts_per_tok=2,
        hidden_act="relu",
        mlp_gated=False,
        mlp_bias=True,
        router="sparsity",
        initializer_range=0.1,
    )
)
history = train(model, tokenizer, text.train, steps=300, batch_size=8, length=128, lr=3e-3)
print(f"loss {history.losses[0]:.2f} -> {history.losses[-1]:.2f} nats a token")

report = unit_report(model, tokenizer, text.held_out + text.train, samples=64, length=128)
print(
    f"{report.per_token:.0f} of {report.n_experts * report.hidden} units fire on a token; rules get {report.score:.0%} right"
)
for expert in report.experts:
    best = expert.units[0].rule if expert.units else None
    shown = f"unit {best.unit} fires on {best.explanation} ({best.score:.0%})" if best else "no unit to show"
    print(f"expert {expert.expert}: {expert.load:.0%} of the visits; {shown}")
report.to_html("units.html")
report.to_json("units.json")
