"""What a piece of work will take, said before it starts: parameters, bytes, minutes.

Operations are counted as two a parameter and token forward, four backward (Kaplan et al. 2020, 2001.08361, sec. 2.1);
the machine's rate is measured by a short matrix product. Estimates are good to a factor of about two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mixtura.core.measure import matmul_rate

__all__ = ["Cost", "Size", "estimate", "model_size"]

# Share of a large matrix product's rate that a whole step of a small model reaches (measured on two cores: 0.6 to 1.1,
# above 1 where bfloat16 is faster).
EFFICIENCY = 0.7


@dataclass(frozen=True)
class Size:
    """Parameters of a model: all of them, and those that one token uses."""

    total: int
    active: int


@dataclass(frozen=True)
class Cost:
    """What a command will take.

    Attributes:
        size: parameters of the result.
        disk: bytes written.
        memory: bytes resident at the peak, roughly.
        seconds: wall-clock time, roughly.
    """

    size: Size
    disk: int
    memory: int
    seconds: float

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.1f} minutes" if self.seconds > 90 else f"{max(1, round(self.seconds))} seconds"
        return (
            f"{self.size.total / 1e6:,.1f} M parameters ({self.size.active / 1e6:,.1f} M active a token), "
            f"{self.disk / 1e6:,.0f} MB on disk, about {self.memory / 1e9:.1f} GB of memory and {minutes}"
        )


def model_size(model: Any) -> Size:
    """Count parameters, shared ones once; also of a model on the meta device.

    A token uses all parameters but those of the experts that its gate does not choose.
    """
    from mixtura.lm.anatomy import find_moe

    total = sum(p.numel() for p in model.parameters())
    idle = 0.0
    for block in find_moe(model):
        experts = sum(p.numel() for p in block.experts.parameters())
        idle += experts * (1 - block.k / block.n_experts)
    return Size(total, round(total - idle))


def estimate(
    size: Size,
    *,
    bytes_per_parameter: float = 2.0,
    forward_tokens: int = 0,
    trained_tokens: int = 0,
    trained_share: float = 1.0,
    extra_memory: int = 0,
    rate: Callable[[torch.dtype], float] = matmul_rate,
) -> Cost:
    """Estimate a command from the size of its result.

    Args:
        size: parameters of the model that runs.
        bytes_per_parameter: of the result on disk.
        forward_tokens: tokens that pass through without gradients.
        trained_tokens: tokens of training.
        trained_share: share of the parameters that AdamW trains (gradient and two moments, float32).
        extra_memory: bytes besides the model.
        rate: operations a second of this machine for a type.
    """
    operations = 2 * size.active * forward_tokens + 6 * size.active * trained_tokens
    seconds = operations / (EFFICIENCY * rate(torch.float32)) + size.total * bytes_per_parameter / 300e6
    resident = 4 * size.total if trained_tokens else bytes_per_parameter * size.total
    memory = resident + (12 * size.total * trained_share if trained_tokens else 0) + extra_memory + 500_000_000
    return Cost(size, round(size.total * bytes_per_parameter), round(memory), seconds)
