"""Chess games as text, with the board after every character: a language whose hidden state is known exactly.

A game reads ``;e4 e5 Nf3 Nc6 ...``: standard notation without move numbers, 29 characters in all. The board that belongs to a
character is the one after the move that the character ends, that is, after the last complete move; the space behind a move is
where it becomes complete.

Two players, none of them good, both legal and varied:

- ``greedy`` takes what is worth most, plus noise; it needs nothing but the package ``chess`` (about 0.06 ms a move).
- ``stockfish`` plays 15 % of the moves at random and asks the engine for the others (about 1 ms a move at 50 nodes).

Larger collections of games by people are on database.lichess.org (PGN) and on the Hugging Face hub.

Shapes: N games, L characters.
Source of the form: Karvonen 2024 (2403.15498), sec. 2; the paper trains on such games of Stockfish (MoE-X, 2503.07639).
"""

import logging
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mixtura.core.progress import progress

__all__ = ["ALPHABET", "PIECES", "Games", "chess_games", "decode", "encode"]

log = logging.getLogger(__name__)

# Index 0 is padding and is never shown; `;` starts a game.
ALPHABET = " ;abcdefghx12345678KQRBNO-+#="
PIECES = "PNBRQKpnbrqk"  # a square holds 0 for empty or the place in this list plus 1; lower case is black
WORTH = {1: 1.0, 2: 3.0, 3: 3.0, 4: 5.0, 5: 9.0, 6: 0.0}  # pawn to king, in pawns
NOISE = 1.0  # pawns: standard deviation of what a greedy player adds to the worth of each move
RANDOM_MOVES = 0.15  # share of the moves that the engine is not asked for
SHORTEST = 16  # characters: what a game must have at least


@dataclass(frozen=True)
class Games:
    """Games with their boards.

    Attributes:
        text: N strings.
        ids: characters as indices into :data:`ALPHABET` plus 1, int64 (N, L); 0 is padding.
        boards: int8 (N, L, 64), squares from a1, b1 to h8; see :data:`PIECES`.
        mask: bool (N, L), true at characters.
        policy: who played.
    """

    text: list[str]
    ids: Tensor
    boards: Tensor
    mask: Tensor
    policy: str

    def move_ends(self) -> Tensor:
        """Where a move has just become complete, bool (N, L): the spaces."""
        return self.ids == ALPHABET.index(" ") + 1


def chess_games(
    n: int,
    *,
    seed: int,
    policy: Literal["greedy", "stockfish"] = "greedy",
    nodes: int = 50,
    max_chars: int = 256,
    engine: str = "stockfish",
) -> Games:
    """Play n games; the same arguments give the same games (with ``stockfish``: of one version of it).

    Args:
        n: number of games.
        seed: of every random choice; games of two seeds differ.
        policy: ``"greedy"`` or ``"stockfish"``.
        nodes: positions that the engine may look at for a move.
        max_chars: longest game in characters, L; a game is cut at its last complete move before.
        engine: name or path of the engine's program.
    Raises:
        ValueError: n, nodes or max_chars too small, or an unknown policy.
        FileNotFoundError: the engine is not there.
        ImportError: the package ``chess`` is missing.
    Example:
        >>> games = chess_games(1, seed=0, max_chars=24)
        >>> games.text[0].startswith(";"), games.boards.shape
        (True, torch.Size([1, 24, 64]))
    """
    if n < 1 or nodes < 1:
        raise ValueError(f"n and nodes must be at least 1, got {n} and {nodes}")
    if max_chars < SHORTEST:
        raise ValueError(f"max_chars must be at least {SHORTEST}, got {max_chars}")
    if policy not in ("greedy", "stockfish"):
        raise ValueError(f"policy must be one of ['greedy', 'stockfish'], got {policy!r}")
    draw = random.Random(f"{seed} {policy}")
    texts: list[str] = []
    boards = torch.zeros(n, max_chars, 64, dtype=torch.int8)
    with _player(policy, draw, nodes, engine) as choose:
        for i in progress(range(n), desc=f"chess, {policy}", unit="game"):
            text, rows = ";", [_squares(_new_board())]
            while len(text) < SHORTEST:  # a mate in four is no game to learn from
                text, rows = _play(choose, max_chars)
            texts.append(text)
            boards[i, : len(text)] = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int8).view(-1, 64)
    ids = encode(texts, max_chars)
    return Games(text=texts, ids=ids, boards=boards, mask=ids > 0, policy=policy)


def encode(texts: list[str], length: int) -> Tensor:
    """Characters as numbers from 1, int64 (N, length); 0 behind the end. A character that no game has is a ValueError."""
    places = {c: i + 1 for i, c in enumerate(ALPHABET)}
    if strange := sorted(set("".join(texts)) - set(ALPHABET)):
        raise ValueError(f"texts hold {strange}, games are written in {ALPHABET!r}")
    out = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(out, texts, strict=True):
        row[: len(text)] = torch.tensor([places[c] for c in text[:length]], dtype=torch.int64)
    return out


def decode(ids: Tensor) -> list[str]:
    """Inverse of :func:`encode`, padding left out."""
    return ["".join(ALPHABET[i - 1] for i in row if i) for row in ids.tolist()]


def _play(choose: Callable[[Any], Any], max_chars: int) -> tuple[str, list[bytes]]:
    """One game: its text and, for every character, the board after the last complete move."""
    board = _new_board()
    text, now = ";", _squares(board)
    rows = [now]
    while not board.is_game_over():
        move = choose(board)
        word = board.san(move)
        if len(text) + len(word) + 1 > max_chars:
            break
        board.push(move)
        rows += [now] * len(word)
        now = _squares(board)
        rows.append(now)  # the space
        text += word + " "
    return text, rows


def _new_board() -> Any:
    import chess

    return chess.Board()


def _squares(board: Any) -> bytes:
    squares = bytearray(64)
    for square, piece in board.piece_map().items():
        squares[square] = piece.piece_type + (0 if piece.color else 6)
    return bytes(squares)


@contextmanager
def _player(policy: str, draw: random.Random, nodes: int, engine: str) -> Iterator[Callable[[Any], Any]]:
    if policy == "greedy":
        yield lambda board: _greedy(board, draw)
        return
    import chess
    import chess.engine

    if shutil.which(engine) is None:
        raise FileNotFoundError(
            f"the engine {engine!r} is not there; install it (apt-get install stockfish) or use 'greedy'"
        )
    with chess.engine.SimpleEngine.popen_uci(engine) as asked:
        asked.configure({"Threads": 1})
        limit = chess.engine.Limit(nodes=nodes)

        def choose(board: Any) -> Any:
            if draw.random() < RANDOM_MOVES:
                return draw.choice(list(board.legal_moves))
            return asked.play(board, limit).move

        yield choose


def _greedy(board: Any, draw: random.Random) -> Any:
    moves = list(board.legal_moves)
    worths = []
    for move in moves:
        taken = board.piece_type_at(move.to_square)
        worth = (WORTH[taken] if taken else 0.0) + (WORTH[move.promotion] if move.promotion else 0.0)
        worths.append(worth + draw.gauss(0.0, NOISE))
    return moves[max(range(len(moves)), key=worths.__getitem__)]
