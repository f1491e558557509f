"""A process's pixels among those of all processes: what of them must be known everywhere before a fit.

Shapes: P pixels, L channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mixtura.core.processes import Processes

__all__ = ["Shard"]


@dataclass(frozen=True)
class Shard:
    """What this process learns from, and what is known of all processes' pixels.

    Attributes:
        pixels: shape (P, L), of this process; P may be 0 where there are several.
        n: pixels of all processes.
        low, high: least and largest value of each channel, (L,), float64.
        dtype: of the spectra: float64 where any process has pixels of it.
    """

    pixels: np.ndarray
    n: int
    low: np.ndarray
    high: np.ndarray
    dtype: Any

    @staticmethod
    def of(X: np.ndarray, processes: Processes) -> Shard:
        """Exchange what has to be known.

        Raises:
            ValueError: processes with different numbers of channels, or no pixel in any.
        """
        widths = [int(part) for part in processes.gather(torch.tensor([X.shape[1]]))]
        for rank, width in enumerate(widths):
            if width != widths[0]:
                raise ValueError(
                    f"process 0 has pixels of {widths[0]} channels and process {rank} of {width}; all must have the same"
                )
        n, n_wide = processes.sum(torch.tensor([len(X), len(X) * (X.dtype == np.float64)])).tolist()
        if n == 0:
            raise ValueError("X has no pixel in any process")
        ends = X.min(0, initial=np.inf), X.max(0, initial=-np.inf)
        low_L, high_L = (np.array(processes.gather(torch.from_numpy(end.astype(np.float64)))) for end in ends)
        return Shard(X, n, low_L.min(0), high_L.max(0), np.float64 if n_wide else np.float32)
