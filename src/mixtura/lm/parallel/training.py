"""Training over processes: a team for `core.training.fit`, so that one loop serves one process and many.

Experts lie apart (`experts`), and gradients and optimizer states are sharded (`forms`): experts over their copies only, so that
no step gathers all of them. Checkpoints are whole and named as in one process, so a run goes on under another layout, or alone.

They are written as safetensors by the first process, and not by torch.distributed.checkpoint, whose metadata file is a pickle.

Source: DeepSpeed-MoE (2201.05596), sec. 5; ZeRO-2 on the part without experts: 2109.10465, sec. 3.1.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from mixtura.core.shared_batch import SharedBatch
from mixtura.core.team import Alone
from mixtura.lm.parallel.exchange import Plan
from mixtura.lm.parallel.experts import ParallelExperts, parallel_experts, single_name
from mixtura.lm.parallel.forms import apply_plan, shard
from mixtura.lm.parallel.gradients import clip_gradients, reduce_gradients
from mixtura.lm.parallel.mesh import AXES, ExpertMesh, make_mesh, parse_layout, started_processes

__all__ = ["ExpertParallel", "LostProcess", "join"]

TIMEOUT = 600  # seconds that a process waits for the others, who may be evaluating
# What gloo and NCCL say when the other side is gone.
LOST = re.compile(r"closed by peer|connection reset|broken pipe|connection refused|timed? ?out|gloo|nccl|socket", re.I)


class LostProcess(RuntimeError):
    """Another process of the training ended, or did not answer in time."""


def join(layout: str, *, device: str = "cpu", plan: Plan | None = None) -> tuple[ExpertParallel, str]:
    """Meet the other processes that torchrun started, and take a place among them.

    Args:
        layout: words for :func:`~mixtura.lm.parallel.mesh.parse_layout`, or ``hecate`` and what follows it
            (:mod:`~mixtura.lm.parallel.sharded_training`).
        device: ``cpu``, or ``cuda`` for one device a process.
        plan: how rows travel; None: as the layout wants it.
    Returns:
        The team, and the device of this process.
    Raises:
        ValueError: a layout that does not fit the number of processes.
    """
    world = started_processes()
    node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    sharded = layout.split(",")[0].strip() == "hecate"
    mesh = make_mesh(world, node=node) if sharded else parse_layout(layout, world, node=node)
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(seconds=TIMEOUT))
    if sharded:
        from mixtura.lm.parallel.sharded_training import Sharded  # which stands on this module

        return Sharded.of(layout, mesh), device
    return ExpertParallel(mesh, plan=plan), device


class ExpertParallel(Alone):
    """The processes of a mesh that train one model; each with its own rows, except for tensor ranks, which share theirs.

    Args:
        mesh: places of the processes.
        plan: how rows travel to experts; None: as the form wants it.
        form: see :func:`~mixtura.lm.parallel.forms.apply_plan`; None: E+D+Z, and M where there are tensor ranks.

    Attributes:
        shared: for losses: the processes hold parts of one batch.
        stream: number of the rows that this process holds, and of its stream of chance.
    """

    def __init__(self, mesh: ExpertMesh, *, plan: Plan | None = None, form: str | None = None) -> None:
        self.mesh, self.plan = mesh, plan
        self.form = form or ("E+D+Z+M" if mesh.tensor > 1 else "E+D+Z")
        self.leads = mesh.rank == 0
        self.stream = mesh.rank // mesh.tensor  # tensor ranks hold the same tokens, and must drop the same
        self.shared = SharedBatch()
        self._world = mesh.group("world")
        self._modules: dict[str, ParallelExperts] = {}

    def prepare(self, model: nn.Module) -> None:
        """Leave in each process its part of the model, in place. Collective."""
        apply_plan(model, self.mesh, self.form, plan=self.plan)
        self._modules = dict(parallel_experts(model))

    def adopt(self, model: nn.Module) -> None:
        """Take a model whose experts are spread already, and shard the rest where the form has Z. Collective."""
        self._modules = dict(parallel_experts(model))
        if self.mesh.world > 1 and "Z" in self.form.split("+"):
            device = next(model.parameters()).device.type
            shard(model, init_device_mesh(device, (self.mesh.world,), mesh_dim_names=("data",)))

    def rows(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch; parts differ by one row at most.

        Raises:
            ValueError: fewer rows than processes with rows of their own.
        """
        places = self.mesh.world // self.mesh.tensor
        if len(batch) < places:
            raise ValueError(
                f"a batch of {len(batch)} rows does not reach {places} processes; give at least {places} rows"
            )
        return batch.tensor_split(places)[self.stream]

    def agree(self, what: str, *tensors: Tensor) -> None:
        """Make sure that all processes hold the same tensors.

        Raises:
            ValueError: in every process, with the number of the first that differs from process 0.
        """
        if self._world is None:
            return
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        own = torch.tensor([int.from_bytes(digest.digest()[:7], "big")], device=self._device)
        found = [torch.empty_like(own) for _ in range(self.mesh.world)]
        dist.all_gather(found, own, group=self._world)
        other = next((rank for rank, seen in enumerate(found) if int(seen) != int(found[0])), None)
        if other is not None:
            raise ValueError(
                f"processes disagree on {what}: process {other} has other than process 0; "
                "give all of them the same files and options"
            )

    def wait(self) -> None:
        """Until all processes are here."""
        if self._world is not None:
            dist.barrier(group=self._world)

    def name(self, name: str) -> str:
        return single_name(name)

    def mean(self, loss: Tensor) -> Tensor:
        return self.shared.sum(loss) / self.shared.size

    def first(self, place: int) -> int:
        found = torch.tensor([place], device=self._device)
        if self._world is not None:
            dist.all_reduce(found, dist.ReduceOp.MIN, group=self._world)
        return int(found)

    def reduce(self, model: nn.Module) -> None:
        reduce_gradients(model, self.mesh)

    def clip(self, model: nn.Module, trained: Mapping[str, nn.Parameter], limit: float) -> Tensor:
        return clip_gradients(model, self.mesh, limit)

    def groups(self, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        # Fused updates take tensors of one mesh.
        found: dict[Any, list[nn.Parameter]] = {}
        for p in parameters:
            found.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
        return list(found.values())

    def whole(self, name: str, parameter: nn.Parameter, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if (own := self._own(name)) is not None:
            tensor = own[0].whole(own[1], tensor)
        return tensor.cpu() if self.leads else tensor

    def part(self, name: str, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        if (own := self._own(name)) is not None:
            whole = own[0].part(own[1], whole).clone()
        if isinstance(parameter, DTensor):
            return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return whole

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The state dict of the model in one process, on the CPU of the leading process; empty in the others. Collective."""
        found = {}
        for name, tensor in model.state_dict().items():
            whole = self.whole(name, tensor, tensor)
            if self.leads:
                found[self.name(name)] = whole
        return found

    def explained(self, error: RuntimeError, kept: str) -> RuntimeError | None:
        if self._world is None or not LOST.search(str(error)):
            return None
        # gloo puts a place in its sources before, and advice behind.
        said = re.sub(r"^\[[^]]*\] |\.? This is typically.*", "", str(error).strip().splitlines()[0])
        return LostProcess(
            f"process {self.mesh.rank} lost another process of the training {kept}; the same command goes on from the last "
            f"checkpoint ({said})"
        )

    def __str__(self) -> str:
        degrees = (f"{axis}={n}" for axis, n in zip(AXES, self.mesh.shape, strict=True) if n > 1)
        return f"{self.mesh.world} processes ({', '.join(degrees) or 'alone'})"

    def _own(self, name: str) -> tuple[ParallelExperts, str] | None:
        path, _, last = name.rpartition(".local_experts.")
        module = self._modules.get(path)
        return None if module is None or last not in module.stacked else (module, last)

    @property
    def _device(self) -> str:
        return f"cuda:{torch.cuda.current_device()}" if self._world and dist.get_backend() == "nccl" else "cpu"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._world is not None and dist.is_initialized():
            dist.destroy_process_group()
