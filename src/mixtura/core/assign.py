"""Small exact optimizers: who gets how many bits.

Integer programs are solved by HiGHS through SciPy.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import eye_array, kron

__all__ = ["Infeasible", "allocate_bits", "feasible_range"]


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
