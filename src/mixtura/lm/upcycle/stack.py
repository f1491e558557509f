"""Parameters of a mixture out of the parameters of dense models: stacked, sliced, averaged or drawn.

Names are those of ``MixturaForCausalLM``: the left side of each rule is a parameter of the mixture, the right side of the dense
models. Every function returns memory of its own.

Shapes: E experts, H hidden units of one expert, D width.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixtura.lm.families.dense import Source

__all__ = ["Slices", "averaged", "drawn", "feed_forward", "is_expert", "shared_feed_forward", "stacked"]

EXPERT = re.compile(r"^(.*\.mlp\.)experts\.(gate_up_proj|up_proj|down_proj)(_bias)?$")
SHARED = re.compile(r"^(.*\.mlp\.)shared_expert\.(gate_proj|up_proj|down_proj)\.(weight|bias)$")


@dataclass(frozen=True, kw_only=True)
class Slices:
    """Which hidden units of a feed-forward part become which expert.

    Attributes:
        segments: equal pieces that the hidden units are cut into.
        shared: leading pieces that go to the shared expert; the others become one routed expert each.
    """

    segments: int = 1
    shared: int = 0

    @property
    def routed(self) -> int:
        """Pieces that are routed, per dense feed-forward part."""
        return self.segments - self.shared


def is_expert(name: str) -> bool:
    """Whether a parameter belongs to the routed experts."""
    return EXPERT.match(name) is not None


def feed_forward(name: str, sources: Sequence[Source], slices: Slices = Slices()) -> Tensor:
    """Stacked parameter of the routed experts, one dense feed-forward part after another.

    A gate that is spread over the ``routed`` pieces of one part gives each piece only its share, so what the pieces write is
    multiplied by their number: the pieces of one part then add up to its gate times its output. A bias is not divided among
    them for the same reason.

    Args:
        name: ``....mlp.experts.{gate_up_proj, up_proj, down_proj}`` or the ``_bias`` of one.
        sources: the dense models; the same one may come several times and is read once.
        slices: how each is cut.
    Returns:
        Shape (E, 2H, D), (E, H, D) or (E, D, H), or a bias (E, 2H), (E, H) or (E, D), with E = models times routed pieces.
    """
    match = EXPERT.match(name)
    assert match is not None, name
    prefix, part, bias = match.group(1), match.group(2), match.group(3)
    kind = "bias" if bias else "weight"
    read: dict[int, Tensor] = {}
    out: Tensor | None = None
    for i, source in enumerate(sources):
        if id(source) not in read:
            read.clear()  # copies of one model come in a row; holding more than one at a time would cost memory
            read[id(source)] = _pieces(prefix, part, kind, source, slices)
        pieces = read[id(source)]
        if out is None:
            out = pieces.new_empty(len(sources) * len(pieces), *pieces.shape[1:])
        out[i * len(pieces) : (i + 1) * len(pieces)] = pieces
    assert out is not None
    return out


def shared_feed_forward(name: str, source: Source, slices: Slices) -> Tensor:
    """Parameter of the shared expert: the leading pieces of the dense feed-forward part, as one.

    The routed experts carry the output bias, so the shared one has zeros there.
    """
    match = SHARED.match(name)
    assert match is not None, name
    prefix, part, kind = match.groups()
    tensor = source(f"{prefix}{part}.{kind}")
    if part == "down_proj" and kind == "bias":
        return torch.zeros_like(tensor)
    units = slices.shared * (tensor.shape[1 if part == "down_proj" else 0] // slices.segments)
    return (tensor[:, :units] if part == "down_proj" else tensor[:units]).clone()


def stacked(name: str, sources: Sequence[Source]) -> Tensor:
    """The same parameter of every model, stacked along a new first dimension."""
    return torch.stack([source(name) for source in sources])


def averaged(name: str, sources: Sequence[Source]) -> Tensor:
    """Uniform mean of a parameter over the models, in float32 or wider, back in the dtype that came."""
    first = sources[0](name)
    total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for source in sources[1:]:
        total += source(name)
    return (total / len(sources)).to(first.dtype)


def drawn(name: str, shape: Sequence[int], *, std: float, seed: int, dtype: torch.dtype) -> Tensor:
    """Normal values of mean zero that depend on the seed and the parameter's name, not on the order of building."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
    return (torch.randn(*shape, generator=generator) * std).to(dtype)


def _pieces(prefix: str, part: str, kind: str, source: Source, slices: Slices) -> Tensor:
    """One model's routed pieces, (routed, ..)."""
    m, skip = slices.segments, slices.shared
    if part == "down_proj" and kind == "bias":
        return source(f"{prefix}down_proj.bias").expand(slices.routed, -1)
    if part == "down_proj":
        weight_mDH = source(f"{prefix}down_proj.weight").unflatten(1, (m, -1)).transpose(0, 1)[skip:]
        return weight_mDH * float(slices.routed) if slices.routed > 1 else weight_mDH
    halves = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("up_proj",)
    return torch.cat([source(f"{prefix}{half}.{kind}").unflatten(0, (m, -1))[skip:] for half in halves], dim=1)
