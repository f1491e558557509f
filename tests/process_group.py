"""Run one function in several gloo processes, and bring back what each returned."""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_processes(world: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """``work(rank, *args)`` in each of ``world`` processes with a process group; the results in the order of ranks.

    Processes are forked, since fresh interpreters take seconds to import torch. What fails in one is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = mp.start_processes(
            _process, (world, work, args, folder), nprocs=world, join=False, start_method="fork"
        )
        assert started is not None
        while not started.join(grace_period=30):  # after one has failed, the others may still say what they saw of it
            pass
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _process(rank: int, world: int, work: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=180)
    )
    torch.save(work(rank, *args), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
