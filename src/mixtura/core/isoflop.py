"""Sparse layers that cost what a dense layer costs: wide, parallel, factorized and doped (Sparse-IFT).

One number, the sparsity s, sets how much larger a layer becomes; its density is what makes the multiply-adds equal.

==============  =======================================================  =========================================
member          in place of a dense layer of I inputs and O outputs       size
==============  =======================================================  =========================================
``wide``        the same layer in a network k times as wide, masked       k = 1 / sqrt(1 - s)
``parallel``    n masked layers of the same shape, each with a            n = 1 / (1 - s), an integer
                non-linearity of its own, summed
``factorized``  V sigma(U x), both masked                                 rank ceil(I O / ((1 - s) (I + O)))
``doped``       a masked layer plus V U x, dense                          rank floor(s I O / (I + O))
==============  =======================================================  =========================================

Equality is exact where the paper's is nominal: with ``match="network"`` the number of active weights takes up what a rounded
rank, a rounded width and the layers without a mask (which get wider too) cost more or less. The density is then no longer
1 - s, and is reported.

Source: Saxena et al. 2023 (2303.11525), sec. 2.2-2.3; densities by shape (ERK): RigL (1911.11134), sec. 3.
"""

import copy
import fnmatch
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixtura.core.flops import FlopReport, count_flops
from mixtura.core.isoflop_sizes import (
    MEMBERS,
    IsoFlop,
    active_counts,
    branches,
    doped_rank,
    factorized_rank,
    matrix_shape,
    scaled_width,
    widening,
)
from mixtura.core.masks import Masked, draw_mask, input_axis, largest_of_groups, masked_parameters
from mixtura.core.sparse_layers import (
    DopedSparse,
    FactorizedSparse,
    ParallelSparse,
    SparseConv2d,
    SparseLinear,
)

__all__ = [
    "MEMBERS",
    "IsoFlop",
    "active_counts",
    "add_masks",
    "branches",
    "convert",
    "convertible",
    "doped_rank",
    "draw_masks",
    "factorized_rank",
    "initialise",
    "make_sparse",
    "matrix_shape",
    "replace",
    "scaled_width",
    "widen",
    "widening",
]

log = logging.getLogger(__name__)

_NOTHING = "{} has no linear layer or convolution before its last one to convert"
Initialise = Callable[[nn.Module, torch.Generator | None], None]


def convert(
    model: nn.Module,
    transform: IsoFlop,
    *,
    example_input: Any,
    generator: torch.Generator | None = None,
    fresh: bool = False,
    inplace: bool = False,
    init: Initialise | None = None,
) -> nn.Module:
    """Put parallel, factorized or doped layers in the place of the linear layers and convolutions of a model.

    The new layers start anew, and a warning says so, but for doped ones: their sparse part is the old weight where it is
    largest, and V U the best low-rank approximation of the rest (truncated SVD). The rest of the model stays.

    Args:
        model: any module; it is left as it is unless ``inplace``.
        transform: member and sparsity; for ``wide`` see :func:`widen`.
        example_input: what the model is called with, to count and to find its first and last layer.
        generator: source of chance.
        fresh: start doped layers anew too, without a warning for the others: for a model that was not trained yet.
        inplace: change ``model`` itself.
        init: (layer, generator) -> None, draws a new ``nn.Linear`` or ``nn.Conv2d``; by default as torch does, convolutions by
            Kaiming's fan-out. Nothing is rescaled for the density.
    Returns:
        The model with the new layers; with sparsity 0 as it was. With ``match="network"`` its multiply-adds are those of the
        dense model, to one weight.
    Raises:
        ValueError: member ``wide``, no layer to convert, or a parameter shared by two of them.
    """
    if transform.member == "wide":
        raise ValueError("member 'wide' widens the whole network, which a layer cannot do for itself; use widen")
    model = model if inplace else copy.deepcopy(model)
    before = count_flops(model, example_input)
    names = convertible(model, before, transform.skip)
    if not names:
        raise ValueError(_NOTHING.format(type(model).__name__))
    if transform.sparsity == 0:
        return model  # nothing to gain: one branch without a mask, a rank of 0, or two dense factors
    if not fresh and transform.member != "doped":
        log.warning("%d layers start anew: a trained dense layer has no %s form", len(names), transform.member)
    old = {name: model.get_submodule(name) for name in names}
    for name in names:
        made = replace(model, name, transform)
        made.train(old[name].training)
        for layer in _matrices(made):
            (init or initialise)(layer, generator)
    after = count_flops(model, example_input)
    unmasked = after.dense - sum(c.dense for n, c in after.weights.items() if n in masked_parameters(model))
    draw_masks(model, after, transform, before.total - unmasked, generator=generator)
    if transform.member == "doped" and not fresh:
        for name in names:
            _dope(old[name], model.get_submodule(name), transform.n_m)
    return model


