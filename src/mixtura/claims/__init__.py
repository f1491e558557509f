"""Claims: each system's paper in one sentence, and the run that checks it on this machine.

One file a system, named after its id, defines ``CLAIM``. ``run`` computes a record; records of ``cpu`` runs live in
``docs/claims`` and the gallery is made from them.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path

from mixtura.claims.framework import SCALES, Check, Claim, Record, Scale, agrees, judge, run_claim

__all__ = ["SCALES", "Check", "Claim", "Record", "Scale", "agrees", "available", "judge", "load", "run"]

_NOT_CLAIMS = {"framework", "gallery"}


def available() -> list[str]:
    """Ids of the systems that have a claim, sorted."""
    modules = (m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in modules if name not in _NOT_CLAIMS)


def load(system: str) -> Claim:
    """The claim of a system.

    Raises:
        ValueError: the system has no claim yet, or is not known; those that have one are listed.
    """
    if system not in available():
        raise ValueError(f"no claim for {system!r}; there is one for {available()}")
    claim = importlib.import_module(f"{__name__}.{system.replace('-', '_')}").CLAIM
    assert isinstance(claim, Claim)
    return claim


def run(
    system: str,
    scale: Scale = "cpu",
    seed: int | Sequence[int] | None = None,
    *,
    scratch: str | Path = "out/claims",
    resume: bool = True,
) -> Record:
    """Run a claim and return its record.

    Args:
        system: id of the system.
        scale: ``smoke`` (seconds: does it run), ``cpu`` (minutes: this is where it must hold) or ``gpu``.
        seed: one seed or several instead of the claim's own.
        scratch: where finished seeds are kept, so that an interrupted run goes on.
        resume: use seeds finished before.
    """
    seeds = (seed,) if isinstance(seed, int) else seed
    return run_claim(load(system), scale, seeds=seeds, scratch=Path(scratch), resume=resume)
