"""Two tasks in many languages: what a batch holds, how often which language comes, and how text is damaged."""

import math
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader

from mixtura.lm.multitask import MASK, TaskMixture, denoise, language_token, multitask_tokenizer, task_token

PAIRS = {
    ("en", "de"): [(f"the number {i}", f"die Zahl {i}") for i in range(32)],
    ("en", "fr"): [("a cat", "un chat")],
}
MONO = {"de": [f"die Zahl {i}" for i in range(32)], "fr": ["un chat"]}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer():
    return multitask_tokenizer(
        [text for part in PAIRS.values() for pair in part for text in pair], 300, ("en", "de", "fr")
    )


def mixture(tokenizer, **changes):
    options = {"batch_size": 8, "length": 24} | changes
    return TaskMixture(tokenizer, options.pop("pairs", PAIRS), options.pop("mono", MONO), **options)


def test_the_tokenizer_has_its_size_and_its_tokens_survive_the_disk(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    assert len(tokenizer) == 300
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = f"{task_token('mt')}{language_token('de')}the number 7"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.pad_token == "<pad>" and again.eos_token_id != again.pad_token_id
    assert again.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == "the number 7"


def test_tasks_take_turns_and_a_row_says_what_it_wants(tokenizer):
    data = mixture(tokenizer)
    for step in range(4):
        batch = data.batch_at(step)
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            source = tokenizer.decode(ids[ids != tokenizer.pad_token_id])
            target = tokenizer.decode(labels[labels != -100])
            task, language = source.split("<2")[0], source.split("<2")[1].split(">")[0]
            assert task == ("<mt>", "<dae>")[step % 2]
            assert source.endswith("<|end|>") and target.endswith("<|end|>")
            text = target.removesuffix("<|end|>")
            assert text in MONO[language]
            if task == "<mt>":
                asked = source.split(">", 2)[2].removesuffix("<|end|>")
                assert (asked, text) in PAIRS["en", language]
            else:
                assert MASK in source or source.split(">", 2)[2].removesuffix("<|end|>") != ""
        assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != tokenizer.pad_token_id)


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 32 / 33), (5.0, 2 / 3), (math.inf, 0.5)])
def test_languages_are_drawn_by_their_number_of_texts_to_the_temperatures_root(temperature, share, tokenizer):
    data = mixture(tokenizer, temperature=temperature, batch_size=64)
    assert data.shares("mt")["en", "de"] == pytest.approx(share)
    assert data.shares("dae")["de"] == pytest.approx(share)
    rows = torch.cat([data.batch_at(step)["input_ids"][:, 1] for step in range(20)])
    german = float((rows == tokenizer.convert_tokens_to_ids("<2de>")).float().mean())
    assert abs(german - share) < 5 * math.sqrt(0.25 / 1280)  # five standard errors


def test_a_batch_depends_on_the_step_and_the_seed_alone(tokenizer):
    a, b, other = mixture(tokenizer), mixture(tokenizer), mixture(tokenizer, seed=1)
    list(zip(range(3), a, strict=False))
    assert all(torch.equal(a.batch_at(5)[name], b.batch_at(5)[name]) for name in b.batch_at(5))
    assert not torch.equal(a.batch_at(5)["labels"], other.batch_at(5)["labels"])


def test_workers_share_the_steps_among_them(tokenizer):
    data = mixture(tokenizer)
    loader = iter(DataLoader(data, batch_size=None, num_workers=2))
    for step in range(4):
        assert torch.equal(next(loader)["labels"], data.batch_at(step)["labels"])


def test_long_texts_are_cut_to_the_length_and_rows_come_in_order(tokenizer):
    pairs = {("en", "de"): [("the number " * 50, "die Zahl " * 50), ("a", "b")]}
    data = mixture(tokenizer, pairs=pairs, mono=None, length=16)
    source, target = data.rows("mt", ("en", "de"))[0]
    assert len(source) == len(target) == 16 and source[-1] == target[-1] == tokenizer.eos_token_id
    assert len(data.rows("mt", ("en", "de"))) == 2
    assert sorted(data.mono) == ["de", "en"]  # by default every text of the pairs is repaired


