"""Checkpoints are computed with in the type that this processor multiplies quickest, and stored in their own."""

from pathlib import Path

import pytest
import torch

from mixtura.data.texts import corpus
from mixtura.lm import compress, upcycle
from mixtura.lm.loading import load, quick_dtype, save


@pytest.mark.parametrize(
    ("stored", "device", "ratio", "want"),
    [
        (torch.bfloat16, "cpu", 0.1, torch.float32),
        (torch.float16, "cpu", 0.1, torch.float32),
        ("bfloat16", "cpu", 0.1, torch.float32),
        (torch.bfloat16, "cpu", 1.5, torch.bfloat16),
        (torch.bfloat16, "cuda", 0.1, torch.bfloat16),
        (torch.float32, "cpu", 0.1, torch.float32),
        (torch.float64, "cpu", 0.1, torch.float64),
        (None, "cpu", 0.1, "auto"),
    ],
)
def test_the_quick_type_is_float32_only_where_16_bits_are_slow(stored, device, ratio, want, monkeypatch):
    monkeypatch.setattr("mixtura.lm.loading.bfloat16_over_float32", lambda: ratio)
    assert quick_dtype(stored, device) == want


def test_a_compressed_model_in_float32_has_the_values_that_are_stored(
    tiny_dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mixtura.lm.loading.bfloat16_over_float32", lambda: 0.1)
    dense, tokenizer = load(tiny_dense, dtype=torch.bfloat16)
    card = {"title": "m", "base": ["none"], "recipe": "none", "command": "none"}
    save(upcycle(dense, n_experts=4, top_k=2), tokenizer, tmp_path / "moe", card=card)
    model, _ = load(tmp_path / "moe", dtype="quick")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    texts = corpus("arithmetic", characters=20_000).train
    small = compress(model, tokenizer, texts, bits=2.0, samples=4, length=32, inplace=True)
    save(small.to(torch.bfloat16), tokenizer, tmp_path / "small", card=card)
    stored, _ = load(tmp_path / "small")
    quick, _ = load(tmp_path / "small", dtype="quick")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in quick.parameters()} == {torch.float32}
    for name, value in stored.state_dict().items():
        assert torch.equal(quick.state_dict()[name], value.float() if value.is_floating_point() else value), name
    assert torch.isfinite(quick(input_ids=torch.arange(3, 19)[None]).logits).all()
