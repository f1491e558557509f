"""What many tests need: one thread, quiet bars, and a tiny dense checkpoint with a tokenizer."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("MIXTURA_PROGRESS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a Llama of 3 layers with a tokenizer trained on sums; random weights from seed 0."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mixtura.data.texts import corpus
    from mixtura.lm.tokens import byte_pair_tokenizer

    tokenizer = byte_pair_tokenizer(corpus("arithmetic", characters=20_000).train, vocab_size=300)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    path = tmp_path_factory.mktemp("tiny") / "dense"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
