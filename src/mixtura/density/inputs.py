"""From what a caller gives (arrays, tables, batches, paths, labels, weights) to what EM reads, checked once.

Every complaint here names what came and what would do; in several processes it reaches all of them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mixtura.core.gaussian import COVARIANCES, Covariance
from mixtura.core.natural_form import block_rows
from mixtura.core.processes import Processes
from mixtura.data.tables import non_finite, text_problem
from mixtura.density.em import Samples
from mixtura.density.labels import Classes, as_labels, map_classes
from mixtura.density.sources import Arrays, Source, Summary, merge, open_source, scan

__all__ = [
    "Drawn",
    "Given",
    "as_matrix",
    "as_source",
    "as_weights",
    "check_parameters",
    "device_of",
    "dtype_of",
    "prepare",
    "subsample",
]

log = logging.getLogger(__name__)

CHOICES = {
    "covariance": COVARIANCES,
    "init": ("k-means++", "random"),
    "missing": ("error", "expect"),
    "reg_unit": ("variance", "absolute"),
}


@dataclass(frozen=True)
class Given:
    """Checked input of a fit.

    Attributes:
        samples: for EM.
        summary: of the samples of all processes.
        classes: what labels there are, or None.
        y: labels of the samples of all processes in the order of ranks, or None.
        first: number of this process's first sample among all.
        names: of the features, or None.
    """

    samples: Samples
    summary: Summary
    classes: Classes | None
    y: np.ndarray | None
    first: int
    names: list[str] | None


@dataclass(frozen=True)
class Drawn:
    """Some of the samples of all processes.

    Attributes:
        z: in the coordinates of the frame, shape (M, F).
        classes: rows of the table of classes, -1 where unlabelled, shape (M,).
        weights: shape (M,), or None for one each.
    """

    z: np.ndarray
    classes: np.ndarray
    weights: np.ndarray | None


def check_parameters(estimator: Any) -> None:
    """Raise a ValueError that names the first parameter of a mixture that is out of its range."""
    for name, least in (("n_components", 1), ("n_init", 1), ("max_iter", 0)):
        value = getattr(estimator, name)
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    for name in ("tol", "reg"):
        value = getattr(estimator, name)
        if not isinstance(value, (int, float, np.number)) or not 0 <= value < np.inf:
            raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    for name, known in CHOICES.items():
        if getattr(estimator, name) not in known:
            raise ValueError(f"{name} must be one of {list(known)}, got {getattr(estimator, name)!r}")
    if estimator.variance is not None:
        if estimator.covariance != "spherical" or estimator.precisions_init is not None:
            raise ValueError(
                "variance is for covariance='spherical' without precisions_init, which would contradict it"
            )
        if not isinstance(estimator.variance, (int, float, np.number)) or not 0 < estimator.variance < np.inf:
            raise ValueError(f"variance must be a number > 0, got {estimator.variance!r}")
    rows = estimator.block_size
    if rows != "auto" and not (isinstance(rows, (int, np.integer)) and rows >= 1):
        raise ValueError(f"block_size must be 'auto' or a whole number >= 1, got {rows!r}")


def as_source(estimator: Any, X: Any, *, reset: bool, min_samples: int = 1) -> Source:
    """The samples of ``X`` as a source.

    Args:
        estimator: whose number and names of features are set (``reset``) or compared.
        X: array-like, DataFrame, memory map, iterable of batches, path of a Parquet file or folder.
        reset: whether this is a fit.
        min_samples: fewest samples of an array-like.
    """
    from sklearn.utils.validation import validate_data

    source = open_source(X)
    if source is None:
        # Kept in its own type: blocks are converted as they are read, so integers need no second copy in memory.
        array = validate_data(
            estimator,
            _table(X, "X"),
            reset=reset,
            dtype="numeric",
            ensure_all_finite=False,
            ensure_min_samples=min_samples,
        )
        names = getattr(estimator, "feature_names_in_", None)
        return Arrays(array, None if names is None else list(names))
    first = next(source.blocks(1), None)
    if first is None:
        if min_samples:
            raise ValueError("X has no samples: n_samples = 0 (every batch is empty)")
    elif reset:
        estimator.n_features_in_ = first.shape[1]
        vars(estimator).pop("feature_names_in_", None)
        if source.names is not None:
            estimator.feature_names_in_ = np.array(source.names, dtype=object)
    elif first.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {first.shape[1]} features, but {type(estimator).__name__} is expecting "
            f"{estimator.n_features_in_} features as input"
        )
    elif source.names is not None and hasattr(estimator, "feature_names_in_"):
        fitted = estimator.feature_names_in_.tolist()
        if source.names != fitted:
            raise ValueError(
                f"The feature names should match those that were passed during fit: X has the columns {source.names[:8]}, "
                f"and the fit had {fitted[:8]}, in this order"
            )
    return source


def as_matrix(
    estimator: Any, X: Any, *, reset: bool, name: str = "X", hint: str = "", dtype: Any = np.float64, **options: Any
) -> np.ndarray:
    """``X`` as an array of finite numbers, for the estimators that read all of it at once.

    Args:
        estimator: whose number and names of features are set (``reset``) or compared.
        X: array-like, DataFrame or tensor.
        reset: whether this is a fit.
        name: what errors call it.
        hint: what an error of missing values ends with.
        dtype: or several, of which the first is taken where ``X`` has none of them.
        options: more of scikit-learn's ``validate_data``.
    Raises:
        ValueError: text or dates in a DataFrame (column named), NaN or infinity (counted, first position named), and what
            scikit-learn complains of.
    """
    from sklearn.utils.validation import validate_data

    table = _table(X, name)
    found = validate_data(estimator, table, reset=reset, dtype=dtype, ensure_all_finite=False, **options)
    problem = non_finite(found.reshape(len(found), -1), getattr(estimator, "feature_names_in_", None))
    if problem:
        raise ValueError(f"{name} contains {problem}{hint if 'missing' in problem else ''}")
    # torch has no negative strides, and warns of memory that must not be written.
    matrix: np.ndarray = found if found.flags.writeable and min(found.strides, default=0) >= 0 else found.copy()
    return matrix


def as_weights(sample_weight: Any) -> np.ndarray:
    """Weights as float64, shape (N,).

    Raises:
        ValueError: another shape, weights that are negative or not finite (first position named), or all zero.
    """
    try:
        found = np.asarray(sample_weight, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sample_weight must hold numbers ({error})") from error
    if found.ndim != 1:
        raise ValueError(
            f"Sample weights must be 1D array or scalar: sample_weight must have shape (samples,), got {found.shape}"
        )
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if len(bad):
        raise ValueError(f"sample_weight must be finite and >= 0, got {found[bad[0]]} at position {bad[0]}")
    return found


def device_of(device: str) -> str:
    """The device to compute on: ``"auto"`` is CUDA where there is one.

    Raises:
        ValueError: a device that torch does not know, that this machine lacks, or that has no float64.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or the like, got {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r} was asked for, and this machine has no CUDA device; use device='cpu'")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be on cpu or cuda, where sums can be float64, got {device!r}")
    return device


