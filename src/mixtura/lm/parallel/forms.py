"""Forms of sharing a model of experts: E, and what may be added to it.

- **E**: experts apart, the rest in every process. **D**: several copies of the experts.
- **Z**: gradients and optimizer state sharded, ZeRO-2: of the rest over all processes with rows of their own, of experts over
  their copies. **Z-Off**: and kept on the host.
- **M**: the rest's matrices cut over the ``tensor`` axis: heads of attention, hidden units, words of the vocabulary.

Z is FSDP2 without resharding after the forward pass, M is torch.distributed.tensor.parallel; both know nothing of experts.

Source: 2109.10465, sec. 3.1 (multi-dimensional parallelism), table of the forms in DeepSpeed's tutorial on mixtures.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from mixtura.lm.parallel.exchange import Plan
from mixtura.lm.parallel.experts import parallel_experts, parallelize_experts
from mixtura.lm.parallel.gradients import expert_rules
from mixtura.lm.parallel.mesh import ExpertMesh

__all__ = ["apply_plan", "shard", "sliced_layers"]

ADDITIONS = ("D", "Z", "Z-Off", "M")
Model = TypeVar("Model", bound=nn.Module)


def apply_plan(model: Model, mesh: ExpertMesh, form: str = "E+D+Z", *, plan: Plan | None = None) -> Model:
    """Leave in each process its share of a model, in place. Collective.

    Gradients come together by :func:`~mixtura.lm.parallel.gradients.reduce_gradients`, which leaves alone what the form brings
    together by itself, and are clipped by ``clip_gradients``. An optimizer takes parameters of each mesh in groups of their own.

    Args:
        model: with mixture layers that :func:`mixtura.lm.anatomy.find_moe` finds.
        mesh: degrees of all axes.
        form: ``E`` and additions joined by ``+``, such as ``E+D``, ``E+Z``, ``E+D+M``, ``E+D+Z+M``, ``E+Z-Off+M``.
        plan: how rows travel; None: ``coordinated`` where ``M`` leaves the same tokens in several processes, else ``direct``.
    Returns:
        The model.
    Raises:
        ValueError: an unknown form, one that the mesh does not fit, or a number of heads or hidden units that ``tensor`` does not
            divide (the module is named).
    Source:
        2109.10465, sec. 3.1.
    """
    parts = _parts(form, mesh)
    device = next(model.parameters()).device.type
    sliced = "M" in parts and mesh.tensor > 1
    layers = sliced_layers(model, mesh.tensor) if sliced else {}
    parallelize_experts(model, mesh, plan=plan or ("coordinated" if sliced else "direct"))
    if mesh.world == 1:
        return model
    rest = init_device_mesh(device, (mesh.world // mesh.tensor, mesh.tensor), mesh_dim_names=("data", "tensor"))
    if sliced:
        parallelize_module(model, rest["tensor"], layers)
    if parts & {"Z", "Z-Off"}:
        offload = {"offload_policy": CPUOffloadPolicy()} if "Z-Off" in parts and device != "cpu" else {}
        shard(model, rest["data"], **offload)
    return model


def shard(model: nn.Module, data: DeviceMesh, **options: Any) -> None:
    """ZeRO-2 by FSDP2, in place: experts over their copies, the rest over ``data``. Collective.

    Args:
        model: its experts spread already, or without any.
        data: one axis named ``data``, of the processes that hold other rows each.
        options: for ``fully_shard``.
    """
    # Nothing here changes an output in place, which FSDP fears wherever one is a view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    rest: dict[str, Any] = {
        "mesh": data,
        "ignored_params": {p for p, rule in expert_rules(model).items() if rule.copies == 1},
        "reshard_after_forward": False,  # weights stay whole between forward and backward: ZeRO-2
        **options,
    }
    for path, experts in list(parallel_experts(model)):
        if experts.mesh.expert_data > 1:
            copies = experts.mesh.device_mesh(data.device_type)["expert_data"]
            unit: Any = experts
            block: Any = model.get_submodule(path.rpartition(".")[0])
            if getattr(getattr(block, "gate", None), "reads_experts", False):
                # Gradients of a unit travel when its backward pass is over, and here that of the gate brings some, too.
                unit = block
                for child in block.children():
                    if child is not experts and next(child.parameters(), None) is not None:
                        fully_shard(child, **rest)
            fully_shard(unit, mesh=copies, reshard_after_forward=False, **options)
            unit.set_gradient_divide_factor(experts.divisor)  # not by the copies alone: the gradient rule
            unit.set_force_sum_reduction_for_comms(True)  # a sum that is divided: gloo cannot scale while it sums
    units = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in units:
            fully_shard(module, **rest)
    fully_shard(model, **rest)


def sliced_layers(model: nn.Module, tensor: int) -> dict[str, ParallelStyle]:
    """How each matrix of a decoder is cut over ``tensor`` processes, by path; what is not named stays whole.

    Attention with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` is cut by heads, a feed-forward part with ``up_proj`` and
    ``down_proj`` by hidden units, embeddings that are not tied by words. Attention with norms of queries and keys stays whole.

    Raises:
        ValueError: heads or units that do not divide.
    """
    styles: dict[str, ParallelStyle] = {}
    for path, module in model.named_modules():
        own = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        if {"q_proj", "k_proj", "v_proj", "o_proj"} <= own.keys():
            if getattr(module, "q_norm", None) is not None:
                continue  # its weights would see some heads in each process
            size = int(getattr(module, "head_dim", 0)) or 1
            _cut(styles, path, own, ("q_proj", "k_proj", "v_proj"), "o_proj", tensor, size, "heads")
        elif {"up_proj", "down_proj"} <= own.keys():
            _cut(styles, path, own, ("gate_proj", "up_proj"), "down_proj", tensor, 1, "hidden units")
    read, write = (getattr(model, f"get_{way}_embeddings", lambda: None)() for way in ("input", "output"))
    if read is not None and write is not None and read.weight is not write.weight:
        names = {id(module): path for path, module in model.named_modules()}
        styles[names[id(read)]] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        styles[names[id(write)]] = ColwiseParallel(output_layouts=Replicate())
    return styles


def _cut(
    styles: dict[str, ParallelStyle],
    path: str,
    own: dict[str, nn.Linear],
    ins: tuple[str, ...],
    out: str,
    tensor: int,
    size: int,
    unit: str,
) -> None:
    for name in ins:
        if name in own:
            if own[name].out_features // size % tensor:
                raise ValueError(
                    f"{path}.{name} has {own[name].out_features // size} {unit}, which tensor={tensor} does not divide"
                )
            styles[f"{path}.{name}"] = ColwiseParallel()
    styles[f"{path}.{out}"] = RowwiseParallel()


def _parts(form: str, mesh: ExpertMesh) -> set[str]:
    first, *rest = form.split("+")
    if first != "E" or not set(rest) <= set(ADDITIONS) or len(set(rest)) < len(rest) or {"Z", "Z-Off"} <= set(rest):
        raise ValueError(
            f"form must be E with any of {', '.join(ADDITIONS)} joined by + (Z or Z-Off, not both), as in E+D+Z+M; got {form!r}"
        )
    if not rest and mesh.expert_data > 1:
        raise ValueError(f"form E keeps one copy of the experts, and the mesh has {mesh.expert_data}; say E+D")
    if ("M" in rest) != (mesh.tensor > 1):
        would = "say +M" if mesh.tensor > 1 else "make the mesh with tensor=2 or more"
        raise ValueError(f"form {form} does not go with a mesh of tensor={mesh.tensor}; {would}")
    return set(rest)
