"""Do hidden units stand for facts? Coverage and reconstruction of the properties of a board, or of any yes/no facts.

A unit f with a threshold t is a classifier: f > t times the unit's own maximum. For every property the classifiers are chosen
on the fitting games and measured on others: with more units a maximum over the same games rises by chance alone.

- *Coverage*: mean over the properties of the F1 of the classifier with the best F1.
- *Reconstruction*: every classifier with high precision is kept; a position's board is predicted as the union of what they
  say; F1 between predicted and true board, averaged over positions.

Everything is a handful of matrix products: active units (N, U) against properties (N, G) at each threshold.

Shapes: N positions, U units, G properties.
Source: Karvonen et al. 2024 (2408.00113), sec. 4, as used in MoE-X (2503.07639), sec. 5.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["BoardProbe", "board_properties"]

LEVELS = tuple(i / 10 for i in range(10))  # thresholds, as shares of a unit's maximum


class BoardProbe:
    """Classifiers of yes/no properties out of single hidden units.

    Args:
        precision: what a classifier must reach on the fitting games to count for reconstruction.
        support: how often it must fire there; with fewer, units that fired once by chance would look precise.
        least, most: prevalence that a property must have there. What is almost always true (pawns at home), or almost
            never, says nothing; dropped properties are listed.
        names: of the properties.

    After :meth:`fit`: ``properties_`` (kept columns), ``dropped_`` (names or columns of the others), ``alive_`` (units that
    ever fired), ``dead_`` (how many never did; they take part in nothing).

    Example:
        >>> boards = torch.eye(2).bool().repeat(20, 1)
        >>> probe = BoardProbe().fit(boards.float(), boards)
        >>> probe.coverage(boards.float(), boards), probe.reconstruction(boards.float(), boards)
        (1.0, 1.0)
    """

    def __init__(
        self,
        *,
        precision: float = 0.95,
        support: int = 10,
        least: float = 0.002,
        most: float = 0.9,
        names: Sequence[str] | None = None,
    ) -> None:
        if not 0 < precision <= 1:
            raise ValueError(f"precision must be in (0, 1], got {precision}")
        if support < 1:
            raise ValueError(f"support must be at least 1, got {support}")
        if not 0 <= least < most <= 1:
            raise ValueError(f"least and most must be 0 <= least < most <= 1, got {least} and {most}")
        self.precision, self.support, self.least, self.most = precision, support, least, most
        self.names = None if names is None else list(names)

    def fit(self, units: Tensor, boards: Tensor, games: Tensor | None = None) -> BoardProbe:
        """Choose classifiers.

        Args:
            units: hidden units (N, U), scaled by the gate where there is one.
            boards: properties (N, G), bool.
            games: which game each position is from, (N,); then a later call with one of these games is refused.
        Raises:
            ValueError: lengths that differ, units that are not finite, no property left, or no unit that fires.
        """
        boards = _checked(units, boards, games)
        prevalence_G = boards.float().mean(0)
        kept_G = (prevalence_G >= self.least) & (prevalence_G <= self.most)
        kept_G &= (prevalence_G > 0) & (prevalence_G < 1)
        if not bool(kept_G.any()):
            raise ValueError(f"no property is true in {self.least:g} to {self.most:g} of the positions")
        if self.names is not None and len(self.names) != len(kept_G):
            raise ValueError(f"names must name {len(kept_G)} properties, got {len(self.names)}")
        peak_U = units.amax(0)
        alive_U = peak_U > 0
        if not bool(alive_U.any()):
            raise ValueError("no unit ever fires on the fitting games")
        self.n_units_, self.n_properties_ = units.shape[1], boards.shape[1]
        self.properties_ = kept_G.nonzero().flatten()
        self.dropped_ = [self._name(i) for i in (~kept_G).nonzero().flatten().tolist()]
        self.alive_ = alive_U.nonzero().flatten()
        self.dead_ = int((~alive_U).sum())
        self.games_ = None if games is None else games.unique()
        self._choose(units[:, self.alive_], boards[:, self.properties_])
        return self

    def _choose(self, units_NU: Tensor, boards_NG: Tensor) -> None:
        """Best classifier of each property, and the lowest threshold from which each unit is precise on it."""
        self.peak_ = units_NU.amax(0)
        truth_NG = boards_NG.float()
        total_G = truth_NG.sum(0)
        n_units, n_properties = units_NU.shape[1], boards_NG.shape[1]
        best_G = torch.full((n_properties,), -1.0)
        unit_G, level_G = torch.zeros(2, n_properties, dtype=torch.int64)
        fitted = torch.zeros(3, n_properties)
        lowest_UG = torch.full((n_units, n_properties), len(LEVELS), dtype=torch.int8)
        for j, level in enumerate(LEVELS):
            active_NU = (units_NU > level * self.peak_).float()
            fired_U = active_NU.sum(0)
            hits_UG = active_NU.T @ truth_NG
            f1_UG = 2 * hits_UG / (fired_U[:, None] + total_G)
            top_G, who_G = f1_UG.max(0)
            better_G = top_G > best_G
            hits_G = hits_UG.gather(0, who_G[None])[0]
            found = torch.stack((top_G, hits_G / fired_U[who_G].clamp(min=1), hits_G / total_G))
            fitted = torch.where(better_G, found, fitted)
            best_G = torch.where(better_G, top_G, best_G)
            unit_G, level_G = torch.where(better_G, who_G, unit_G), torch.where(better_G, j, level_G)
            precise_UG = (hits_UG >= self.precision * fired_U[:, None]) & (fired_U >= self.support)[:, None]
            lowest_UG[precise_UG & (lowest_UG == len(LEVELS))] = j
        self.unit_, self.level_, self.fitted_, self.lowest_ = unit_G, level_G, fitted, lowest_UG

    def coverage(self, units: Tensor, boards: Tensor, games: Tensor | None = None) -> float:
        """Mean over properties of the chosen classifier's F1 on these positions; a property absent here is left out."""
        f1_G = self._measured(units, boards, games)[0]
        return float(f1_G[~f1_G.isnan()].mean())

    def reconstruction(self, units: Tensor, boards: Tensor, games: Tensor | None = None) -> float:
        """Mean over positions of the F1 of the board that the precise classifiers predict together."""
        units_NU, truth_NG = self._kept(units, boards, games)
        said_NG = torch.zeros_like(truth_NG, dtype=torch.float32)
        for j, level in enumerate(LEVELS):
            # Above a higher threshold a unit is above the lower one too: the lowest speaks for all.
            said_NG += (units_NU > level * self.peak_).float() @ (self.lowest_ == j).float()
        said_NG = said_NG > 0
        hits_N = (said_NG & truth_NG).sum(1)
        either_N = said_NG.sum(1) + truth_NG.sum(1)
        # An empty board that is predicted empty is right.
        return float(torch.where(either_N == 0, 1.0, 2 * hits_N / either_N.clamp(min=1)).mean())

    def table(self, units: Tensor | None = None, boards: Tensor | None = None) -> list[dict[str, Any]]:
        """One row a property: its classifier with precision, recall and F1, on the fitting games or on those given.

        ``pandas.DataFrame(probe.table())`` makes a frame of it.
        """
        figures = self.fitted_ if units is None or boards is None else self._measured(units, boards, None)
        unit_G = self.alive_[self.unit_]
        return [
            {
                "property": self._name(int(self.properties_[i])),
                "unit": int(unit_G[i]),
                "threshold": LEVELS[int(self.level_[i])] * float(self.peak_[self.unit_[i]]),
                "precision": float(figures[1][i]),
                "recall": float(figures[2][i]),
                "f1": float(figures[0][i]),
            }
            for i in range(len(unit_G))
        ]

    def _measured(self, units: Tensor, boards: Tensor, games: Tensor | None) -> Tensor:
        """F1, precision and recall (3, G) of the chosen classifiers; F1 is NaN for a property that is never true here."""
        units_NU, truth_NG = self._kept(units, boards, games)
        thresholds_G = torch.tensor(LEVELS)[self.level_] * self.peak_[self.unit_]
        said_NG = units_NU[:, self.unit_] > thresholds_G
        hits_G, said_G, total_G = (said_NG & truth_NG).sum(0), said_NG.sum(0), truth_NG.sum(0)
        f1_G = torch.where(total_G == 0, torch.nan, 2 * hits_G / (said_G + total_G))
        return torch.stack((f1_G, hits_G / said_G.clamp(min=1), hits_G / total_G.clamp(min=1)))

    def _kept(self, units: Tensor, boards: Tensor, games: Tensor | None) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "alive_"):
            raise ValueError("fit the probe first, on games other than those it is measured on")
        boards = _checked(units, boards, games)
        if units.shape[1] != self.n_units_ or boards.shape[1] != self.n_properties_:
            raise ValueError(
                f"the probe was fitted on {self.n_units_} units and {self.n_properties_} properties, "
                f"got {units.shape[1]} and {boards.shape[1]}"
            )
        if games is not None and self.games_ is not None:
            common = games[torch.isin(games, self.games_)].unique()
            if len(common):
                raise ValueError(
                    f"games {common[:5].tolist()} are among those the probe was fitted on; measure on others"
                )
        return units[:, self.alive_], boards[:, self.properties_]

    def _name(self, column: int) -> str:
        return str(column) if self.names is None else self.names[column]


def board_properties(boards: Tensor) -> Tensor:
    """Yes/no facts "piece c stands on square q" of boards.

    Args:
        boards: shape (N, 64), 0 for empty and 1 to 12 for the pieces.
    Returns:
        Bool, shape (N, 768): piece after piece, 64 squares each.
    """
    pieces = torch.arange(1, 13, dtype=boards.dtype)
    return (boards[:, None, :] == pieces[:, None]).flatten(1)


def _checked(units: Tensor, boards: Tensor, games: Tensor | None) -> Tensor:
    if units.dim() != 2 or boards.dim() != 2 or len(units) != len(boards):
        raise ValueError(
            f"units (N, U) and boards (N, G) must have one length, got {tuple(units.shape)} and {tuple(boards.shape)}"
        )
    if games is not None and len(games) != len(units):
        raise ValueError(f"games must name {len(units)} positions' games, got {len(games)}")
    if not bool(units.isfinite().all()):
        bad = (~units.isfinite()).any(0).nonzero().flatten()[:5].tolist()
        raise ValueError(f"units {bad} are not finite")
    return boards.bool()
