"""An embedding depends on its text alone; it is the mean of token vectors; what is saved comes back."""

import numpy as np
import pytest
import torch

from mixtura.multimodal.retrieval.crops import Tokens
from mixtura.multimodal.retrieval.encoder import EncoderConfig, TextEncoder, mean_pooling
from mixtura.multimodal.retrieval.tokenizer import SearchTokenizer, train_tokenizer

TEXTS = ["a lute and a viol", "boats", "", "the river is long, and the boat is slow " * 9, "Lute!", "lutes viols"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


def make(tokenizer, **options):
    config = EncoderConfig(vocab_size=len(tokenizer), **{"width": 16, "heads": 2, **options})
    return TextEncoder(config, SearchTokenizer(tokenizer.inner)).eval()


def test_mean_pooling_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]], [[4.0, 4.0], [0.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert mean_pooling(hidden, mask).tolist() == [[2.0, 4.0], [0.0, 0.0]]


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"layers": 2}, {"layers": 1, "pooling": "cls"}])
def test_neither_padding_nor_the_batch_nor_the_order_changes_an_embedding(tokenizer, options):
    encoder = make(tokenizer, **options)
    whole = encoder.encode(TEXTS)
    alone = np.concatenate([encoder.encode([text], 1) for text in TEXTS])
    np.testing.assert_allclose(whole, alone, atol=1e-5)
    turned = encoder.encode(TEXTS[::-1], 2, by_length=False)[::-1]
    np.testing.assert_allclose(whole, turned, atol=1e-5)
    assert not whole[2].any() and whole.dtype == np.float32
    if options.get("normalize", True):
        np.testing.assert_allclose(np.linalg.norm(whole[[0, 1, 3, 4, 5]], axis=1), 1, atol=1e-5)


def test_the_table_in_one_row_equals_the_padded_mean_in_output_and_gradient(tokenizer):
    encoder = make(tokenizer)
    texts = encoder.tokenizer.tokens(TEXTS)
    ids, there = texts.padded(0)
    rows, grads = [], []
    for forward in (
        lambda: encoder.embed(texts),
        lambda: encoder(torch.from_numpy(ids), torch.from_numpy(there)),
    ):
        encoder.zero_grad()
        z = forward()
        (z * torch.arange(z.numel()).view_as(z)).sum().backward()
        rows.append(z.detach())
        grads.append(encoder.table.weight.grad.clone())
    torch.testing.assert_close(rows[0], rows[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-3)


def test_case_and_place_do_not_count_and_a_transformer_gets_its_marks(tokenizer):
    assert tokenizer.ids(["LUTE"]) == tokenizer.ids(["lute"])
    table, deep = make(tokenizer), make(tokenizer, layers=1)
    assert not table.tokenizer.marks and deep.tokenizer.marks
    ids = deep.tokenizer.ids(["lute"], 64)[0]
    assert ids[0] == deep.tokenizer.first and ids[-1] == deep.tokenizer.last
    assert len(deep.tokenizer.ids(["lute " * 99], 20)[0]) == 20
    marked = deep.tokenizer.marked(Tokens.of([ids[1:-1]]))
    assert marked.ids.tolist() == ids


@pytest.mark.parametrize("options", [{}, {"layers": 1}])
def test_what_is_saved_comes_back_to_the_bit_and_half_precision_nearly(tokenizer, tmp_path, options):
    encoder = make(tokenizer, **options)
    encoder.save_pretrained(tmp_path / "whole")
    encoder.save_pretrained(tmp_path / "half", half=True)
    with pytest.raises(ValueError, match="holds other files"):
        encoder.save_pretrained(tmp_path)
    whole, half = (TextEncoder.from_pretrained(tmp_path / name) for name in ("whole", "half"))
    assert np.array_equal(whole.encode(TEXTS), encoder.encode(TEXTS))
    np.testing.assert_allclose(half.encode(TEXTS), encoder.encode(TEXTS), atol=2e-3)
    assert whole.fingerprint() == encoder.fingerprint() == half.fingerprint()
    assert make(tokenizer, width=8).fingerprint() != encoder.fingerprint()


def test_a_checkpoint_shaped_like_contriever_gives_the_mean_of_its_last_hidden_state(tokenizer, tmp_path):
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=64, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    model.save_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    encoder = TextEncoder.from_pretrained(tmp_path)
    for text in (TEXTS[0], TEXTS[4]):
        ids = [loaded.cls_token_id, *loaded(text, add_special_tokens=False)["input_ids"], loaded.sep_token_id]
        with torch.no_grad():
            want = model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(encoder.encode([text])[0], want, atol=1e-6)
    encoder.save_pretrained(tmp_path / "kept")
    again = TextEncoder.from_pretrained(tmp_path / "kept")
    np.testing.assert_allclose(again.encode(TEXTS[:2]), encoder.encode(TEXTS[:2]), atol=1e-6)


def test_what_does_not_fit_is_named(tokenizer, tmp_path):
    encoder = make(tokenizer)
    with pytest.raises(TypeError, match="texts must be strings, got int at place 1"):
        encoder.encode(["a", 3])
    with pytest.raises(TypeError, match="put it in a list"):
        encoder.encode("a")
    with pytest.raises(ValueError, match="max_length must be between 1 and 512, got 600"):
        encoder.encode(["a"], max_length=600)
    with pytest.raises(ValueError, match="heads must divide width=10"):
        EncoderConfig(vocab_size=300, width=10, layers=1)
    with pytest.raises(ValueError, match="pooling='cls' needs layers"):
        EncoderConfig(vocab_size=300, pooling="cls")
    with pytest.raises(ValueError, match="holds no encoder"):
        TextEncoder.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TextEncoder.from_pretrained(tmp_path / "gone")
    encoder.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        TextEncoder.from_pretrained(tmp_path / "cut")
