"""``mixtura train --parallel``: which processes train together, and that one of them speaks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixtura.lm.parallel.training import ExpertParallel

__all__ = ["team_of"]

Say = Callable[[str], None]


@contextmanager
def team_of(parallel: str | None, device: str, say: Say) -> Iterator[tuple["ExpertParallel | None", str, Say]]:
    """The team that ``--parallel`` names, the device of this process, and words for the user out of one process only.

    Raises:
        ValueError: several processes without ``--parallel``, or a layout that does not fit their number.
    """
    from mixtura.lm.parallel.mesh import started_processes

    if parallel is None:
        if (world := started_processes()) > 1:
            raise ValueError(
                f"{world} processes are running, and nothing says how they share the work; "
                f"give --parallel, as in --parallel expert={world}, or start one process"
            )
        yield None, device, say
        return
    from mixtura.lm.parallel.training import join

    team, own = join(parallel, device=device)
    with team:
        yield team, own, say if team.leads else _silent


def _silent(text: str) -> None:
    pass