def dtype_of(dtype: Any, source: Source) -> torch.dtype:
    """The type of a block's arithmetic: as asked for, else float32 for float32 samples and float64 for all others."""
    if dtype is None:
        first = next(source.blocks(1), None)
        return torch.float32 if first is not None and first.dtype == torch.float32 else torch.float64
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if isinstance(dtype, (type, np.dtype)):
        found = getattr(torch, np.dtype(dtype).name, None)
    if found not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be None, float32 or float64, got {dtype!r}")
    return found


def prepare(estimator: Any, X: Any, y: Any, sample_weight: Any, processes: Processes) -> Given:
    """Everything a fit of ``estimator`` needs, checked.

    Raises:
        ValueError: as :func:`mixtura.density.GaussianMixture.fit` lists.
    """
    covariance: Covariance = estimator.covariance
    missing = estimator.missing == "expect"
    device = device_of(estimator.device)
    summary: Summary | None = None
    source: Source
    y_N = w_N = None
    with processes.together():
        source = as_source(estimator, X, reset=True, min_samples=2 if processes.size == 1 else 0)
        y_N = None if y is None else as_labels(y)
        w_N = None if sample_weight is None else as_weights(sample_weight)
        summary = scan(source, w_N, missing=missing)
        n_own = 0 if summary is None else summary.n
        if y_N is not None and len(y_N) != n_own:
            raise ValueError(f"y has {len(y_N)} labels and X has {n_own} samples; they must be as many")
        dtype = dtype_of(estimator.dtype, source)
    n_own = 0 if summary is None else summary.n
    everywhere, first = _exchange(summary, processes)
    # Float32 where every process that has samples has them in float32.
    wide = processes.sum(torch.tensor([float(n_own > 0 and dtype == torch.float64)], dtype=torch.float64))
    dtype = torch.float64 if float(wide) else torch.float32
    estimator.n_features_in_ = len(everywhere.mean)
    if everywhere.n < max(estimator.n_components, 2):
        raise ValueError(
            f"n_components={estimator.n_components} needs as many samples and at least 2, got n_samples = {everywhere.n}"
        )
    if not everywhere.weight > 0:
        raise ValueError("sample_weight is zero for every sample")
    counted = n_own if w_N is None else int((w_N > 0).sum())
    n_counted = int(processes.sum(torch.tensor([float(counted)], dtype=torch.float64)))
    if n_counted < estimator.n_components:
        raise ValueError(
            f"n_components={estimator.n_components} needs as many samples whose sample_weight is above 0, got {n_counted}"
        )
    y_all = _gather_labels(y_N, n_own, processes)
    classes = None if y_all is None else map_classes(y_all, estimator.n_components, estimator.class_components)
    frame = everywhere.frame(covariance, source.names)
    constant = np.flatnonzero(everywhere.high <= everywhere.low)
    if len(constant) and not estimator.reg > 0:
        called = [str(source.names[f]) if source.names else str(f) for f in constant[:5]]
        raise ValueError(
            f"column {', '.join(called)} is constant, so it has no density without regularisation; drop it or set reg > 0"
        )
    if estimator.reg_unit == "variance":
        floor_F = torch.full((len(everywhere.mean),), float(estimator.reg), dtype=torch.float64)
    else:
        floor_F = float(estimator.reg) / frame.scale.square()
    rows = estimator.block_size
    if rows == "auto":
        rows = block_rows(len(everywhere.mean), estimator.n_components, covariance, dtype, device)
    own_rows: torch.Tensor | None = None
    idle: tuple[int, ...] = ()
    if classes is not None and y_all is not None:
        if (y_all >= 0).all():
            idle = tuple(np.flatnonzero(classes.of_components() < 0).tolist())
            if idle:
                log.warning("every sample is labelled, so components %s, which no class has, stay empty", list(idle))
        own_rows = torch.from_numpy(classes.rows(y_N if y_N is not None else np.full(n_own, -1)))
    # All processes have weights or none has, since what they exchange depends on it.
    if float(processes.sum(torch.tensor([float(w_N is not None)], dtype=torch.float64))) and w_N is None:
        w_N = np.ones(n_own)
    samples = Samples(
        source=source,
        frame=frame,
        covariance=covariance,
        floor=floor_F,
        n=everywhere.n,
        weight=everywhere.weight,
        weights=None if w_N is None else torch.from_numpy(w_N),
        classes=own_rows,
        table=None if classes is None else torch.from_numpy(classes.table()),
        idle=idle,
        missing=missing,
        rows=int(rows),
        dtype=dtype,
        device=device,
        processes=processes,
        variance=None if estimator.variance is None else float(estimator.variance / frame.scale[0] ** 2),
    )
    return Given(samples, everywhere, classes, y_all if classes is not None else None, first, source.names)


