"""What a model of experts takes of each device under every form of parallel training, before any of them is bought.

Letters as in the literature: E splits the experts over devices; D repeats groups of them; M slices all other weights; Z shards
gradients and optimizer states over the devices that repeat them; Z-Off keeps those in the host's memory; ``hecate`` shards
everything, an expert whole on one device, and adds copies of busy experts.

Bytes a parameter are those of a weight, a gradient and the optimizer: 2, 2 and 12 for half precision with Adam. Activations are
not counted.

Source: Scalable and Efficient MoE Training (2109.10465), sec. 2 (forms E to Z-Off+M); Hecate (2502.02581), sec. 4.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixtura.lm.parallel.cluster import ModelShape
from mixtura.lm.parallel.mesh import ExpertMesh

__all__ = ["FORMS", "Memory", "Sizes", "largest", "memory", "sizes_of"]

FORMS: Mapping[str, str] = {
    "E": "experts split, the rest repeated",
    "E+D": "the same, with several groups of experts",
    "E+D+M": "and all other weights sliced over the tensor axis",
    "E+Z": "gradients and optimizer states sharded where they were repeated",
    "E+D+Z": "the same, with several groups of experts",
    "E+D+Z+M": "and all other weights sliced over the tensor axis",
    "E+Z-Off": "gradients and optimizer states in the host's memory",
    "E+Z-Off+M": "and all other weights sliced over the tensor axis",
    "hecate": "all sharded, each expert whole on one device, with copies of the busy ones",
}
BUCKET = 500_000_000  # parameters whose gradients are on the device at once when they are kept on the host


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Parameters of a model.

    Attributes:
        other: all but the routed experts.
        experts: all routed experts together.
        expert: one of them; layer: all experts of the largest layer. For copies.
        layers: layers with experts.
    """

    other: int
    experts: int
    expert: int = 0
    layer: int = 0
    layers: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest device and of its share of the host.

    Attributes:
        parts: of the device by ``weights``, ``gradients``, ``states``, ``copies`` and ``buffer``.
    """

    device: float
    host: float
    parts: Mapping[str, float]


def sizes_of(model: Any) -> Sizes:
    """Sizes of a model, a :class:`~mixtura.lm.parallel.cluster.ModelShape` or sizes themselves."""
    from mixtura.lm.anatomy import find_moe

    if isinstance(model, Sizes):
        return model
    if isinstance(model, ModelShape):
        counts = model.experts
        return Sizes(
            other=model.other_parameters,
            experts=model.routed_parameters,
            expert=model.expert_parameters,
            layer=max(counts) * model.expert_parameters,
            layers=model.sparse_layers,
        )
    blocks = find_moe(model)
    each = [sum(p.numel() for p in block.experts.parameters()) for block in blocks]
    total = sum(p.numel() for p in model.parameters())
    return Sizes(
        other=total - sum(each),
        experts=sum(each),
        expert=max((n // block.n_experts for n, block in zip(each, blocks, strict=True)), default=0),
        layer=max(each, default=0),
        layers=len(blocks),
    )


def memory(
    model: Any,
    mesh: ExpertMesh,
    form: str = "E+Z",
    *,
    bytes: tuple[int, int, int] = (2, 2, 12),
    bucket: int = BUCKET,
    capacity: int = 0,
    rematerialize: bool = False,
) -> Memory:
    """Bytes of a device under a form of parallel training.

    Args:
        model: a model, its :class:`~mixtura.lm.parallel.cluster.ModelShape` or :class:`Sizes`.
        mesh: processes and how they share; ``tensor`` counts only in forms with M.
        form: one of :data:`FORMS`.
        bytes: of a weight, of its gradient and of its optimizer states.
        bucket: parameters whose gradients are on the device at once under Z-Off.
        capacity, rematerialize: copies a device has room for, a layer, and whether they are freed between passes (``hecate``).
    Raises:
        ValueError: an unknown form, or a mesh that the form does not use (D without copies, M without a tensor axis and the
            like).
    Example:
        >>> from mixtura.lm.parallel.mesh import make_mesh
        >>> plain = memory(Sizes(other=1_400_000_000, experts=0), make_mesh(64), "E")
        >>> round(plain.device / 1e9, 1)
        22.4
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {list(FORMS)}, got {form!r}")
    if capacity < 0 or bucket < 1:
        raise ValueError(f"capacity must be >= 0 and bucket >= 1, got {capacity} and {bucket}")
    sizes = sizes_of(model)
    words = set(form.replace("Z-Off", "Off").split("+"))
    _check(words, form, mesh)
    weight, gradient, state = bytes
    if form == "hecate":
        own = (sizes.other + sizes.experts) / mesh.world
        copies = capacity * (1 if rematerialize else sizes.layers) * sizes.expert
        parts = {
            "weights": weight * own,
            "gradients": gradient * own,
            "states": state * own,
            "copies": (weight + gradient) * copies,
        }
        return Memory(sum(parts.values()), 0.0, parts)
    sliced = mesh.tensor if "M" in words else 1
    data = mesh.world // sliced
    owners = mesh.owners * mesh.slices
    held = sizes.other / sliced, sizes.experts / owners
    shared = data, mesh.expert_data
    if not words & {"Z", "Off"}:
        parts = {"weights": weight * sum(held), "gradients": gradient * sum(held), "states": state * sum(held)}
        return Memory(sum(parts.values()), 0.0, parts)
    shard = sum(h / n for h, n in zip(held, shared, strict=True))
    if "Z" in words:
        parts = {"weights": weight * sum(held), "gradients": gradient * shard, "states": state * shard}
        return Memory(sum(parts.values()), 0.0, parts)
    parts = {"weights": weight * sum(held), "buffer": gradient * min(bucket, sum(held))}
    return Memory(sum(parts.values()), (gradient + state) * shard, parts)


