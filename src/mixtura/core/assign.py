"""Small exact optimizers: who gets how many bits, who looks how far.

Integer programs are solved by HiGHS through SciPy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array, eye_array, hstack, kron

__all__ = ["Infeasible", "allocate_bits", "allocate_spans", "feasible_range"]


class Infeasible(ValueError):
    """No allocation meets the budget and the minimum counts; the message names the range that can be met."""


def allocate_bits(
    cost: ArrayLike,
    bits: Sequence[int],
    budget: int,
    *,
    at_least: Mapping[int, int] | None = None,
    equality: bool = False,
) -> NDArray[np.int64]:
    """Bits for each item so that the total cost is smallest under a budget of bits.

    Minimises sum_ij cost_ij x_ij over binary x with sum_j x_ij = 1, sum_ij bits_j x_ij <= budget and, for each width in
    ``at_least``, no fewer items of that width (MC-MoE 2410.06270, eq. 4-6).

    Args:
        cost: cost of giving item i the width bits[j], shape (n, m), finite and >= 0.
        bits: the m widths, different from each other.
        budget: bits of all items together.
        at_least: width -> least number of items that get it.
        equality: spend the budget exactly.
    Returns:
        Width of each item, shape (n,).
    Raises:
        Infeasible: the budget cannot be met; the feasible range is named.
        ValueError: shapes or widths that do not fit.
    Example:
        >>> allocate_bits([[9.0, 1.0], [2.0, 1.0]], bits=(1, 3), budget=4).tolist()
        [3, 1]
    """
    costs = np.asarray(cost, dtype=np.float64)
    widths = np.asarray(bits, dtype=np.int64)
    if costs.ndim != 2 or costs.shape[1] != len(widths) or len(costs) == 0:
        raise ValueError(f"cost must have shape (n, {len(widths)}) for bits={list(bits)}, got {costs.shape}")
    if not np.isfinite(costs).all():
        item, option = np.argwhere(~np.isfinite(costs))[0]
        raise ValueError(f"cost[{item}, {option}] is {costs[item, option]}; every cost must be finite")
    minimum = dict(at_least or {})
    low, high = feasible_range(len(costs), bits, at_least=minimum)
    if budget < low or (equality and budget > high):
        raise Infeasible(_words(len(costs), budget, low, high, minimum))
    n, m = costs.shape
    rows = [LinearConstraint(kron(eye_array(n), np.ones((1, m))), 1, 1)]
    rows.append(LinearConstraint(np.tile(widths, n)[None], budget if equality else 0, budget))
    for width, count in minimum.items():
        rows.append(LinearConstraint(np.tile(widths == width, n)[None].astype(float), count, np.inf))
    # Costs may be tiny powers; the solver's tolerances are absolute.
    scaled = costs / max(costs.max(), np.finfo(float).tiny)
    found = milp(
        scaled.ravel(), constraints=rows, integrality=np.ones(n * m), bounds=Bounds(0, 1), options={"mip_rel_gap": 1e-6}
    )
    if found.x is None:
        raise Infeasible(_words(n, budget, low, high, minimum))
    chosen: NDArray[np.int64] = widths[np.asarray(found.x).reshape(n, m).argmax(1)]
    return chosen


def feasible_range(n: int, bits: Sequence[int], *, at_least: Mapping[int, int] | None = None) -> tuple[int, int]:
    """Fewest and most bits that n items can have together.

    Raises:
        ValueError: a width in ``at_least`` that is not in ``bits``, or more items asked for than there are.
    """
    minimum = dict(at_least or {})
    if unknown := sorted(set(minimum) - set(bits)):
        raise ValueError(f"at_least names the widths {unknown}, bits are {list(bits)}")
    if len(set(bits)) != len(bits):
        raise ValueError(f"bits must differ from each other, got {list(bits)}")
    asked = sum(minimum.values())
    if asked > n:
        raise Infeasible(f"at_least={minimum} asks for {asked} items, there are {n}")
    fixed = sum(width * count for width, count in minimum.items())
    return fixed + (n - asked) * min(bits), fixed + (n - asked) * max(bits)


def _words(n: int, budget: int, low: int, high: int, minimum: Mapping[int, int]) -> str:
    told = f" with at least {', '.join(f'{c} of {w} bits' for w, c in minimum.items())}" if minimum else ""
    return (
        f"no allocation gives {n} items {budget} bits ({budget / n:.3g} on average){told}; "
        f"the average must lie between {low / n:.3g} and {high / n:.3g}"
    )


def allocate_spans(
    cost: ArrayLike,
    weight: ArrayLike,
    budget: ArrayLike,
    groups: Sequence[int],
    *,
    most: int | None = None,
    lower: float = 0.0,
    within: Sequence[tuple[ArrayLike, float, float]] = (),
    time_limit: float = 60.0,
) -> NDArray[np.int64]:
    """One option for each item so that the total cost is smallest, with few different options in each group.

    Minimises sum_hr cost_hr x_hr over binary x with sum_r x_hr = 1; mean_h weight_c,r(h) between ``lower`` budget_c and budget_c
    for every constraint c; at most ``most`` options used in a group; and other costs held within bounds (MoA 2406.14909,
    eq. 5-6 and appendix: epsilon constraints).

    Args:
        cost: cost of giving item h the option r, shape (H, R), finite.
        weight: weight of option r under constraint c, shape (C, R).
        budget: largest mean weight, shape (C,).
        groups: group of each item, length H.
        most: options a group may use; None for any number.
        lower: share of the budget that must be spent.
        within: (another cost of shape (H, R), least, largest total).
        time_limit: seconds; the best found by then is taken.
    Returns:
        Option of each item, shape (H,).
    Raises:
        Infeasible: no allocation exists, or none was found in time.
        ValueError: shapes that do not fit, or costs that are not finite.
    Example:
        >>> allocate_spans([[0.0, 5.0], [0.0, 1.0]], [[1.0, 0.5]], [0.75], groups=[0, 1]).tolist()
        [0, 1]
    """
    costs = np.asarray(cost, dtype=np.float64)
    weights = np.atleast_2d(np.asarray(weight, dtype=np.float64))
    budgets = np.atleast_1d(np.asarray(budget, dtype=np.float64))
    h, r = costs.shape
    if weights.shape != (len(budgets), r) or len(groups) != h:
        raise ValueError(
            f"for costs of shape ({h}, {r}), weight must have shape (C, {r}), budget (C,) and groups {h} entries; got "
            f"{weights.shape}, {budgets.shape} and {len(groups)}"
        )
    if not np.isfinite(costs).all():
        item, option = np.argwhere(~np.isfinite(costs))[0]
        raise ValueError(f"cost[{item}, {option}] is {costs[item, option]}; every cost must be finite")
    kinds = sorted(set(groups))
    n_uses = len(kinds) * r if most is not None else 0
    # Variables: x by item and option, then y: whether a group uses an option.
    rows = [LinearConstraint(_padded(kron(eye_array(h), np.ones((1, r))), n_uses), 1, 1)]
    spent = np.tile(weights / h, h)
    rows.append(LinearConstraint(_padded(spent, n_uses), lower * budgets, budgets))
    for other, low, high in within:
        found = np.asarray(other, dtype=np.float64)
        size = max(abs(found).max(), np.finfo(float).tiny)
        rows.append(LinearConstraint(_padded(found.reshape(1, -1) / size, n_uses), low / size, high / size))
    if most is not None:
        member = coo_array((np.ones(h), (np.arange(h), np.searchsorted(kinds, groups))), shape=(h, len(kinds)))
        rows.append(LinearConstraint(hstack([-eye_array(h * r), kron(member, eye_array(r))]), 0, np.inf))
        rows.append(
            LinearConstraint(
                hstack([csr_array((len(kinds), h * r)), kron(eye_array(len(kinds)), np.ones((1, r)))]), 0, most
            )
        )
    scaled = np.concatenate([costs.ravel() / max(abs(costs).max(), np.finfo(float).tiny), np.zeros(n_uses)])
    solved = milp(
        scaled,
        constraints=rows,
        integrality=np.ones(len(scaled), dtype=np.int64),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": time_limit},
    )
    if solved.x is None:
        least = weights.min(1)
        raise Infeasible(
            f"no allocation keeps mean weights under {budgets.tolist()}; the smallest that any has is {least.tolist()}"
            if (least > budgets).any()
            else f"no allocation meets all constraints (or none was found in {time_limit:.0f} s): {solved.message}"
        )
    chosen: NDArray[np.int64] = np.asarray(solved.x)[: h * r].reshape(h, r).argmax(1)
    return chosen


def _padded(left: Any, n: int) -> Any:
    """Columns of zeros to the right."""
    return hstack([left, csr_array((left.shape[0], n))]) if n else left
