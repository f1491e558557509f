"""Dense models in, mixtures of experts out."""

from mixtura.lm.upcycle.api import METHODS, upcycle
from mixtura.lm.upcycle.branch_attend_mix import BranchAttendConfig, branch, mix, vocabularies_agree
from mixtura.lm.upcycle.branch_train_mix import average, branch_train_mix, to_standard
from mixtura.lm.upcycle.copies import CopyConfig, copies

__all__ = [
    "METHODS",
    "BranchAttendConfig",
    "CopyConfig",
    "average",
    "branch",
    "branch_train_mix",
    "copies",
    "mix",
    "to_standard",
    "upcycle",
    "vocabularies_agree",
]
