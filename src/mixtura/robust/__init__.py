"""Learning from data that is noisy, shifted or mixed on purpose: classifiers that know what they do not know.

>>> from mixtura.robust import OutlierExposedClassifier     # doctest: +SKIP

Each name imports its module when it is first used.
"""

from typing import TYPE_CHECKING

from mixtura._lazy import lazy_names

if TYPE_CHECKING:
    from mixtura.robust.ood import OODMetrics, holdout_split, ood_metrics, score
    from mixtura.robust.outlier_classifier import OutlierExposedClassifier
    from mixtura.robust.outlier_exposure import (
        EnergyExposure,
        HardOutlierExposure,
        MixtureOutlierExposure,
        OutlierExposure,
    )

__all__ = [
    "EnergyExposure",
    "HardOutlierExposure",
    "MixtureOutlierExposure",
    "OODMetrics",
    "OutlierExposedClassifier",
    "OutlierExposure",
    "holdout_split",
    "ood_metrics",
    "score",
]

NAMES: dict[str, str] = {
    "EnergyExposure": "mixtura.robust.outlier_exposure",
    "HardOutlierExposure": "mixtura.robust.outlier_exposure",
    "MixtureOutlierExposure": "mixtura.robust.outlier_exposure",
    "OODMetrics": "mixtura.robust.ood",
    "OutlierExposedClassifier": "mixtura.robust.outlier_classifier",
    "OutlierExposure": "mixtura.robust.outlier_exposure",
    "holdout_split": "mixtura.robust.ood",
    "ood_metrics": "mixtura.robust.ood",
    "score": "mixtura.robust.ood",
}

__getattr__ = lazy_names(__name__, NAMES)
