"""Hidden units of a feed-forward part in blocks of equal size: those that every token needs, and those that fire together.

A unit u writes a_tu times its down column into the stream of token t, so |a_tu| |down_u| is how much of it there is.

- *Shared* units have the largest mean of that over tokens.
- The others are grouped by k-means of their profiles over tokens, with groups of one size: a token then finds what it needs in
  few groups. Sizes are kept by deferred acceptance: every unit asks the nearest group that has not refused it, and a group
  keeps those that gain most by it.

Shapes: T tokens, H hidden units, G groups, N rows.
Source: DeepSeekMoE (2401.06066), sec. 3.2 (what shared experts are for); grouping by co-activation: Zhang et al. 2022,
MoEfication (2110.01786), sec. 3.2; deferred acceptance: Gale and Shapley 1962.
"""

import torch
from torch import Tensor

__all__ = ["balanced_assignment", "balanced_groups", "profiles", "unit_order"]

ROUNDS = 20  # of k-means; it has mostly settled after ten


def unit_order(activations: Tensor, down: Tensor, *, split: int, shared: int, generator: torch.Generator) -> Tensor:
    """Order of the hidden units that puts the shared ones first and then one group after another.

    Args:
        activations: of every unit on every token, before the down projection, shape (T, H).
        down: down projection, shape (D, H).
        split: blocks of equal size, a divisor of H.
        shared: blocks that hold the units with the largest mean size; the other ``split - shared`` hold a group each.
        generator: draws the first centres.
    Returns:
        A permutation of the units, int64, shape (H,); units of a block stand in their old order.
    """
    hidden = activations.shape[1]
    size = hidden // split
    sizes_TH = activations.abs() * down.norm(dim=0)
    ranked = sizes_TH.mean(0).sort(descending=True, stable=True).indices
    always, rest = ranked[: shared * size].sort().values, ranked[shared * size :].sort().values
    groups = balanced_groups(profiles(sizes_TH[:, rest]), split - shared, generator=generator)
    return torch.cat((always, rest[groups.sort(stable=True).indices]))


def profiles(sizes: Tensor) -> Tensor:
    """How each unit's size goes up and down over the tokens, as directions: inner products are correlations.

    A token is first divided by its own mean: the first of a text is often a hundred times the others and would be the profile.

    Args:
        sizes: >= 0, shape (T, H).
    Returns:
        Shape (H, T), rows of mean zero and norm 1; zeros for a unit that never changes.
    """
    relative = sizes / sizes.mean(1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)
    centred = (relative - relative.mean(0)).T
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).eps)


def balanced_groups(points: Tensor, n_groups: int, *, generator: torch.Generator, rounds: int = ROUNDS) -> Tensor:
    """K-means whose groups all have as many points.

    Args:
        points: shape (N, F), N a multiple of ``n_groups``.
        n_groups: G.
        generator: draws the first centres, far apart (k-means++).
        rounds: most assignments; the one of the least total squared distance is kept.
    Returns:
        Group of each point, int64, shape (N,), each of [0, G) equally often.
    """
    if n_groups == 1:
        return torch.zeros(len(points), dtype=torch.int64, device=points.device)
    centres = _far_apart(points, n_groups, generator)
    best, least = torch.empty(0, dtype=torch.int64), torch.inf
    for _ in range(rounds):
        distances = torch.cdist(points, centres).square()
        groups = balanced_assignment(distances)
        total = float(distances.gather(1, groups[:, None]).sum())
        if total >= least:  # rounds no longer help, or go round in a circle
            break
        best, least = groups, total
        centres = torch.zeros_like(centres).index_add_(0, groups, points) / (len(points) // n_groups)
    return best


def balanced_assignment(cost: Tensor) -> Tensor:
    """A group for each row, all groups of one size, such that no two rows would both gain by leaving for the same place.

    Args:
        cost: of each row in each group, shape (N, G), N a multiple of G. What counts between rows is what a group spares them
            in comparison with the mean of all groups.
    Returns:
        Group of each row, int64, shape (N,).
    Raises:
        ValueError: N is no multiple of G.
    Example:
        >>> balanced_assignment(torch.tensor([[0.0, 9.0], [1.0, 9.0], [2.0, 3.0], [0.0, 1.0]])).tolist()
        [0, 0, 1, 1]
    """
    n, n_groups = cost.shape
    if n % n_groups:
        raise ValueError(f"{n} rows cannot be divided into {n_groups} groups of one size")
    cost = cost - cost.mean(1, keepdim=True)
    wishes = cost.sort(dim=1, stable=True).indices
    refused = torch.zeros(n, dtype=torch.int64, device=cost.device)  # by how many groups
    places = torch.arange(n, device=cost.device)
    while True:
        asked = wishes.gather(1, refused[:, None])[:, 0]
        price = cost.gather(1, asked[:, None])[:, 0]
        by_price = price.sort(stable=True).indices
        queue = by_price[asked[by_price].sort(stable=True).indices]  # group by group, the cheapest first
        length = asked.bincount(minlength=n_groups)
        place = places - (length.cumsum(0) - length)[asked[queue]]
        losers = queue[place >= n // n_groups]
        if len(losers) == 0:
            return asked
        refused[losers] += 1


def _far_apart(points: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Points drawn with chances that grow with the squared distance from those already drawn."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    nearest = torch.full((len(points),), torch.inf, dtype=points.dtype, device=points.device)
    for _ in range(n - 1):
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
        chances = nearest.double().cpu().clamp_min(torch.finfo(torch.float64).tiny)  # equal points may all be taken
        chosen.append(int(torch.multinomial(chances, 1, generator=generator)))
    return points[chosen]