def subsample(given: Given, n: int, random_state: np.random.RandomState) -> Drawn:
    """At most n samples to start from, the same whatever the number of processes and batches.

    Up to half of them are labelled ones, so that small classes are there; gaps are filled with the mean.
    """
    samples, total = given.samples, given.summary.n
    chosen_N = np.zeros(total, dtype=bool)
    if total <= n:
        chosen_N[:] = True
    else:
        if given.y is not None:
            labelled = np.flatnonzero(given.y >= 0)
            chosen_N[labelled if len(labelled) <= n // 2 else random_state.choice(labelled, n // 2, replace=False)] = (
                True
            )
        left = np.flatnonzero(~chosen_N)
        chosen_N[random_state.choice(left, n - int(chosen_N.sum()), replace=False)] = True
    parts, own = [], 0
    for block in samples.source.blocks(samples.rows):
        mine = chosen_N[given.first + own : given.first + own + len(block)]
        own += len(block)
        if mine.any():
            parts.append(block[torch.from_numpy(mine)].double())
    f = len(given.summary.mean)
    rows = torch.cat(parts) if parts else torch.empty(0, f, dtype=torch.float64)
    rows = torch.cat([part.reshape(-1, f) for part in samples.processes.gather(rows.reshape(-1))])
    z_MF = ((rows - samples.frame.centre) / samples.frame.scale).nan_to_num(0.0).numpy()
    classes_M = np.full(len(z_MF), -1)
    if given.y is not None and given.classes is not None:
        classes_M = given.classes.rows(given.y)[chosen_N]
    weights = None
    if samples.weights is not None:
        mine = chosen_N[given.first : given.first + own]
        weights = torch.cat(samples.processes.gather(samples.weights[torch.from_numpy(mine)])).numpy()
    return Drawn(z_MF, classes_M, weights)


