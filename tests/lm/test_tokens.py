"""Blocks and batches: every block once an epoch, the same batch for the same step."""

import pytest
import torch

from mixtura.lm.tokens import batch_at, blocks, byte_pair_tokenizer, mixed_batch_at


@pytest.fixture(scope="module")
def tokenizer():
    return byte_pair_tokenizer(["the cat sat on the mat", "12 + 3 = 15"] * 20, vocab_size=280)


def test_any_text_comes_back(tokenizer):
    text = "Zürich, 42 °C — ok?\n\tend"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_blocks_join_documents_with_the_end_token(tokenizer):
    first, second = (tokenizer(text)["input_ids"] for text in ("the cat", "the mat sat"))
    joined = [*first, tokenizer.eos_token_id, *second, tokenizer.eos_token_id]
    found = blocks(tokenizer, ["the cat", "the mat sat"], 2)
    assert found.flatten().tolist() == joined[: len(joined) // 2 * 2]
    assert len(blocks(tokenizer, ["the cat"] * 50, 2, limit=3)) == 3


def test_every_block_comes_once_an_epoch():
    rows = torch.arange(10).view(10, 1).expand(10, 3)
    seen = torch.cat([batch_at(rows, step, 4, seed=1)[:, 0] for step in range(5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_a_batch_depends_on_the_step_alone():
    rows = torch.randn(7, 3)
    assert torch.equal(batch_at(rows, 3, 5, seed=0), batch_at(rows, 3, 5, seed=0))
    sources = {"a": rows, "b": rows + 100}
    once = mixed_batch_at(sources, {"a": 1, "b": 3}, 9, 6, seed=2)
    assert torch.equal(once, mixed_batch_at(sources, {"a": 1, "b": 3}, 9, 6, seed=2))


def test_shares_are_met():
    sources = {"a": torch.zeros(4, 2), "b": torch.ones(4, 2)}
    drawn = torch.cat([mixed_batch_at(sources, {"a": 1, "b": 3}, step, 64, seed=0)[:, 0] for step in range(50)])
    # 3200 draws with p = 3/4 have a standard error of 0.0077; five of them make a false alarm once in a million.
    assert abs(drawn.mean().item() - 0.75) < 0.039


def test_bad_arguments_are_named(tokenizer):
    with pytest.raises(ValueError, match="do not fill one block of 500"):
        blocks(tokenizer, ["short"], 500)
    with pytest.raises(ValueError, match="length must be at least 2"):
        blocks(tokenizer, ["short"], 1)
    with pytest.raises(ValueError, match=r"shares name \['c'\]"):
        mixed_batch_at({"a": torch.zeros(1, 2)}, {"c": 1}, 0, 1, seed=0)
    with pytest.raises(ValueError, match="at least one source a positive weight"):
        mixed_batch_at({"a": torch.zeros(1, 2)}, {"a": 0}, 0, 1, seed=0)
    with pytest.raises(ValueError, match="at least 257"):
        byte_pair_tokenizer(["a"], vocab_size=100)
