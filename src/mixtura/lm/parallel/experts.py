"""Experts that live in several processes, in any model: each holds its own, and rows travel.

`parallelize_experts` looks for stacked experts called with ``(hidden_states, top_k_index, top_k_weights)``, as transformers'
families and our own decoder do, and leaves in each process the experts, or the slices of experts, that its place in the
mesh names. Gates stay whole in every process; one that reads the experts' weights is told their means and variances by those
that hold them. How a local expert computes stays the module's own business.

Shapes: T tokens, D width, H hidden, E experts, K experts a token visits, S = T K pairs.

Source: DeepSpeed-MoE (2201.05596), sec. 5.1-5.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mixtura.lm.anatomy import find_moe
from mixtura.lm.parallel.exchange import PLANS, Plan, exchange, gathered_rows
from mixtura.lm.parallel.mesh import ExpertMesh

__all__ = ["ParallelExperts", "gather_experts", "parallel_experts", "parallelize_experts", "single_name"]

LOCAL = "local_experts"  # where a ParallelExperts keeps the module of its own experts
Model = TypeVar("Model", bound=nn.Module)


class ParallelExperts(nn.Module):
    """Experts of one layer over the processes of a mesh, called as the module they were.

    Args:
        experts: stacked experts, each parameter (E, ...); cut down to this process's in place.
        n_experts: E.
        mesh: of this layer (:meth:`ExpertMesh.for_experts`).
        plan: how rows travel, one of `exchange.PLANS`.
    Raises:
        TypeError: experts that are not stacked.
        ValueError: ``slices`` for experts whose hidden units cannot be cut: their number is no multiple, the output has a
            bias or a norm.

    Attributes:
        local_experts: the module with this process's experts.
        num_experts: E, of all processes.
        stacked: names of the parameters that are cut.
        divisor: what the sum of an expert's gradients over the ``expert_data`` axis is divided by.
    """

    def __init__(self, experts: nn.Module, n_experts: int, mesh: ExpertMesh, *, plan: Plan = "direct") -> None:
        super().__init__()
        self.num_experts, self.mesh, self.plan = n_experts, mesh, plan
        own = dict(experts.named_parameters(recurse=False))
        self.stacked = tuple(name for name, p in own.items() if p.dim() >= 2 and len(p) == n_experts)
        if not self.stacked:
            raise TypeError(
                f"{type(experts).__name__} holds no parameters stacked as (E={n_experts}, ...); "
                "compressed experts cannot be spread over processes"
            )
        self._layout = _Layout.of(experts)
        if mesh.slices > 1:
            self._layout.check(self.stacked, own, mesh.slices)
        with torch.no_grad():
            for name in self.stacked:
                part = nn.Parameter(self.part(name, own[name]).clone(), requires_grad=own[name].requires_grad)
                setattr(experts, name, part)
        module: Any = experts
        if isinstance(getattr(experts, "num_experts", None), int):
            module.num_experts = n_experts // mesh.owners
        self.local_experts = experts

    @property
    def divisor(self) -> int:
        """Processes of the world, for every expert has seen all their tokens; without those that repeat them.

        Under the coordinated plan rows that tensor ranks repeat arrive once, otherwise as often as they are repeated.

        Source: DeepSpeed-MoE (2201.05596), sec. 4.1.3; dividing by the copies alone gives gradients too large by the number
        of processes that share the experts (DeepSpeed issues 5618 and 6545).
        """
        return self.mesh.world // (self.mesh.tensor if self.plan == "coordinated" else 1)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x (T, D), experts (T, K) in [0, E], weights (T, K) -> (T, D); index E means nothing. Collective."""
        k = top_k_index.shape[-1]
        flat = top_k_index.reshape(-1)
        order = flat.argsort(stable=True)  # pairs without an expert are last
        counts_E = torch.bincount(flat, minlength=self.num_experts + 1)[: self.num_experts]
        pairs_S = order[: int(counts_E.sum())]
        tokens_S = pairs_S // max(k, 1)
        back_SD = self.computed(hidden_states.index_select(0, tokens_S), counts_E)
        wide = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        weighted_SD = back_SD.to(wide) * top_k_weights.reshape(-1, 1).index_select(0, pairs_S)
        out_TD = torch.zeros_like(hidden_states, dtype=wide).index_add(0, tokens_S, weighted_SD.to(wide))
        return out_TD.to(hidden_states.dtype)

    def computed(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows (S, D), sorted by expert, ``counts`` (E,) of them for each -> what their experts make of them. Collective."""
        sent = exchange(rows, counts, self.mesh, plan=self.plan)
        return sent.undo(self._here(sent.rows, sent.counts))

    def _here(self, rows: Tensor, counts: Tensor) -> Tensor:
        if len(rows) == 0:
            # Backward passes are collective too: a process without rows must stay in the graph.
            touched = [getattr(self.local_experts, name).flatten()[:0].sum() for name in self.stacked]
            return rows + torch.stack(touched).sum().to(rows.dtype)
        places = torch.arange(len(counts), device=rows.device).repeat_interleave(counts).unsqueeze(-1)
        y: Tensor = self.local_experts(rows, places, torch.ones_like(places, dtype=rows.dtype))
        return y

    def gathered_statistics(self, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """What a gate that reads the experts' weights needs of those that lie elsewhere. Collective.

        Args:
            mean, spread: of this process's part of its experts, as `sparsity_gate.column_statistics` gives them.
        Returns:
            Of all experts, the same in every process. Gradients go to those that hold the weights, for the rows of all.
        """
        parts, group = self.mesh.slices, self.mesh.group("slice")
        if parts > 1:  # equally many hidden units each: the variance within slices, and that between them
            means = gathered_rows(mean[None], [1] * parts, group)
            spreads = gathered_rows(spread[None], [1] * parts, group)
            mean = means.mean(0)
            off = means - mean
            between = off.square() if spread.dim() == mean.dim() else off.unsqueeze(-1) * off.unsqueeze(-2)
            spread = (spreads + between).mean(0)
        both = torch.cat([mean, spread.flatten(1)], dim=1)
        return _unpacked(self._of_all(both), mean, spread)

    def _of_all(self, own: Tensor) -> Tensor:
        """(E / owners, ...), a row for each own expert -> (E, ...). Collective."""
        mesh, n = self.mesh, len(own)
        if self.plan != "coordinated":
            return gathered_rows(own, [n] * mesh.owners, mesh.group("owners"))
        # Tensor ranks do the same with them, and under this plan an expert's gradient counts their rows once.
        own = gathered_rows(own, [n] * mesh.tensor, mesh.group("tensor"), repeated=True)
        return gathered_rows(own, [len(own)] * mesh.expert, mesh.group("expert"))

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a tensor shaped like the whole parameter ``name``; a view where it can be one."""
        owner, n_local = self.mesh.owner(), self.num_experts // self.mesh.owners
        own = whole[owner * n_local : (owner + 1) * n_local]
        return self._layout.cut(name, own, self.mesh.slices)[self.mesh.coordinates().slice]

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor, out of the parts that all processes hold. Collective; the same everywhere."""
        slices = _all_gathered(part, self.mesh.group("slice"))
        return torch.cat(_all_gathered(self._layout.joined(name, slices), self.mesh.group("owners")))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, mesh={self.mesh.shape}, plan={self.plan!r}"


class _Layout:
    """Which dimension of a stacked parameter counts hidden units, and how a gate's units lie beside them."""

    def __init__(self, transposed: bool, gated: bool, concatenated: bool, norm: bool) -> None:
        self.transposed, self.gated, self.concatenated, self.norm = transposed, gated, concatenated, norm

    @classmethod
    def of(cls, experts: nn.Module) -> _Layout:
        def flag(name: str, default: bool) -> bool:
            return bool(getattr(experts, name, default))

        return cls(
            flag("is_transposed", False),
            flag("has_gate", hasattr(experts, "gate_up_proj")),
            flag("is_concatenated", True),
            flag("has_post_expert_norm", False),
        )

    def check(self, names: tuple[str, ...], parameters: dict[str, nn.Parameter], slices: int) -> None:
        hidden = parameters["down_proj"].shape[1 if self.transposed else 2]
        if hidden % slices:
            raise ValueError(f"slices must divide the {hidden} hidden units of an expert, got {slices}")
        if self.norm or "down_proj_bias" in names:
            raise ValueError(f"slices={slices} needs experts whose output has neither bias nor norm; give slices=1")
        if unknown := set(names) - {"gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias"}:
            raise ValueError(f"slices={slices} is not known for the parameters {sorted(unknown)}; give slices=1")

    def cut(self, name: str, whole: Tensor, slices: int) -> list[Tensor]:
        if slices == 1:
            return [whole]
        units = self._units(name, whole)
        return [self._flat(name, part, whole.dim()) for part in units.chunk(slices, dim=self._unit_dim(name))]

    def joined(self, name: str, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        units = torch.cat([self._units(name, part) for part in parts], dim=self._unit_dim(name))
        return self._flat(name, units, parts[0].dim())

    def _dim(self, name: str) -> int:
        if name.endswith("_bias"):
            return 1
        return 1 if name.startswith("down") == self.transposed else 2

    def _paired(self, name: str) -> bool:
        return self.gated and not name.startswith("down")

    def _unit_dim(self, name: str) -> int:
        return self._dim(name) + (self._paired(name) and self.concatenated)

    def _units(self, name: str, tensor: Tensor) -> Tensor:
        if not self._paired(name):
            return tensor
        return tensor.unflatten(self._dim(name), (2, -1) if self.concatenated else (-1, 2))

    def _flat(self, name: str, units: Tensor, dims: int) -> Tensor:
        return units if units.dim() == dims else units.flatten(self._dim(name), self._dim(name) + 1)


def parallelize_experts(model: Model, mesh: ExpertMesh, *, slices: int | None = None, plan: Plan = "direct") -> Model:
    """Leave in each process only its part of the experts of every mixture layer; in place. Collective.

    Every process must hold the same model. A layer with fewer experts than ``mesh.expert`` repeats them, so the layers of a
    pyramid have degrees of their own.

    Args:
        model: any whose experts :func:`mixtura.lm.anatomy.find_moe` finds stacked: Mixtral, OLMoE, Qwen-MoE, DeepSeek, ours.
        mesh: see :func:`~mixtura.lm.parallel.make_mesh`.
        slices: must be that of the mesh; None: that of the mesh.
        plan: one of :data:`~mixtura.lm.parallel.exchange.PLANS`.
    Returns:
        The model.
    Raises:
        ValueError: no mixture layer, experts that do not divide (the layer is named), an unknown plan, other slices.
        TypeError: experts that are not stacked.
        RuntimeError: no process group for a mesh of several processes.
    Source:
        DeepSpeed-MoE (2201.05596), sec. 4.1.3 and 5.1.
    """
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {list(PLANS)}, got {plan!r}")
    if slices is not None and slices != mesh.slices:
        raise ValueError(
            f"slices={slices}, but the mesh was made for slices={mesh.slices}; make it with the same number"
        )
    blocks = find_moe(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no mixture layers, so it has no experts to spread")
    if any(isinstance(block.experts, ParallelExperts) for block in blocks):
        raise ValueError("the model's experts are spread over processes already")
    meshes = {}
    for block in blocks:
        try:
            meshes[block.name] = mesh.for_experts(block.n_experts)
        except ValueError as error:
            raise ValueError(f"{block.name}: {error}") from error
    for block in blocks:
        spread = ParallelExperts(block.experts, block.n_experts, meshes[block.name], plan=plan)
        setattr(block.module, block.experts_name.rpartition(".")[2], spread)
    return model


def parallel_experts(model: nn.Module) -> Iterator[tuple[str, ParallelExperts]]:
    """The spread layers of a model, by path, in the order of its modules."""
    for path, module in model.named_modules():
        if isinstance(module, ParallelExperts):
            yield path, module


def single_name(name: str) -> str:
    """Name of a tensor in the model of one process.

    Example:
        >>> single_name("model.layers.0.mlp.experts.local_experts.down_proj")
        'model.layers.0.mlp.experts.down_proj'
    """
    return name.replace(f".{LOCAL}", "")


def gather_experts(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the same model in one process, bit for bit, whole in every process. Collective."""
    spread = dict(parallel_experts(model))
    found = {}
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition(f".{LOCAL}.")
        module = spread.get(path)
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        whole = module.whole(last, tensor) if module is not None and last in module.stacked else tensor
        found[name if module is None else f"{path}.{last}"] = whole
    return found


def _unpacked(both: Tensor, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    means, spreads = both.tensor_split([mean.shape[1]], dim=1)
    return means, spreads.reshape(len(both), *spread.shape[1:])


def _all_gathered(part: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    if group is None:
        return [part]
    part = part.detach().contiguous()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part, group=group)
    return parts