def _table(X: Any, name: str) -> Any:
    """``X`` as scikit-learn can read it: tensors as arrays; a column of a DataFrame that holds no numbers is named."""
    if isinstance(X, torch.Tensor):
        X = X.detach().cpu()
        return (X.float() if X.dtype == torch.bfloat16 else X).numpy()
    if hasattr(X, "columns") and hasattr(X, "iloc"):
        for i in range(X.shape[1]):
            if problem := text_problem(X.iloc[:, i]):
                raise ValueError(f"{name} cannot be computed with: {problem}; leave the column out or encode it")
    return X


def _exchange(summary: Summary | None, processes: Processes) -> tuple[Summary, int]:
    """The summary of all processes' samples, and the number of this one's first sample among all."""
    own = torch.empty(0, dtype=torch.float64)
    if summary is not None:
        parts = (summary.seen, summary.mean, summary.scatter, summary.low, summary.high)
        own = torch.from_numpy(np.concatenate([[float(summary.n), summary.weight], *parts]))
    merged: Summary | None = None
    sizes, n_features = [], dict[int, int]()
    for rank, vector in enumerate(processes.gather(own)):
        if len(vector) == 0:
            sizes.append(0)
            continue
        n_features[rank] = (len(vector) - 2) // 5
        if len(set(n_features.values())) > 1:
            (a, f), (b, g) = next(iter(n_features.items())), (rank, n_features[rank])
            raise ValueError(f"process {a} has samples of {f} features and process {b} of {g}; all must have the same")
        seen, mean, scatter, low, high = np.split(vector.numpy()[2:], 5)
        part = Summary(int(vector[0]), float(vector[1]), seen, mean, scatter, low, high)
        merged = part if merged is None else merge(merged, part)
        sizes.append(part.n)
    if merged is None:
        raise ValueError("X has no samples: n_samples = 0")
    return merged, sum(sizes[: processes.rank])


def _gather_labels(y_N: np.ndarray | None, n_own: int, processes: Processes) -> np.ndarray | None:
    """Labels of all processes; a process without labels has unlabelled samples. None where none has labels."""
    given = processes.sum(torch.tensor([0.0 if y_N is None else 1.0], dtype=torch.float64))
    if not given[0]:
        return None
    own = np.full(n_own, -1, dtype=np.int64) if y_N is None else y_N
    return torch.cat(processes.gather(torch.from_numpy(own))).numpy()
