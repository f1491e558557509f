"""Several processes that fit one estimator: sums of statistics, exchange of small things, errors that reach everyone.

Every process holds a shard of the samples, in the order of ranks. Only tensors travel, never pickled objects.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "Processes", "join"]

log = logging.getLogger(__name__)


class Processes:
    """The processes of a fit; one process alone where ``size`` is 1.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self._device = rank, size, device

    def sum(self, values: Tensor) -> Tensor:
        """Sum over processes; every process gets the same."""
        if self.size == 1:
            return values
        travelling = values.to(self._device, copy=True).contiguous()
        dist.all_reduce(travelling)
        return travelling.to(values.device)

    def gather(self, values: Tensor) -> list[Tensor]:
        """The vector of every process, in the order of ranks; lengths may differ."""
        if self.size == 1:
            return [values]
        own = values.to(self._device).contiguous()
        lengths = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(own)], device=self._device))
        longest = max(int(length) for length in lengths)
        if longest == 0:
            return [values[:0] for _ in lengths]
        padded = own.new_zeros(longest)
        padded[: len(own)] = own
        found = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(found, padded)
        return [part[: int(length)].to(values.device) for part, length in zip(found, lengths, strict=True)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that may fail in one process: its error is raised in all of them, so that none waits for ever.

        Raises:
            ValueError: with the rank and the message of the first process that failed. Alone, errors pass unchanged.
        """
        if self.size == 1:
            yield
            return
        problem: Exception | None = None
        try:
            yield
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            problem = error
        text = torch.tensor(list(str(problem).encode()) if problem else [], dtype=torch.uint8)
        said = self.gather(text)
        for rank, message in enumerate(said):
            if len(message):
                raise ValueError(f"process {rank}: {bytes(message.tolist()).decode()}") from problem

    def chance(self, random_state: int | np.random.RandomState | None) -> np.random.RandomState:
        """The source of chance of all processes: rank 0's, for without a seed each would start elsewhere."""
        from sklearn.utils import check_random_state

        if self.size == 1:
            source: np.random.RandomState = check_random_state(random_state)
            return source
        whole = isinstance(random_state, (int, np.integer))
        seed = random_state if whole else check_random_state(random_state).randint(np.iinfo(np.int32).max)
        first = self.gather(torch.tensor([int(seed)]))[0]  # type: ignore[arg-type]
        return np.random.RandomState(int(first))


ALONE = Processes()


def join(distributed: bool | Literal["auto"]) -> Processes:
    """The processes to fit with.

    Args:
        distributed: ``"auto"`` joins the process group if there is one, and the one that torchrun describes in the
            environment if it was not started yet; ``True`` demands one; ``False`` fits alone.
    Raises:
        ValueError: another value, or ``True`` and no group.
    """
    if distributed not in (True, False, "auto"):
        raise ValueError(f"distributed must be True, False or 'auto', got {distributed!r}")
    if distributed is False or not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group("gloo")
            log.info("joined the process group that the environment describes, as rank %d", dist.get_rank())
        elif distributed is True:
            raise ValueError("distributed=True needs a process group; start the script with torchrun")
        else:
            return ALONE
    if dist.get_world_size() == 1:
        return ALONE
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return Processes(dist.get_rank(), dist.get_world_size(), device)