def test_a_mixture_of_some_languages_draws_no_other(tokenizer):
    part = mixture(tokenizer).only(["fr"])
    french = tokenizer.convert_tokens_to_ids("<2fr>")
    assert all((part.batch_at(step)["input_ids"][:, 1] == french).all() for step in range(4))
    with pytest.raises(ValueError, match=r"languages must name a target of the task 'mt', got \['en'\]"):
        mixture(tokenizer).only(["en"])


def noised(ids, **options):
    none = {"ratio": 0.0, "drop": 0.0, "blank": 0.0, "shuffle": 0}
    return denoise(ids, mask_id=-1, **none | options)


def test_dropping_and_blanking_hit_their_share():
    ids = torch.arange(20_000)
    left = noised(ids, drop=0.1, generator=seeded())
    assert abs(len(left) / 20_000 - 0.9) < 5 * math.sqrt(0.09 / 20_000) and (left.diff() > 0).all()
    blanked = noised(ids, blank=0.1, generator=seeded())
    assert abs(float((blanked == -1).float().mean()) - 0.1) < 5 * math.sqrt(0.09 / 20_000)
    assert torch.equal(blanked[blanked >= 0], ids[blanked >= 0])


def test_no_token_moves_farther_than_the_shuffle_distance():
    ids = torch.arange(5000)
    moved = noised(ids, shuffle=3, generator=seeded())
    distance = (moved - ids).abs()
    assert torch.equal(moved.sort().values, ids) and distance.max() == 3 and (distance > 0).float().mean() > 0.5


@pytest.mark.parametrize("length", [1, 2, 7, 400])
def test_spans_cover_their_share_and_leave_the_rest_in_order(length):
    for seed in range(20):
        ids = torch.arange(length)
        got = noised(ids, ratio=0.35, generator=seeded(seed))
        kept = got[got >= 0]
        assert len(kept) == length - round(0.35 * length) and (kept.diff() > 0).all()
        # What is missing lies where the masks stand: between two neighbours that are no neighbours in the text is a mask.
        places = got.tolist()
        for left, right in pairwise([-1, *(p for p in places if p >= 0), length]):
            if right - left > 1:
                i = places.index(right) if right < length else len(places)
                assert places[i - 1] == -1


def test_spans_have_their_mean_length_and_stand_anywhere():
    ids, spans, covered, first = torch.arange(400), 0, 0, []
    for seed in range(200):
        got = noised(ids, ratio=0.35, generator=seeded(seed))
        spans, covered = spans + int((got == -1).sum()), covered + 140
        first.append(float((got == -1).nonzero().float().mean() / len(got)))
    assert abs(covered / spans - 3.5) < 0.1  # 8,000 spans of standard deviation 1.9: five standard errors are 0.1
    assert abs(sum(first) / 200 - 0.5) < 0.02


def test_all_noise_together_is_reproducible_and_takes_an_empty_text():
    ids = torch.arange(100)
    assert torch.equal(denoise(ids, mask_id=-1, generator=seeded(3)), denoise(ids, mask_id=-1, generator=seeded(3)))
    assert denoise(ids[:0], mask_id=-1).shape == (0,)
    assert (noised(ids, ratio=1.0, generator=seeded()) == -1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("mt", "qa")}, r"tasks must be among \['mt', 'dae'\], got \['qa'\]"),
        ({"tasks": ()}, "tasks must name at least one"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"pairs": {("en", "de"): []}}, r"pairs holds no text for \[\('en', 'de'\)\]"),
        ({"pairs": {}}, "pairs must hold at least one pair of languages"),
        ({"mono": {"de": []}}, "mono must hold texts of every language"),
        ({"pairs": {("en", "nl"): [("a", "b")]}}, r"the tokenizer lacks \['<2nl>'\]"),
        ({"length": 3}, "batch_size must be at least 1 and length at least 4, got 8 and 3"),
    ],
)
def test_what_cannot_be_mixed_is_refused(changes, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        mixture(tokenizer, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "ratio is a share and must be between 0 and 1, got 1.5"),
        ({"span": 0.0}, "span must be > 0 and shuffle >= 0, got 0.0 and 3"),
        ({"ids": torch.zeros(2, 2, dtype=torch.long)}, r"ids must have shape \(L,\), got \(2, 2\)"),
    ],
)
def test_noise_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        denoise(**{"ids": torch.arange(4), "mask_id": 9} | options)


def test_a_vocabulary_without_room_for_the_tokens_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 263 \(256 bytes, an end token and 6"):
        multitask_tokenizer(["a"], 262, ("en", "de"))
