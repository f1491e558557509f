"""The room's estimators in one place: each is run through the contract, and what is skipped names its reason."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ESTIMATORS", "Case"]


@dataclass(frozen=True)
class Case:
    """An estimator under contract.

    Attributes:
        make: builds it, small and quick.
        expected_failures: name of a scikit-learn check that does not apply -> why.
    """

    make: Callable[[], Any]
    expected_failures: Mapping[str, str] = field(default_factory=dict)


def _energy_density() -> Any:
    from mixtura.density import EnergyDensity

    return EnergyDensity(max_iter=20, width=8, depth=1, batch_size=16, noise_batch_size=16)


ESTIMATORS: dict[str, Case] = {"energy density": Case(_energy_density)}