def _check(words: set[str], form: str, mesh: ExpertMesh) -> None:
    if "M" in words and mesh.tensor == 1:
        raise ValueError(f"form {form!r} slices weights, which needs a mesh with tensor > 1")
    if "M" not in words and mesh.tensor > 1 and form != "hecate":
        raise ValueError(f"form {form!r} slices no weights, and the mesh has tensor={mesh.tensor}; take a form with M")
    if "D" in words and mesh.expert_data == 1 and "M" not in words:
        raise ValueError(f"form {form!r} repeats groups of experts, and the mesh has one; take a smaller expert=")
    if form == "hecate" and mesh.expert != mesh.world:
        raise ValueError(f"form 'hecate' needs a mesh of experts alone, expert={mesh.world}; got expert={mesh.expert}")


def largest(
    form: str, mesh: ExpertMesh, device_bytes: float, host_bytes: float, base_parameters: int, **how: Any
) -> int:
    """Parameters of the largest model that fits, with a given number of them outside the experts.

    Args:
        form, mesh: see :func:`memory`; the rest of its arguments may follow.
        device_bytes, host_bytes: what a device has, and its share of the host.
        base_parameters: all but the experts.
    Returns:
        Base and experts together; 0 where the base alone does not fit.
    Raises:
        ValueError: ``host_bytes`` is 0 for a form that keeps states there.
    Example:
        >>> from mixtura.lm.parallel.mesh import make_mesh
        >>> n = largest("E+Z-Off", make_mesh(512), 40e9, 100e9, 1_000_000_000)
        >>> n > 3.4e12
        True
    """
    if "Off" in form and not host_bytes > 0:
        raise ValueError(f"form {form!r} keeps states in the host's memory: host_bytes must be > 0, got {host_bytes}")

    def fits(experts: int) -> bool:
        need = memory(Sizes(other=base_parameters, experts=experts), mesh, form, **how)
        return need.device <= device_bytes and need.host <= max(host_bytes, 0)

    if not fits(0):
        return 0
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return base_parameters + low
