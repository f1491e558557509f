"""Experts beside a dense model's own layers, more of them in deeper ones; and a shallower student that is taught for a while."""

import torch

from mixtura.data.texts import corpus
from mixtura.lm import distill, train, upcycle
from mixtura.lm.cost import model_size
from mixtura.lm.evaluate import perplexity
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.students import StagedDistillation, student_of
from mixtura.lm.tokens import batch_at, blocks, byte_pair_tokenizer

text = corpus("code", characters=300_000)
tokenizer = byte_pair_tokenizer(text.train, 512)
held_out = blocks(tokenizer, text.held_out, 64, limit=32)
torch.manual_seed(0)
dense = MixturaForCausalLM(
    MixturaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
)
train(dense, tokenizer, text.train, steps=60, length=64, lr=3e-3, label="dense")

pyramid = upcycle(dense, method="pyramid", n_experts=[4, 8])
print("changed by the experts:", (pyramid(held_out).logits - dense(held_out).logits).abs().max().item())
train(pyramid, tokenizer, text.train, steps=120, length=64, lr=3e-3, label="pyramid")

rows = blocks(tokenizer, text.train, 64)
student = student_of(pyramid, keep_layers=3, generator=torch.Generator().manual_seed(0))
distill(
    pyramid, student, lambda step: batch_at(rows, step, 4, seed=0), steps=180, lr=3e-3, schedule=StagedDistillation(0.7)
)
for name, model in (("dense", dense), ("pyramid", pyramid), ("student", student)):
    print(f"{name}: {model_size(model).total:,} parameters, held-out perplexity {perplexity(model, held_out):.1f}")
