"""Encoding by several processes: one reads and keeps, all encode.

The process of rank 0 leads: it reads passages and writes the index. When it has a load of texts it sends them to everybody;
rank r encodes every batch r, r + world, ... of it, and the vectors go back to the leader in half precision. Batches are those
of one process, so that the vectors are, too.

What travels is JSON and numbers, over gloo, also where the encoders sit on GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType

import numpy as np
import torch
import torch.distributed as dist

from mixtura.multimodal.retrieval.encoder import TextEncoder

__all__ = ["BATCH", "LOAD", "EncodingTeam", "encode_half"]

BATCH = 1_024  # passages encoded together
LOAD = 16_384  # passages of a load, at least
END = -1


def encode_half(encoder: TextEncoder, texts: Sequence[str]) -> np.ndarray:
    """Embeddings as an index keeps them, shape (texts, D), float16."""
    return encoder.encode(texts, 256, label=None).astype(np.float16)


class EncodingTeam:
    """The processes that ``torchrun`` started, as one encoder. Every process makes one, with the same encoder::

        with EncodingTeam(encoder) as team:
            if team.leads:
                SearchIndex(path, encoder, create=True, team=team).add(documents, "notes")
            else:
                team.serve()

    The default process group must exist; its backend is of no account.

    Args:
        encoder: of this process.
    Attributes:
        rank, world: place of this process, and how many there are.
        leads: whether it is the one that reads and writes.
        load: passages to encode at a time: at least one batch for every process.
    Raises:
        ValueError: the processes have different encoders; raised in all of them.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder, self.rank, self.world = encoder, dist.get_rank(), dist.get_world_size()
        self.leads = self.rank == 0
        self.load = max(1, LOAD // (BATCH * self.world)) * BATCH * self.world
        # The leader may read for hours what has not changed; a process that dies is noticed all the same.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        mark = torch.tensor([int(encoder.fingerprint()[:15], 16)])
        marks = [torch.empty_like(mark) for _ in range(self.world)]
        dist.all_gather(marks, mark, group=self.group)
        if len({int(other) for other in marks}) > 1:
            raise ValueError("the processes have loaded different encoders; give all of them the same --model")

    def __enter__(self) -> EncodingTeam:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.leads:
            with suppress(RuntimeError):  # where the others are gone, nobody needs to be told
                dist.broadcast(torch.tensor([END]), 0, group=self.group)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings of texts, shape (texts, D), float16; called by the leader while the others :meth:`serve`.

        Raises:
            OSError: one of the others is gone.
        """
        sent = torch.frombuffer(bytearray(json.dumps(list(texts)).encode()), dtype=torch.uint8)
        with _together():
            dist.broadcast(torch.tensor([len(sent)]), 0, group=self.group)
            dist.broadcast(sent, 0, group=self.group)
        return self._shares(texts)

    def serve(self) -> None:
        """Encode what the leader sends, until it is done.

        Raises:
            OSError: the leader is gone.
        """
        while True:
            size = torch.empty(1, dtype=torch.int64)
            with _together():
                dist.broadcast(size, 0, group=self.group)
                if int(size) == END:
                    return
                came = torch.empty(int(size), dtype=torch.uint8)
                dist.broadcast(came, 0, group=self.group)
            self._shares(json.loads(came.numpy().tobytes()))

    def _shares(self, texts: Sequence[str]) -> np.ndarray:
        """Encode this process's batches and bring all to the leader; elsewhere the result is empty."""
        width, batches = self.encoder.width, [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        most = -(-len(batches) // self.world)
        own = np.zeros((most, BATCH, width), dtype=np.float16)
        for place, batch in enumerate(batches[self.rank :: self.world]):
            own[place, : len(batch)] = encode_half(self.encoder, batch)
        bits = torch.from_numpy(own.view(np.uint8))
        parts = [torch.empty_like(bits) for _ in range(self.world)] if self.leads else None
        with _together():
            dist.gather(bits, parts, 0, group=self.group)
        if parts is None:
            return np.zeros((0, width), dtype=np.float16)
        # Batch i is the (i // world)-th of rank i % world.
        whole = np.stack([part.numpy().view(np.float16) for part in parts], 1)
        return whole.reshape(-1, width)[: len(texts)]


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OSError(
            f"one of the processes that encode together is gone ({error}); "
            "what was kept lasts, and the same command goes on from there"
        ) from error
