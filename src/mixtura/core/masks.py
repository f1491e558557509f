"""A mask beside a weight: how it is kept, found, drawn, and taken apart with a parameter that lies in several processes.

A masked weight is a parameter ``name`` with a bool buffer ``mask_name`` beside it, True where the weight is active.

N:M masks have N active of every M neighbours along the axis of the inputs, which is what hardware that skips zeros wants: the
last axis of a matrix (O, I), and of stacked ones (E, O, I), the second of a convolution (O, I, k, k).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = [
    "PREFIX",
    "Masked",
    "Rows",
    "cut_mask",
    "draw_mask",
    "input_axis",
    "largest_of_groups",
    "local",
    "mask_parameter",
    "masked",
    "masked_parameters",
    "rows_of",
]

PREFIX = "mask_"


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight * mask`` whose gradient reaches every entry of ``weight``, masked ones too.

    Example:
        >>> w = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> masked(w, torch.tensor([True, False])).sum().backward()
        >>> w.grad
        tensor([1., 1.])
    """
    return _Masked.apply(weight, mask)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(frozen=True)
class Masked:
    """A masked weight of a model.

    Attributes:
        parameter: the weight; of three dimensions (E, O, I) for stacked experts, which are masked one by one.
        mask: its mask, bool, of the same shape, and cut as the parameter is; change it in place.
        module: what holds both.
    """

    parameter: nn.Parameter
    mask: Tensor
    module: nn.Module

    def settle(self) -> None:
        """Tell the module that inactive weights are zero now, which spares its forward pass a product."""
        if hasattr(type(self.module), "set_mask"):
            self.module.settle()  # type: ignore[operator]

    @property
    def layers(self) -> int:
        """Matrices that keep a number of active weights of their own: E for stacked experts, else 1."""
        return len(self.mask) if self.mask.dim() == 3 else 1

    @property
    def active(self) -> int:
        """Number of active weights. Collective where the parameter lies in several processes."""
        total = self.mask.sum()
        return int(total.full_tensor() if hasattr(total, "full_tensor") else total)


def masked_parameters(model: nn.Module) -> dict[str, Masked]:
    """The masked weights of a model by the names of their parameters, in the order of its modules.

    Raises:
        ValueError: a parameter that two modules mask (both names are given).
    """
    found: dict[str, Masked] = {}
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        for buffer, mask in module.named_buffers(recurse=False):
            parameter = module._parameters.get(buffer.removeprefix(PREFIX))
            if not buffer.startswith(PREFIX) or parameter is None:
                continue
            name = f"{path}.{buffer.removeprefix(PREFIX)}".lstrip(".")
            if id(parameter) in names:
                raise ValueError(
                    f"{names[id(parameter)]} and {name} are one shared parameter with two masks; "
                    "untie them, or leave one out by skip"
                )
            names[id(parameter)] = name
            found[name] = Masked(parameter, mask, module)
    return found


def mask_parameter(module: nn.Module, name: str) -> None:
    """Give a parameter a mask, all active, without a change of the module's forward pass.

    For modules that are not to be replaced, such as stacked experts (E, O, I). They are sparse as long as a
    :class:`~mixtura.core.sparse_training.MaskOptimizer` trains them, which puts inactive weights to zero.
    """
    parameter = module.get_parameter(name)
    module.register_buffer(f"{PREFIX}{name}", torch.ones_like(parameter, dtype=torch.bool))


def draw_mask(
    shape: torch.Size | tuple[int, ...],
    active: int,
    *,
    generator: torch.Generator | None = None,
    n_m: tuple[int, int] | None = None,
    axis: int = -1,
) -> Tensor:
    """A random mask with exactly ``active`` entries True, bool, on the CPU.

    Args:
        shape: of the mask.
        active: entries that are True.
        generator: source of chance.
        n_m: (N, M): exactly N of every M neighbours along ``axis``; ``active`` must then be N/M of all.
        axis: of the groups; :func:`input_axis` knows it for a weight.
    Raises:
        ValueError: ``active`` does not fit the shape or the pattern.
    """
    total = math.prod(shape)
    if not 0 <= active <= total:
        raise ValueError(f"active must be between 0 and {total}, the weights of {tuple(shape)}, got {active}")
    if n_m is None:
        flat = torch.zeros(total, dtype=torch.bool)
        flat[torch.randperm(total, generator=generator)[:active]] = True
        return flat.view(shape)
    n, m = n_m
    axis %= len(shape)
    if shape[axis] % m or active * m != total * n:
        raise ValueError(
            f"{n} of every {m} along axis {axis} does not fit {active} active weights of {tuple(shape)}; it takes an axis "
            f"that {m} divides, and {n}/{m} of all"
        )
    moved = (*shape[:axis], *shape[axis + 1 :], shape[axis])
    return largest_of_groups(torch.rand(moved, generator=generator).movedim(-1, axis), n_m, axis)


