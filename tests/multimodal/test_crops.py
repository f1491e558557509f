"""Crops follow their law: lengths, starts, deletions, documents; and a step's batch depends on the step alone."""

import itertools

import numpy as np
import pytest
from scipy import stats

from mixtura.multimodal.retrieval.crops import CropDataset, Tokens, independent_crops, inverse_cloze


def test_lengths_are_uniform_in_the_share_and_starts_are_uniform():
    rng = np.random.default_rng(0)
    pairs = [independent_crops(np.arange(256), delete=0.0, rng=rng) for _ in range(6000)]
    for side in zip(*pairs, strict=True):
        lengths = np.array([len(crop) for crop in side])
        assert lengths.min() == 12 and lengths.max() in (126, 127)  # floor(256 * .05), below floor(256 * .5)
        # Twelve bins of the share; false alarm at 1 % a side.
        counts = np.histogram((lengths + 0.5) / 256, bins=np.linspace(12.8, 128, 13) / 256)[0]
        edges = np.linspace(12.8, 128, 13)
        # A length l holds shares from l / 256 to (l + 1) / 256.
        held = [
            sum(max(0, min(hi, n + 1) - max(lo, n)) for n in _of_bin(lo, hi)) for lo, hi in itertools.pairwise(edges)
        ]
        assert stats.chisquare(counts, np.array(held) / sum(held) * counts.sum()).pvalue > 0.01
        room = np.array([256 - n for n in lengths])
        begin = np.array([crop[0] for crop in side])
        where = np.histogram((begin + rng.random(len(begin))) / (room + 1), bins=10, range=(0, 1))[0]
        assert stats.chisquare(where).pvalue > 0.01
        assert all((np.diff(crop) == 1).all() for crop in side[:50])


def _of_bin(lo, hi):
    """Lengths whose middle falls in the bin."""
    return [n for n in range(12, 128) if lo <= n + 0.5 < hi]


def test_a_tenth_of_the_tokens_is_left_out_and_both_sides_are_alike():
    data = CropDataset([np.arange(200) + 1000 * d for d in range(30)])
    sides = ([], [])
    for step in range(60):
        for side, texts in zip(sides, data.batch(step, 64, seed=0), strict=True):
            side.append(texts)
    lengths = [np.concatenate([t.lengths for t in side]) for side in sides]
    assert stats.ks_2samp(*lengths).pvalue > 0.01
    gaps = np.concatenate(
        [np.diff(t.ids[s : s + n]) for t in sides[0] for s, n in zip(t.starts, t.lengths, strict=True)]
    )
    # Between two tokens that stayed lie geometrically many that went: mean gap 1 / .9. Five standard errors.
    assert abs(gaps.mean() - 1 / 0.9) < 5 * gaps.std() / len(gaps) ** 0.5
    first, second = (np.concatenate([t.ids for t in side]) // 1000 for side in sides)
    assert abs(first.mean() - second.mean()) < 1.0


def test_one_document_gives_both_pieces_unless_chunks_may_cross():
    documents = [np.full(n, d) for d, n in enumerate((5, 40, 300, 7, 90))]
    inside = CropDataset(documents, chunk=64)
    for step in range(20):
        for a, b in [inside.batch(step, 32, seed=1)]:
            for texts in (a, b):
                for start, n in zip(texts.starts, texts.lengths, strict=True):
                    assert n <= 32 and len(set(texts.ids[start : start + n])) == 1
            assert (a.ids[a.starts] == b.ids[b.starts]).all()
    across = CropDataset(documents, chunk=64, ratio=(0.5, 0.5), cross_documents=True)
    mixed = [
        len(set(t.ids[s : s + n]))
        for t in across.batch(0, 200, seed=0)
        for s, n in zip(t.starts, t.lengths, strict=True)
    ]
    assert max(mixed) > 1 and {len(t) for t in across.batch(0, 3, seed=0)} == {3}


def test_a_batch_depends_on_step_and_seed_and_the_offset_in_a_long_document_is_drawn_anew():
    data = CropDataset([np.arange(1000)], chunk=50)
    one, again, other = data.batch(3, 8, seed=0), data.batch(3, 8, seed=0), data.batch(4, 8, seed=0)
    assert all((a.ids == b.ids).all() for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0].ids, other[0].ids) and not np.array_equal(one[0].ids, one[1].ids)
    assert one[0].ids.max() - one[0].ids.min() > 50


def test_the_cloze_parts_a_document_and_the_identical_way_gives_one_crop_twice():
    span, around = inverse_cloze(np.arange(100), delete=0.0, rng=np.random.default_rng(0))
    assert sorted([*span, *around]) == list(range(100)) and (np.diff(span) == 1).all()
    a, b = CropDataset([np.arange(100)], way="identical").batch(0, 4, seed=0)
    assert (a.ids == b.ids).all()


def test_groups_are_drawn_alike_whatever_their_size():
    documents = [np.full(20, 0)] * 90 + [np.full(20, 1)] * 10
    data = CropDataset(documents, groups=[0] * 90 + [1] * 10)
    drawn = np.concatenate([t.ids[t.starts] for t in (data.batch(s, 100, seed=0)[0] for s in range(20))])
    assert abs(drawn.mean() - 0.5) < 5 * 0.5 / 2000**0.5


def test_no_text_is_emptied_and_documents_of_one_token_are_counted():
    data = CropDataset([[1], [2, 3], []], delete=0.9)
    assert data.skipped == 2 and len(data) == 1
    for texts in data.batch(0, 50, seed=0):
        assert texts.lengths.min() == 1 and len(texts.ids) == texts.lengths.sum()


def test_padding_is_undone_by_the_mask():
    ids, there = Tokens.of([[5, 6], [], [7]]).padded(0)
    assert ids.tolist() == [[5, 6], [0, 0], [7, 0]] and there.tolist() == [[True, True], [False, False], [True, False]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": (0.5, 0.2)}, "ratio must be two shares"),
        ({"delete": 1.0}, "delete must be a probability below 1, got 1.0"),
        ({"way": "sideways"}, r"way must be one of \['independent', 'cloze', 'identical'\], got 'sideways'"),
        ({"chunk": 1}, "chunk must be at least 2"),
        ({"groups": [0]}, "groups must name one group a document, got 1 for 2"),
        ({"groups": [0, 1], "cross_documents": True}, "give groups or cross_documents"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CropDataset([[1, 2], [3, 4]], **options)


def test_a_corpus_without_two_tokens_is_refused():
    with pytest.raises(ValueError, match="none of the 2 documents has two tokens"):
        CropDataset([[1], []])
