"""How processes share experts: a grid with one axis for each way of sharing.

A process has four coordinates, the last running fastest:

- ``expert_data``: copies of all experts; their gradients are summed along it;
- ``expert``: each process holds a run of consecutive experts, so the processes of one copy are neighbours;
- ``slice``: the processes of one expert hold a share of its hidden units each;
- ``tensor``: processes with the *same* tokens, as tensor slicing of the other layers leaves them.

A mesh describes; it needs no process group until a group of it is asked for. All processes must ask alike.

Source: DeepSpeed-MoE (2201.05596), sec. 5.1 (expert parallelism, slicing and data parallelism); every layer of a pyramid
chooses its own degree (its sec. 4.1.3).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["AXES", "Coordinates", "ExpertMesh", "make_mesh", "parse_layout", "started_processes"]

AXES = ("expert_data", "expert", "slice", "tensor")
# Axes that run together, outermost first.
JOINED = {"owners": ("expert", "tensor"), "data": ("expert_data", "expert", "slice"), "world": AXES}
WORDS = {"expert": "expert", "data": "expert_data", "slices": "slices", "tensor": "tensor"}


class Coordinates(NamedTuple):
    """Where a process stands on each axis."""

    expert_data: int
    expert: int
    slice: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class ExpertMesh:
    """Degrees of the four axes; see `make_mesh`.

    Attributes:
        world: number of processes.
        expert: processes that share the experts of one copy.
        slices: processes that share each expert.
        tensor: processes that hold the same tokens.
        node: neighbouring processes with fast links between them (one machine).
    """

    world: int
    expert: int
    slices: int = 1
    tensor: int = 1
    node: int = 0
    _groups: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def expert_data(self) -> int:
        """Copies of all experts."""
        return self.world // (self.expert * self.slices * self.tensor)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Degrees in the order of `AXES`."""
        return self.expert_data, self.expert, self.slices, self.tensor

    @property
    def owners(self) -> int:
        """Parts that the experts of a layer are cut into: tensor ranks hold different experts, too."""
        return self.expert * self.tensor

    @property
    def rank(self) -> int:
        """Number of this process; 0 where there is only one."""
        if self.world == 1:
            return 0
        self._check_running()
        return dist.get_rank()

    def coordinates(self, rank: int | None = None) -> Coordinates:
        """Where a process stands; None: this one.

        Example:
            >>> make_mesh(8, expert=2, tensor=2).coordinates(5)
            Coordinates(expert_data=1, expert=0, slice=0, tensor=1)
        """
        rank = self.rank if rank is None else rank
        if not 0 <= rank < self.world:
            raise ValueError(f"rank must be in [0, {self.world}), got {rank}")
        place = []
        for degree in reversed(self.shape):
            rank, at = divmod(rank, degree)
            place.append(at)
        return Coordinates(*reversed(place))

    def owner(self, rank: int | None = None) -> int:
        """Which of the `owners` parts of the experts a process holds."""
        at = self.coordinates(rank)
        return at.expert * self.tensor + at.tensor

    def for_experts(self, n_experts: int) -> ExpertMesh:
        """The mesh of a layer with so many experts: a layer with fewer than there are places repeats them.

        Raises:
            ValueError: the experts do not divide into equal parts.
        """
        owners = min(n_experts, self.owners)
        if owners % self.tensor:
            raise ValueError(
                f"{n_experts} experts do not spread over tensor={self.tensor} processes; "
                f"give a multiple of {self.tensor} experts, or tensor=1"
            )
        if n_experts % owners or self.owners % owners:
            fits = [d for d in range(1, self.expert + 1) if n_experts % (d * self.tensor) == 0 and self.expert % d == 0]
            raise ValueError(
                f"{n_experts} experts do not divide into equal parts for expert={self.expert}"
                + (f" x tensor={self.tensor}" if self.tensor > 1 else "")
                + (f"; expert={' or '.join(map(str, fits))} would do" if fits else "")
            )
        return replace(self, expert=owners // self.tensor)

    def ranks(self, axis: str) -> list[list[int]]:
        """The groups of processes that differ along one axis (of `AXES` or `JOINED`) only.

        Example:
            >>> make_mesh(4, expert=2).ranks("expert"), make_mesh(4, expert=2).ranks("expert_data")
            ([[0, 1], [2, 3]], [[0, 2], [1, 3]])
        """
        names = JOINED.get(axis, (axis,))
        if not set(names) <= set(AXES):
            raise ValueError(f"axis must be one of {[*AXES, *JOINED]}, got {axis!r}")
        inside = [AXES.index(name) for name in names]
        outside = [i for i in range(len(AXES)) if i not in inside]
        grid = torch.arange(self.world).view(self.shape).permute(*outside, *inside)
        found: list[list[int]] = grid.reshape(-1, math.prod(self.shape[i] for i in inside)).tolist()
        return found

    def near_and_far(self) -> tuple[list[list[int]], list[list[int]]]:
        """Groups of the two steps of a hierarchical exchange: owners of one node, and the same place in all nodes.

        Raises:
            ValueError: the owners do not lie in nodes in equal, neighbouring numbers.
        """
        near, far = [], []
        for members in self.ranks("owners"):
            nodes = [rank // (self.node or self.world) for rank in members]
            here = nodes.count(nodes[0])
            if len(members) % here or nodes != sorted(nodes) or any(nodes.count(n) != here for n in nodes):
                raise ValueError(
                    f"a hierarchical exchange needs as many processes of a group on every node; {members} lie on nodes {nodes}"
                    f" of {self.node or self.world}"
                )
            near += [members[i : i + here] for i in range(0, len(members), here)]
            far += [members[i::here] for i in range(here)]
        return near, far

    def group(self, groups: str | list[list[int]]) -> dist.ProcessGroup | None:
        """The process group of this process among some (an axis, or lists of ranks); None where it is alone in it.

        Collective at the first call for each set of groups.

        Raises:
            RuntimeError: several processes and no process group, or one of another size.
        """
        lists = self.ranks(groups) if isinstance(groups, str) else groups
        if max(map(len, lists)) == 1:
            return None
        self._check_running()
        if len(lists) == 1 and len(lists[0]) == self.world:
            return dist.group.WORLD
        key = tuple(map(tuple, lists))
        if key not in self._groups:
            self._groups[key] = dist.new_subgroups_by_enumeration(lists)[0]
        found: dist.ProcessGroup = self._groups[key]
        return found

    def device_mesh(self, device: str = "cpu") -> DeviceMesh:
        """The same as a torch DeviceMesh with axes `AXES`."""
        self._check_running()
        if (found := self._groups.get((self.shape, device))) is None:
            found = self._groups[self.shape, device] = init_device_mesh(device, self.shape, mesh_dim_names=AXES)
        return found  # type: ignore[no-any-return]

    def _check_running(self) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"a mesh of {self.world} processes needs a process group; start with torchrun --nproc-per-node {self.world}"
            )
        if dist.get_world_size() != self.world:
            raise RuntimeError(f"the mesh is for {self.world} processes, and {dist.get_world_size()} are running")


def make_mesh(
    world: int, *, tensor: int = 1, expert: int | None = None, slices: int = 1, node: int | None = None
) -> ExpertMesh:
    """A mesh of ``world`` processes: expert x slices x tensor of them hold one copy of all experts, and the rest repeats it.

    Args:
        world: number of processes.
        tensor: processes that hold the same tokens.
        expert: processes that share the experts of one copy; None: as many as there are. A layer with fewer experts uses as
            many as it has.
        slices: processes that share each expert, a part of its hidden units each: for more processes than experts.
        node: neighbouring processes with fast links; None: all.
    Raises:
        ValueError: a degree below 1, or a world that they do not divide.
    Example:
        >>> make_mesh(128).for_experts(32).shape
        (4, 32, 1, 1)
    """
    for name, value in (("world", world), ("tensor", tensor), ("slices", slices)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if world % (tensor * slices):
        raise ValueError(
            f"world={world} is not a multiple of tensor={tensor} x slices={slices}; {_fitting(tensor * slices, world)}"
        )
    expert = world // (tensor * slices) if expert is None else expert
    if expert < 1:
        raise ValueError(f"expert must be at least 1, got {expert}")
    share = tensor * slices * expert
    if world % share:
        raise ValueError(
            f"world={world} is not a multiple of expert={expert} x tensor={tensor} x slices={slices}; {_fitting(share, world)}"
        )
    node = world if node is None else node
    if node < 1 or world % node:
        raise ValueError(f"node must divide world={world}, got {node}")
    return ExpertMesh(world=world, expert=expert, slices=slices, tensor=tensor, node=node)


def parse_layout(text: str, world: int, *, node: int | None = None) -> ExpertMesh:
    """The mesh that words like ``expert=2,data=2`` describe.

    Args:
        text: degrees by name, out of ``expert``, ``data`` (copies of the experts), ``slices`` and ``tensor``, comma-separated.
            Without ``data`` the copies fill the world; without ``expert`` the experts do.
        world: number of processes.
        node: as in `make_mesh`.
    Raises:
        ValueError: an unknown or repeated word, no whole number, or degrees whose product is another world.
    Example:
        >>> parse_layout("expert=2,data=2", 4).shape
        (2, 2, 1, 1)
    """
    given: dict[str, int] = {}
    for part in text.split(","):
        word, equals, value = part.strip().partition("=")
        if word not in WORDS or not equals:
            raise ValueError(
                f"a layout is made of {', '.join(f'{w}=N' for w in WORDS)}, separated by commas; got {part.strip()!r}"
            )
        if word in given:
            raise ValueError(f"{word} stands twice in the layout {text!r}")
        if not value.strip().isdecimal() or int(value) < 1:
            raise ValueError(f"{word} must be a whole number of at least 1, got {value.strip()!r}")
        given[word] = int(value)
    others = given.get("slices", 1) * given.get("tensor", 1)
    copies = given.get("data", 1)
    expert = given.get("expert")
    if expert is None and world % (others * copies) == 0:
        expert = world // (others * copies)
    expert = expert or 1
    whole = expert * others * copies
    fits = world % whole == 0 if "data" not in given else world == whole
    if not fits:
        many = "a multiple of " if "data" not in given else ""
        raise ValueError(
            f"{text} needs {many}{whole} processes, and {world} {'is' if world == 1 else 'are'} running; "
            f"start with torchrun --nproc-per-node {whole}, or change the layout"
        )
    return make_mesh(world, expert=expert, slices=given.get("slices", 1), tensor=given.get("tensor", 1), node=node)


def started_processes() -> int:
    """Number of processes that torchrun (or accelerate) started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _fitting(share: int, world: int) -> str:
    below = world // share * share
    return f"a world of {f'{below} or ' if below else ''}{below + share} would do"
