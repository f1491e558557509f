import shutil

import pytest
import torch

from mixtura.data import chess as ours

chess = pytest.importorskip("chess")


@pytest.fixture(scope="module")
def games():
    return ours.chess_games(6, seed=0, max_chars=160)


def test_games_are_legal_and_every_character_has_the_board_after_the_last_complete_move(games):
    for text, boards, mask in zip(games.text, games.boards, games.mask, strict=True):
        board, place = chess.Board(), 1
        assert text[0] == ";" and text[-1] == " " and int(mask.sum()) == len(text) <= 160
        for word in text[1:].split():
            board.push_san(word)  # raises where a move is not legal
            place += len(word)
            want = [ours.PIECES.index(p.symbol()) + 1 if (p := board.piece_at(q)) else 0 for q in range(64)]
            assert text[place] == " " and boards[place].tolist() == want
            if place > len(word) + 1:
                assert boards[place - 1].tolist() != want  # the move is not complete before its space
            place += 1
        assert place == len(text)
    assert torch.equal(games.move_ends().sum(1), torch.tensor([len(t[1:].split()) for t in games.text]))


def test_the_first_board_is_the_start_and_padding_is_empty(games):
    start = games.boards[0, 0].tolist()
    assert start[:8] == [4, 2, 3, 5, 6, 3, 2, 4] and start[8:16] == [1] * 8 and start[48:56] == [7] * 8
    assert games.boards[~games.mask].abs().sum() == 0


def test_characters_survive_the_way_to_numbers_and_back(games):
    assert ours.decode(games.ids) == games.text
    assert len(set(ours.ALPHABET)) == len(ours.ALPHABET) == 29
    with pytest.raises(ValueError, match=r"texts hold \['z'\]"):
        ours.encode(["z"], 4)


def test_the_same_seed_plays_the_same_games_and_another_plays_others(games):
    assert ours.chess_games(6, seed=0, max_chars=160).text == games.text
    assert not set(ours.chess_games(6, seed=1, max_chars=160).text) & set(games.text)
    assert len(set(games.text)) == 6


def test_a_greedy_player_takes_a_queen_that_hangs():
    board = chess.Board("4k3/8/8/3q4/4P3/8/8/4K3 w - - 0 1")
    import random

    took = sum(ours._greedy(board, random.Random(i)).to_square == chess.D5 for i in range(50))
    assert took == 50  # nine standard deviations of the noise


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n and nodes must be at least 1"),
        ({"n": 1, "max_chars": 8}, "max_chars must be at least 16, got 8"),
        ({"n": 1, "policy": "random"}, r"policy must be one of \['greedy', 'stockfish'\], got 'random'"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ours.chess_games(**options, seed=0)


def test_a_missing_engine_is_named():
    with pytest.raises(FileNotFoundError, match="the engine 'no-such-engine' is not there"):
        ours.chess_games(1, seed=0, policy="stockfish", engine="no-such-engine")


@pytest.mark.skipif(shutil.which("stockfish") is None, reason="the engine is not installed")
def test_the_engine_plays_legal_games():
    text = ours.chess_games(1, seed=0, policy="stockfish", max_chars=60).text[0]
    board = chess.Board()
    for word in text[1:].split():
        board.push_san(word)  # raises where a move is not legal
    assert len(board.move_stack) == len(text[1:].split()) > 0
