"""Small real tables by name, from packages that carry them: nothing is downloaded.

==============  ==========================================  ================  ============
name            rows and columns                            target            carried by
==============  ==========================================  ================  ============
diabetes        442 patients, 10 measurements               progression       scikit-learn
wine            178 wines, 13 analyses                      cultivar          scikit-learn
breast_cancer   569 tumours, 30 measurements                benign            scikit-learn
iris            150 flowers, 4 lengths                      species           scikit-learn
digits          1797 images of 8 x 8                        digit             scikit-learn
boston          506 districts, 13 figures                   median value      mlxtend
autompg         392 cars, 7 figures                         miles a gallon    mlxtend
==============  ==========================================  ================  ============
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mixtura.data.texts import MissingData

__all__ = ["SAMPLES", "Sample", "sample"]

BOSTON = ("CRIM", "ZN", "INDUS", "CHAS", "NOX", "RM", "AGE", "DIS", "RAD", "TAX", "PTRATIO", "B", "LSTAT")
AUTOMPG = ("cylinders", "displacement", "horsepower", "weight", "acceleration", "year", "origin")


@dataclass(frozen=True)
class Sample:
    """A table with a target.

    Attributes:
        name: of the data set.
        X: shape (N, F), float64.
        y: target, shape (N,): float64 for a quantity, int64 for a class.
        columns: names of the F columns.
    """

    name: str
    X: np.ndarray
    y: np.ndarray
    columns: tuple[str, ...]

    def predicting(self, target: str, features: tuple[str, ...] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """One column from others: X of shape (N, F') and y of shape (N,).

        Args:
            target: name of the column to predict.
            features: names of those to predict it from; None takes all others.
        Raises:
            ValueError: an unknown name.
        """
        wanted = tuple(c for c in self.columns if c != target) if features is None else features
        for name in (target, *wanted):
            if name not in self.columns:
                raise ValueError(f"{self.name} has no column {name!r}; it has {list(self.columns)}")
        return self.X[:, [self.columns.index(c) for c in wanted]], self.X[:, self.columns.index(target)]


def sample(name: str) -> Sample:
    """A small real data set by name.

    Args:
        name: one of :data:`SAMPLES`.
    Raises:
        ValueError: an unknown name (the known ones are listed).
        MissingData: the package that carries it is not installed (it is named).
    Example:
        >>> sample("iris").X.shape
        (150, 4)
    """
    if name not in SAMPLES:
        raise ValueError(f"name must be one of {sorted(SAMPLES)}, got {name!r}")
    package, load = SAMPLES[name]
    try:
        X, y, columns = load(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("sklearn", "mlxtend"):
            raise
        raise MissingData(
            f"the sample {name!r} comes with {package}; install it with: pip install {package}"
        ) from error
    y = np.asarray(y)
    y = y.astype(np.int64 if y.dtype.kind in "iu" else np.float64)
    return Sample(name, np.asarray(X, dtype=np.float64), y, tuple(map(str, columns)))


Loaded = tuple[np.ndarray, np.ndarray, tuple[str, ...]]


def _sklearn(name: str) -> Loaded:
    from sklearn import datasets

    found = getattr(datasets, f"load_{name}")()
    return found.data, found.target, tuple(found.feature_names)


def _boston(name: str) -> Loaded:
    from mlxtend.data import boston_housing_data

    return *boston_housing_data(), BOSTON


def _autompg(name: str) -> Loaded:
    from mlxtend.data import autompg_data

    X, y = autompg_data()
    return X[:, : len(AUTOMPG)], y, AUTOMPG  # a last column stands for the car's name and holds nothing


SAMPLES: dict[str, tuple[str, Callable[[str], Loaded]]] = {
    "diabetes": ("scikit-learn", _sklearn),
    "wine": ("scikit-learn", _sklearn),
    "breast_cancer": ("scikit-learn", _sklearn),
    "iris": ("scikit-learn", _sklearn),
    "digits": ("scikit-learn", _sklearn),
    "boston": ("mlxtend", _boston),
    "autompg": ("mlxtend", _autompg),
}
