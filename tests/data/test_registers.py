"""Records with random keys and numbers, and questions about them."""

import numpy as np
import pytest

from mixtura.data.registers import lookups


def encode(text: str) -> list[int]:
    """A token a character."""
    return [ord(character) for character in text]


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_every_answer_stands_in_the_line_that_is_asked_for_and_the_whole_fits():
    for one in lookups(encode, count=3, length=1000, questions=4, rng=np.random.default_rng(0)):
        ids, at = one.sequence()
        assert len(ids) <= 1000 and len(at) == 4 * 5
        text = decode(one.context)
        for question, answer in zip(one.questions, one.answers, strict=True):
            name = decode(question).split("line ")[1].split(" ")[0]
            assert f"line {name}: REGISTER_CONTENT is {decode(answer)}\n" in text
        assert decode([ids[i] for i in at]) == "".join(decode(answer) for answer in one.answers)
        assert len({decode(question) for question in one.questions}) == 4


def test_other_answers_can_be_put_in_their_places():
    (one,) = lookups(encode, count=1, length=800, questions=2, rng=np.random.default_rng(1))
    ids, at = one.sequence([encode("11111"), encode("222")])
    assert decode([ids[i] for i in at]) == "11111222"


def test_the_same_generator_gives_the_same_records():
    first, second = (lookups(encode, count=2, length=800, questions=2, rng=np.random.default_rng(2)) for _ in range(2))
    assert first == second


def test_a_length_that_holds_too_few_lines_says_so():
    with pytest.raises(ValueError, match="fewer than the 6 that are asked for"):
        lookups(encode, count=1, length=400, questions=6, rng=np.random.default_rng(0))
