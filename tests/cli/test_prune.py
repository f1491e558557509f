"""Experts taken out by one command, of a decoder and of the encoder-decoder, which one command trains before."""

import json
import random

import pytest
import torch
from test_cli import here, moe, text  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from mixtura.cli.prune_work import number_of
from mixtura.data.parallel_texts import read_parallel, write_parallel
from mixtura.lm.anatomy import find_moe
from mixtura.lm.loading import load, save
from mixtura.lm.multitask import translate

CONFIG = {
    "model_type": "mixtura_multitask",
    "vocab_size": 300,
    "d_model": 32,
    "heads": 4,
    "ffn": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_experts": 4,
}
SHAPE = ("--batch", 8, "--length", 24)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Numbers spelt out in two languages."""
    words = {"de": ("eins", "zwei", "drei"), "fr": ("un", "deux", "trois")}
    chance, folder = random.Random(0), tmp_path_factory.mktemp("pairs") / "numbers"
    made = {}
    for language, names in words.items():
        rows = [[chance.randrange(3) for _ in range(3)] for _ in range(60)]
        made["en", language] = [(" ".join(str(i + 1) for i in row), " ".join(names[i] for i in row)) for row in rows]
    write_parallel(folder, made)
    (folder / "de.txt").write_text("eins\n\nzwei drei\n")
    assert read_parallel(folder) == (made, {"de": ["eins", "zwei drei"]})
    return folder


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "translate.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_a_config_and_pairs_become_a_translator_that_is_pruned_for_a_language(here, pairs, config, tmp_path):  # noqa: F811
    options = ("--text", pairs, *SHAPE, "--lr", 1e-2)
    done = here("train", "translate.json", *options, "--steps", 40, "--out", "mt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("en-de: held-out nats a token ")[1].split()[0:3:2]
    assert float(after) < 0.6 * float(before)
    done = here("train", "mt", *options, "--steps", 2, "--out", "more", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = here(
        "prune", "mt", "small", "--experts", 0.5, "--text", pairs, "--language", "de", "--samples", 2, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 4 experts a layer" in done.stdout and "en-de: held-out nats a token" in done.stdout
    assert "en-fr" not in done.stdout
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "small").float().eval()
    assert [block.n_experts for block in find_moe(model)] == [2, 2]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    whole = translate(model, tokenizer, ["1 2 3", "1"], "de", length=8)
    assert len(whole) == 2 and whole[1] == translate(model, tokenizer, ["1"], "de", length=8)[0]
    with pytest.raises(ValueError, match=r"languages must be among \['de', 'en', 'fr'\], got 'nl'"):
        translate(model, tokenizer, ["1"], "nl")


def test_an_interrupted_training_of_pairs_goes_on_to_the_same_model(here, pairs, config, tmp_path, monkeypatch):  # noqa: F811
    import mixtura.core.training as training

    options = ("translate.json", "--text", pairs, *SHAPE, "--steps", 8, "--checkpoint-every", 4)
    assert here("train", *options, "--out", "whole", cwd=tmp_path).returncode == 0
    rate = training.learning_rate

    def stopped(step, settings):
        if step == 6:
            raise KeyboardInterrupt
        return rate(step, settings)

    monkeypatch.setattr(training, "learning_rate", stopped)
    assert here("train", *options, "--out", "parts", cwd=tmp_path).returncode == 130
    monkeypatch.setattr(training, "learning_rate", rate)
    done = here("train", *options, "--out", "parts", cwd=tmp_path)
    assert "went on from step 4" in done.stdout
    one, two = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_decoder_is_pruned_and_loads_as_its_family(here, moe, text, tmp_path):  # noqa: F811
    done = here("prune", moe, "half", "--experts", 2, "--text", text, "--samples", 2, "--length", 32, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sums: held-out perplexity" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert {block.n_experts for block in find_moe(model)} == {2}
    done = here("prune", moe, "dry", "--policy", "random", "--dry-run", cwd=tmp_path)
    assert "2 of 4 experts a layer" in done.stdout and not (tmp_path / "dry").exists()


def test_what_is_pruned_in_float32_is_stored_in_the_sources_type(here, moe, text, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("mixtura.lm.loading.bfloat16_over_float32", lambda: 0.1)  # a processor slow at 16 bits
    half = tmp_path / "bfloat16"
    model, tokenizer = load(moe)
    save(model.to(torch.bfloat16), tokenizer, half, card={"title": "m", "base": ["x"], "recipe": "x", "command": "x"})
    done = here("prune", half, "small", "--text", text, "--samples", 1, "--length", 32, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--experts", 9), "--experts 9 means 9 of 4 experts; give a share up to 1.0 or 1 to 4"),
        (("--experts", "half"), "--experts must be a share such as 0.5 or a number such as 4, got 'half'"),
        (
            ("--experts", 1, "--dry-run"),
            "--experts 1 leaves 1 of 4 experts in model.layers.0.mlp, and a token visits 2",
        ),
        (("--language", "de"), "--language goes with the encoder-decoder"),
        (("--samples", 0), "--samples must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_pruned_is_said_in_a_line(options, message, here, moe, text, tmp_path):  # noqa: F811
    done = here("prune", moe, "out", *options, "--text", text, "--length", 32, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_share_is_rounded_up_and_a_number_is_a_number():
    assert [number_of(given, 16) for given in ("0.5", "0.01", "1.0", "1", "16", "0.3")] == [8, 1, 16, 1, 16, 5]
    assert number_of("0.1", 10) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no pairs; it needs files such as en-de.src and en-de.tgt"),
        ({"en-de.src": "a\n"}, "has no en-de.tgt beside it"),
        ({"en-de.src": "a\nb\n", "en-de.tgt": "c\n"}, "has 2 lines and en-de.tgt has 1; they must go in pairs"),
        ({"german.src": "a\n", "german.tgt": "c\n"}, "must be named by two languages, as in en-de.src"),
        ({"en-de.src": "\n", "en-de.tgt": "\n"}, "en-de.src holds no text"),
        ({"en-de.src": "a\n", "en-de.tgt": "c\n"}, "en-de has 1 pair, and one is held out"),
    ],
)
def test_a_folder_that_holds_no_pairs_is_refused_in_a_line(files, message, here, config, tmp_path):  # noqa: F811
    (tmp_path / "texts").mkdir()
    for name, content in files.items():
        (tmp_path / "texts" / name).write_text(content)
    done = here("train", "translate.json", "--text", "texts", "--steps", 1, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"layers": 2}, (), "has unknown fields ['layers']; MultitaskMoEConfig has"),
        ({"pad_token_id": 3}, (), "sets ['pad_token_id'], which follow from the tokenizer"),
        ({"vocab_size": 100}, (), "vocab_size must be at least"),
        ({"num_experts": 4, "every": 0}, (), "every must be at least 1, got 0"),
        ({}, ("--parallel", "expert=2"), "expert=2 needs a multiple of 2 processes, and 1 is running"),
        ({}, ("--trainable", "router"), "--trainable and --masks are for decoders"),
        ({}, ("--text", "b"), "--text must be given once for this model"),
    ],
)
def test_a_translator_that_cannot_be_built_is_refused_in_a_line(changes, options, message, here, pairs, tmp_path):  # noqa: F811
    (tmp_path / "translate.json").write_text(json.dumps(CONFIG | changes))
    done = here("train", "translate.json", "--text", pairs, *options, "--steps", 1, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr
