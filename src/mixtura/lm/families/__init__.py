"""Dense families in, mixture families out: what a checkpoint's structure is, and which native family can hold the result."""

from mixtura.lm.families.dense import FAMILIES
from mixtura.lm.families.read import Dense, NotDense, UnsupportedFamily, parameter_shapes, read_dense
from mixtura.lm.families.write import NATIVE, build, native_family, why_not

__all__ = [
    "FAMILIES",
    "NATIVE",
    "Dense",
    "NotDense",
    "UnsupportedFamily",
    "build",
    "native_family",
    "parameter_shapes",
    "read_dense",
    "why_not",
]