def widen(
    factory: Callable[[int], nn.Module],
    transform: IsoFlop,
    *,
    width: int,
    example_input: Any,
    multiple_of: int = 1,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A network k times as wide, sparse enough to cost what the dense one costs.

    Args:
        factory: width -> a network of that width; called with ``width`` to count and with the widened one to build.
        transform: sparsity (``member`` must be ``"wide"``).
        width: of the dense network.
        example_input: what the networks are called with, to count and to find their first and last layer.
        multiple_of: the widened width is the nearest multiple of this.
        generator: source of chance of the masks; weights are the factory's.
    Raises:
        ValueError: the layers without a mask alone cost more than the dense network (the largest sparsity that fits is named).
    Example:
        >>> net = lambda width: nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))
        >>> made = widen(net, IsoFlop("wide", 0.75), width=16, example_input=torch.zeros(1, 8))
        >>> made[0].weight.shape, int(made[0].mask.sum()), 8 * 16 + 16 * 2 - 32 * 2
        (torch.Size([32, 8]), 96, 96)
    """
    if transform.member != "wide":
        raise ValueError(f"widen takes member 'wide', got {transform.member!r}; use convert")
    dense = count_flops(factory(width), example_input)

    def build(sparsity: float) -> nn.Module:
        return factory(scaled_width(width, sparsity, multiple_of=multiple_of))

    model = build(transform.sparsity)
    add_masks(
        model,
        transform,
        dense.total,
        example_input=example_input,
        generator=generator,
        rebuild=build,
    )
    return model


def add_masks(
    model: nn.Module,
    transform: IsoFlop,
    budget: float,
    *,
    example_input: Any,
    generator: torch.Generator | None = None,
    rebuild: Callable[[float], nn.Module] | None = None,
) -> None:
    """Mask the layers of a wide network in place, so that it costs ``budget`` multiply-adds.

    Args:
        model: the widened network; stacked experts (a parameter of three dimensions) must have their masks already, from
            :func:`~mixtura.core.sparse_layers.mask_parameter`.
        transform, example_input, generator: as in :func:`widen`.
        budget: multiply-adds of the dense network.
        rebuild: sparsity -> network, to find the largest sparsity that fits when this one does not.
    """
    report = count_flops(model, example_input)
    names = convertible(model, report, transform.skip)
    if not names and not masked_parameters(model):
        raise ValueError(_NOTHING.format(type(model).__name__))
    room = budget - _unmasked(model, report, transform.skip)
    if transform.match == "network" and room <= 0:
        raise ValueError(_infeasible(transform, budget, example_input, rebuild))
    for name in names:
        make_sparse(model, name)
    draw_masks(model, count_flops(model, example_input), transform, room, generator=generator)


def draw_masks(
    model: nn.Module,
    report: FlopReport,
    transform: IsoFlop,
    budget: float,
    *,
    generator: torch.Generator | None = None,
) -> None:
    """Draw the masks of all masked parameters of a model and put inactive weights to zero.

    Args:
        model: has masks.
        report: its count.
        transform: says how the active weights are spread.
        budget: multiply-adds for the masked parameters, where ``match`` is ``"network"``.
    """
    masks = masked_parameters(model)
    n, m = transform.n_m
    for name, found in masks.items() if m else ():
        if (inputs := found.mask.shape[input_axis(found.mask.shape)]) % m:
            raise ValueError(
                f"n_m={transform.n_m}: {m} does not divide the {inputs} inputs of {name}, {tuple(found.mask.shape)}; leave the "
                f"layer out by skip, or widen to a width that {m} divides (multiple_of)"
            )
    costs = {name: report.weights[name] for name in masks if name in report.weights}
    if missing := sorted(set(masks) - set(costs)):
        raise ValueError(f"{missing[0]} is masked but was not used on the example, so its cost is unknown; skip it")
    if transform.match == "layer":
        budget = (1 - transform.sparsity) * sum(c.dense for c in costs.values())
    budget = min(budget, sum(c.dense for c in costs.values()))
    shapes = {n: tuple(m.mask.shape) for n, m in masks.items()} if transform.distribution == "erk" else None
    counts = active_counts(costs, budget, shapes=shapes)
    if m:
        counts = {name: found.mask.numel() // m * n for name, found in masks.items()}
    for name, found in masks.items():
        _draw(found, counts[name], transform, generator)


def convertible(model: nn.Module, report: FlopReport, skip: Iterable[str]) -> list[str]:
    """Names of the layers to transform, in the order in which they are called."""
    modules = dict(model.named_modules())
    used = [name for name in report.order if isinstance(modules[name], (nn.Linear, nn.Conv2d))]
    if used:
        used = used[:-1]  # the head
    if used and isinstance(modules[used[0]], nn.Conv2d):
        used = used[1:]  # the stem
    names, seen = [], dict[int, str]()
    for name in used:
        layer = modules[name]
        if any(fnmatch.fnmatch(name, pattern) for pattern in skip):
            continue
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            log.info("%s is a grouped convolution and stays dense", name)
            continue
        if isinstance(layer, (SparseLinear, SparseConv2d)):
            raise ValueError(f"{name} is sparse already; convert the dense model instead")
        if id(layer.weight) in seen:
            raise ValueError(
                f"{seen[id(layer.weight)]} and {name} share their weight, which cannot have two masks; untie or skip them"
            )
        seen[id(layer.weight)] = name
        names.append(name)
    return names


def replace(model: nn.Module, name: str, transform: IsoFlop) -> nn.Module:
    """Put the transformed form of one layer in its place, all weights active, and return it."""
    layer: Any = model.get_submodule(name)
    inputs, outputs = matrix_shape(layer)
    made: nn.Module
    if transform.member == "parallel":
        made = ParallelSparse(layer, branches(transform.sparsity), transform.between)
    elif transform.member == "factorized":
        # The rank is V's inputs, in which groups of an N:M mask lie.
        rank = factorized_rank(inputs, outputs, transform.sparsity, multiple_of=transform.n_m[1] or 1)
        made = FactorizedSparse(layer, rank, transform.between)
    else:
        made = DopedSparse(layer, doped_rank(inputs, outputs, transform.sparsity))
    model.set_submodule(name, made)
    return made


def make_sparse(model: nn.Module, name: str) -> None:
    """A masked layer with the same parameters in the place of a plain one."""
    layer: Any = model.get_submodule(name)
    kind: Any = SparseConv2d if isinstance(layer, nn.Conv2d) else SparseLinear
    made = kind.__new__(kind)
    made.__dict__ = layer.__dict__  # the parameters themselves, and the hooks that a library put there
    made.register_buffer("mask_weight", torch.ones_like(layer.weight, dtype=torch.bool))
    model.set_submodule(name, made)


def initialise(layer: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw a layer anew: linear ones as torch does, convolutions by Kaiming's fan-out for ReLU, as the authors."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    with torch.no_grad():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        else:
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        if layer.bias is not None:
            bound = layer.weight[0].numel() ** -0.5
            layer.bias.uniform_(-bound, bound, generator=generator)


def _matrices(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def _unmasked(model: nn.Module, report: FlopReport, skip: Iterable[str]) -> float:
    """Multiply-adds of what has no mask and will get none."""
    masked_names = {f"{name}.weight".lstrip(".") for name in convertible(model, report, skip)}
    masked_names |= set(masked_parameters(model))
    return report.dense - sum(cost.dense for name, cost in report.weights.items() if name in masked_names)


def _infeasible(
    transform: IsoFlop, budget: float, example_input: Any, rebuild: Callable[[float], nn.Module] | None
) -> str:
    advice = "take a smaller sparsity"
    if rebuild is not None:
        low, high = 0.0, transform.sparsity
        for _ in range(12):
            middle = (low + high) / 2
            model = rebuild(middle)
            fits = _unmasked(model, count_flops(model, example_input), transform.skip) < budget
            low, high = (middle, high) if fits else (low, middle)
        advice = f"the largest sparsity that fits is {math.floor(low * 100) / 100:g}"
    return (
        f"sparsity={transform.sparsity} cannot be had: widened, the layers without a mask alone take more than the dense "
        f"network's {budget:,.0f} multiply-adds; {advice}"
    )


def _draw(found: Masked, active: int, transform: IsoFlop, generator: torch.Generator | None) -> None:
    shape = found.mask.shape
    with torch.no_grad():
        if found.layers == 1:
            axis = input_axis(shape)
            found.mask.copy_(draw_mask(shape, active, generator=generator, n_m=_pattern(transform), axis=axis))
        else:
            # Experts share out evenly; the first ones take what is left over.
            for e in range(found.layers):
                part = active // found.layers + (e < active % found.layers)
                found.mask[e] = draw_mask(shape[1:], part, generator=generator, n_m=_pattern(transform))
        found.parameter.mul_(found.mask)


def _pattern(transform: IsoFlop) -> tuple[int, int] | None:
    return transform.n_m if transform.n_m[1] else None


@torch.no_grad()
def _dope(old: nn.Module, made: nn.Module, n_m: tuple[int, int]) -> None:
    """The old weight in a doped layer: its largest entries where the mask may be, the rest as well as the rank allows."""
    assert isinstance(old, (nn.Linear, nn.Conv2d)) and isinstance(made, DopedSparse)
    sparse: Any = made.sparse
    weight = old.weight.detach()
    if n_m[1]:
        mask = largest_of_groups(weight.abs(), n_m, input_axis(weight.shape))
    else:
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask.view(-1)[weight.abs().flatten().topk(int(sparse.mask.sum())).indices] = True
    sparse.weight.copy_(weight)
    sparse.set_mask(mask)
    if old.bias is not None:
        sparse.bias.copy_(old.bias)
    if made.u is not None and made.v is not None:
        rest_OI: Tensor = (weight - sparse.weight).flatten(1).float()
        left, values, right = torch.linalg.svd(rest_OI, full_matrices=False)
        root = values[: made.rank].sqrt()
        u: Any = made.u.weight
        v: Any = made.v.weight
        v.copy_((left[:, : made.rank] * root).view_as(v))
        u.copy_((root[:, None] * right[: made.rank]).view_as(u))