def largest_of_groups(scores: Tensor, n_m: tuple[int, int], axis: int = -1) -> Tensor:
    """The N:M mask of the N largest of every M neighbours along an axis that M divides, of equal ones the first; bool.

    Example:
        >>> largest_of_groups(torch.tensor([3.0, 1.0, 2.0, 1.0, 1.0, 1.0, 0.0, 5.0]), (2, 4)).long()
        tensor([1, 0, 1, 0, 1, 0, 0, 1])
    """
    n, m = n_m
    moved = scores.movedim(axis, -1)
    ranks = moved.reshape(-1, m).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (ranks < n).view(moved.shape).movedim(-1, axis).contiguous()


def input_axis(shape: torch.Size | tuple[int, ...]) -> int:
    """The axis of a weight's inputs, along which groups of an N:M mask lie.

    Example:
        >>> input_axis((8, 4)), input_axis((3, 8, 4)), input_axis((8, 4, 3, 3))
        (1, 2, 1)
    """
    return len(shape) - (1 if len(shape) < 4 else 3)


@dataclass(frozen=True)
class Rows:
    """The rows of a parameter that this process holds.

    Attributes:
        first: number of the first of them.
        count: number of them; 0 where there are more processes than rows.
        group: the processes that hold all rows together; None: this one alone.
        copies: groups of processes that hold the same rows as this one.
        device: where messages of the group lie.
    """

    first: int
    count: int
    group: Any = None
    copies: tuple[Any, ...] = ()
    device: str = "cpu"

    def sum(self, counts: Tensor) -> Tensor:
        """Sum over the group."""
        if self.group is None:
            return counts
        sent = counts.to(self.device, copy=True)
        dist.all_reduce(sent, group=self.group)
        return sent.to(counts.device)

    def before(self, count: int) -> int:
        """Sum of what the processes that hold earlier rows say."""
        if self.group is None:
            return 0
        said = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(said, torch.tensor([count], device=self.device), group=self.group)
        return sum(int(n) for n in said[: dist.get_rank(self.group)])

    def of(self, whole: Tensor) -> Tensor:
        """These rows of a whole tensor."""
        return whole[self.first : self.first + self.count]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process, sharing its memory; a plain tensor as it is."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


def rows_of(name: str, parameter: Tensor) -> Rows:
    """Which rows of a parameter this process holds.

    Raises:
        TypeError: a parameter that is cut otherwise than in rows, as FSDP2 does by default, or that does not lie where its
            processes exchange: on the meta device, or offloaded to the host.
    """
    if not hasattr(parameter, "placements"):
        return Rows(0, len(parameter))
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if len(cut) > 1 or any(type(placements[i]) is not Shard or not placements[i].is_shard(0) for i in cut):
        raise TypeError(
            f"{name} is cut as {placements}, and masks move on whole rows; shard it over one axis of processes by its first "
            "axis, as fully_shard does, or train with DDP"
        )
    if (kind := local(parameter).device.type) != mesh.device_type:
        raise TypeError(
            f"{name} is on {kind}, and its processes exchange over {mesh.device_type}; bring it there before masks are cut "
            "(to_empty for the meta device, no CPUOffloadPolicy)"
        )
    copies = tuple(mesh.get_group(i) for i in range(len(placements)) if i not in cut and mesh.size(i) > 1)
    if not cut or mesh.size(cut[0]) == 1:
        return Rows(0, len(parameter), None, copies, mesh.device_type)
    each = -(-len(parameter) // mesh.size(cut[0]))
    first = min(mesh.get_local_rank(cut[0]) * each, len(parameter))
    count = min(each, len(parameter) - first)
    if len(local(parameter)) != count:
        raise TypeError(f"{name} has {len(local(parameter))} rows in this process, where even shares would be {count}")
    return Rows(first, count, mesh.get_group(cut[0]), copies, mesh.device_type)


def cut_mask(name: str, found: Masked, rows: Rows) -> Masked:
    """Cut a whole mask as its parameter is cut, in its module too; one that is cut already, or need not be, stays."""
    parameter = found.parameter
    if not hasattr(parameter, "placements") or hasattr(found.mask, "placements"):
        return found
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    own = rows.of(found.mask).to(local(parameter).device, copy=True)
    mesh, placements = parameter.device_mesh, parameter.placements
    mask = DTensor.from_local(
        own, mesh, placements, run_check=False, shape=found.mask.shape, stride=found.mask.stride()
    )
    found.module._buffers[PREFIX + name.rpartition(".")[2]] = mask
    return Masked(found.parameter, mask, found.module)
