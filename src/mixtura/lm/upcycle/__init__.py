"""Dense models in, mixtures of experts out. Names are looked up on first use, so that importing this loads no transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtura.lm.upcycle.api import METHODS, upcycle
    from mixtura.lm.upcycle.branch_attend_mix import BranchAttendConfig, branch, mix, vocabularies_agree
    from mixtura.lm.upcycle.branch_train_mix import average, to_standard
    from mixtura.lm.upcycle.copies import CopyConfig
    from mixtura.lm.upcycle.own_units import from_dense
    from mixtura.lm.upcycle.pyramid import PyramidConfig
    from mixtura.lm.upcycle.segments import segment
    from mixtura.lm.upcycle.wide_copies import WideCopyConfig, wide_copies

__all__ = [
    "METHODS",
    "BranchAttendConfig",
    "CopyConfig",
    "PyramidConfig",
    "WideCopyConfig",
    "average",
    "branch",
    "from_dense",
    "mix",
    "segment",
    "to_standard",
    "upcycle",
    "vocabularies_agree",
    "wide_copies",
]

_HOMES = {
    "api": ("METHODS", "upcycle"),
    "branch_attend_mix": ("BranchAttendConfig", "branch", "mix", "vocabularies_agree"),
    "branch_train_mix": ("average", "to_standard"),
    "copies": ("CopyConfig",),
    "own_units": ("from_dense",),
    "pyramid": ("PyramidConfig",),
    "segments": ("segment",),
    "wide_copies": ("WideCopyConfig", "wide_copies"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
