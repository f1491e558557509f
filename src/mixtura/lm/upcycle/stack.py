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
        gain: what the routed pieces write is multiplied by it; 0 for their number.
    """

    segments: int = 1
    shared: int = 0
    gain: int = 0

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
    kind, n = "bias" if bias else "weight", slices.routed
    out: Tensor | None = None
    written: dict[int, slice] = {}
    for i, source in enumerate(sources):
        rows = slice(i * n, (i + 1) * n)
        if out is None:
            out = _empty(prefix, part, kind, source, slices, n * len(sources))
        if id(source) in written:
            out[rows] = out[written[id(source)]]
        else:
            _write(out[rows], prefix, part, kind, source, slices)
            written[id(source)] = rows
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
    first = sources[0](name)
    out = first.new_empty(len(sources), *first.shape)
    for i, source in enumerate(sources):
        out[i] = source(name)
    return out


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


def _empty(prefix: str, part: str, kind: str, source: Source, slices: Slices, n_experts: int) -> Tensor:
    down = source(f"{prefix}down_proj.weight")
    width, hidden = down.shape[0], down.shape[1] // slices.segments
    rows = {"gate_up_proj": 2 * hidden, "up_proj": hidden, "down_proj": width}[part]
    columns = {"bias": (), "weight": (hidden,) if part == "down_proj" else (width,)}[kind]
    return down.new_empty(n_experts, rows, *columns)


def _write(out: Tensor, prefix: str, part: str, kind: str, source: Source, slices: Slices) -> None:
    """One model's routed pieces into their place (routed, ..), with no copy beside it."""
    m, skip = slices.segments, slices.shared
    if part == "down_proj":
        value = source(f"{prefix}down_proj.{kind}")
        if kind == "bias":
            out.copy_(value)
        else:
            out.copy_(value.view(len(value), m, -1).transpose(0, 1)[skip:])
            out.mul_(float(slices.gain or slices.routed))
        return
    halves = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("up_proj",)
    for place, half in zip(out.chunk(len(halves), dim=1), halves, strict=True):
        value = source(f"{prefix}{half}.{kind}")
        place.copy_(value.view(m, -1, *value.shape[1:])[skip:])
