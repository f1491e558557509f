"""Two relatives as one model with the experts of both: aggregation of experts.

What is no expert becomes the mean of the two; gate rows and expert stacks are joined, the first model's in front. A gate that
does not make its weights sum to 1 now shares its probability among twice as many: each weight falls, by half where the two
candidates tie. ``preserve_scale`` makes up for that in what the experts write.

Averages make sense between relatives only: checkpoints of one run, or branches of one ancestor. The joined model has to be
trained on; its loss before that says how related the two were.
Source: 2109.10465, sec. 5 (aggregation of experts); the scale is ours.
"""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixtura.lm.resized_experts import check_resizable, expert_tensors, set_number, with_rows

__all__ = ["aggregate", "aggregate_states"]

log = logging.getLogger(__name__)


def aggregate(a: Any, b: Any, *, preserve_scale: bool = True, rel_tol: float = 0.9) -> Any:
    """One mixture with the experts of two; see the module.

    Args:
        a, b: mixtures of one class and shape; they are left as they are.
        preserve_scale: multiply what experts write by (E_a + E_b) / E_a, where the gate's weights are not made to sum to 1. With
            one expert a token, a model joined with itself then computes what it did; with more, a token visits copies of the
            same expert and does not. False: the paper's rule.
        rel_tol: warn where the mean cosine of the tensors that are averaged is below.
    Returns:
        A model of the same class in evaluation mode.
    Raises:
        ValueError: models of different classes or shapes; the first tensor that differs is named.
    Source:
        2109.10465, sec. 5.
    """
    if type(a) is not type(b):
        raise ValueError(f"a and b must be of one class, got {type(a).__name__} and {type(b).__name__}")
    moe = check_resizable(a)
    rows = {name for block in moe for name in expert_tensors(block)}
    outputs: dict[str, float] = {}
    for block in moe:
        if preserve_scale and block.scoring.renormalises is not True:
            outputs |= {
                name: 2.0
                for name in expert_tensors(block)
                if name.startswith(f"{block.experts_name}.") and _writes(name)
            }
    state = aggregate_states(a.state_dict(), b.state_dict(), rows=rows, outputs=outputs, rel_tol=rel_tol)
    made = copy.deepcopy(a)
    joined = check_resizable(made)
    numbers = with_rows(made, joined, lambda block, name, tensor: state[name].to(tensor.dtype))
    set_number(made.config, numbers)
    own = made.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in rows:
                own[name].copy_(tensor)
    return made.eval()


def aggregate_states(
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    *,
    rows: set[str],
    outputs: Mapping[str, float] | None = None,
    rel_tol: float = 0.9,
) -> dict[str, Tensor]:
    """The same for state dicts.

    Args:
        a, b: state dicts of one shape.
        rows: names of the tensors with one row an expert, which are joined; the others are averaged.
        outputs: factors by name, of tensors that experts write with.
        rel_tol: see :func:`aggregate`.
    Raises:
        ValueError: names or shapes differ; the first tensor that does is named.
    """
    for name in [*a, *b]:
        ours, theirs = a.get(name), b.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            here = "nothing" if ours is None else str(tuple(ours.shape))
            there = "nothing" if theirs is None else str(tuple(theirs.shape))
            raise ValueError(f"a and b must have the same tensors: {name} is {here} in a and {there} in b")
    found: dict[str, Tensor] = {}
    cosines = []
    for name, tensor in a.items():
        if name in rows:
            joined = torch.cat([tensor, b[name]])
            found[name] = joined * outputs[name] if outputs and name in outputs else joined
        elif tensor.is_floating_point():
            found[name] = (tensor + b[name]) / 2
            if tensor.dim() >= 2:
                cosines.append(torch.cosine_similarity(tensor.flatten().float(), b[name].flatten().float(), dim=0))
        else:
            found[name] = tensor.clone()
    likeness = float(torch.stack(cosines).mean()) if cosines else 1.0
    if likeness < rel_tol:
        log.warning(
            "the two models are no close relatives: the averaged tensors have a mean cosine of %.2f (below %.2f); expect to "
            "train the result from nearly the start, or join branches of one ancestor",
            likeness,
            rel_tol,
        )
    return found


def _writes(name: str) -> bool:
    return name.rpartition(".")[2].startswith("down_proj")
