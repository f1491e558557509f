"""One batch whose samples lie in several processes: how a loss of the part becomes a part of the loss.

Processes average their gradients. So that the average is the gradient of the loss over all samples, a process

- divides its sums by the *mean* number of samples a process has, not by its own: uneven parts then weigh as they should;
- takes statistics that carry no gradient, such as the counts of a balance loss, over all samples.

Source: the balance loss is a product of two means (Switch Transformers, 2101.03961, eq. 4), and the mean over processes of
products is not the product of means.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["SharedBatch"]


class SharedBatch:
    """The processes that hold parts of one batch; one process alone where there is no process group.

    Args:
        group: a process group; None: all processes.
    Every process calls `sum` and `mean` equally often and in the same order, also with nothing to add.

    Example:
        >>> int(SharedBatch().sum(torch.tensor(3))), float(SharedBatch().mean(3, torch.ones(())))
        (3, 3.0)
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size: int = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over processes, the same everywhere, without gradient."""
        total = values.detach().clone()
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        return total

    def mean(self, count: int | Tensor, like: Tensor) -> Tensor:
        """Mean of a count over processes, at least 1 / size so that it may divide: a scalar of dtype and device of ``like``."""
        total = self.sum(torch.as_tensor(count, device=like.device))
        return total.clamp(min=1).to(like.dtype) / self.size
