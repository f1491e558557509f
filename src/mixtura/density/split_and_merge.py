"""Splitting a component in two, and merging two into one, so that moments are kept.

Shapes: C components, F features.
Source: Zhang, Chen, Sun and Chan 2003, EM algorithms for Gaussian mixtures with split-and-merge operation, sec. 3: the
halves and the whole have the same weight, mean and covariance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixtura.core.gaussian import Gaussians

__all__ = ["merge_components", "replace_component", "split_component"]

APART = 0.75  # how far the halves' means move, in standard deviations along the axis


def split_component(
    gaussians: Gaussians, component: int, *, direction: Tensor | None = None, apart: float = APART
) -> Gaussians:
    """The mixture with one component split in two halves, which take its place and the last one.

    Args:
        gaussians: of any kind; tied halves share the covariance that all share, so there moments are not kept.
        component: which.
        direction: to split along, shape (F,); the longest axis by default (the widest feature for diag and spherical).
        apart: distance of each half's mean from the old one in standard deviations along it, between 0 and 1.
    Returns:
        A mixture of C + 1 components with, but for tied and spherical, the same mean and covariance.
    Raises:
        ValueError: no such component, or ``apart`` outside (0, 1).
    """
    _check(gaussians, component)
    if not 0 < apart < 1:
        raise ValueError(f"apart must be between 0 and 1, got {apart}")
    sigma_FF = gaussians.full_covariances()[component]
    if direction is None:
        if gaussians.covariance in ("full", "tied"):
            # Of the correlation matrix: the longest axis should not depend on units.
            spread_F = sigma_FF.diagonal().sqrt()
            direction = spread_F * torch.linalg.eigh(sigma_FF / spread_F[:, None] / spread_F).eigenvectors[:, -1]
        else:
            direction = torch.eye(gaussians.n_features, dtype=sigma_FF.dtype)[int(sigma_FF.diagonal().argmax())]
    # The step s along v with Sigma - s s' still positive: s = apart * v / sqrt(v' P v).
    upper_FF = torch.linalg.cholesky(sigma_FF)
    length = torch.linalg.solve_triangular(upper_FF, direction[:, None], upper=False).norm()
    step_F = apart * direction / length
    rest_FF = sigma_FF - torch.outer(step_F, step_F)
    halves = []
    for sign in (1.0, -1.0):
        halves.append((gaussians.weights[component] / 2, gaussians.means[component] + sign * step_F))
    means_CF = torch.cat([gaussians.means, halves[1][1][None]])
    means_CF[component] = halves[0][1]
    weights_C = torch.cat([gaussians.weights, halves[1][0][None]])
    weights_C[component] = halves[0][0]
    sigma = gaussians.covariances
    if gaussians.covariance != "tied":
        one = {"full": rest_FF, "diag": rest_FF.diagonal(), "spherical": rest_FF.diagonal().mean()}[
            gaussians.covariance
        ]
        sigma = torch.cat([sigma, one[None]])
        sigma[component] = one
    return Gaussians.build(weights_C, means_CF, sigma, gaussians.covariance)


def merge_components(gaussians: Gaussians, first: int, second: int) -> Gaussians:
    """The mixture with two components merged into one of their common moments, in the place of the lower number.

    Raises:
        ValueError: no such components, or the same twice.
    """
    _check(gaussians, first)
    _check(gaussians, second)
    if first == second:
        raise ValueError(f"first and second must be different components, got {first} twice")
    keep, gone = sorted((first, second))
    pair = [keep, gone]
    weight = gaussians.weights[pair].sum()
    if not weight > 0:
        raise ValueError(f"components {keep} and {gone} have no weight, so they have no common moments")
    mean_F, sigma_FF = gaussians.pick(pair).moments()
    return replace_component(gaussians, keep, weight, mean_F, sigma_FF, without=gone)


def replace_component(
    gaussians: Gaussians,
    component: int,
    weight: Tensor,
    mean: Tensor,
    covariance: Tensor,
    *,
    without: int | None = None,
) -> Gaussians:
    """The mixture with another component in the place of one, and one left out; weights as given, not rescaled.

    Args:
        gaussians: of any kind; a tied covariance stays as it is.
        component: whose place is taken.
        weight, mean, covariance: of the new one, scalar, shape (F,) and (F, F); a diag or spherical kind keeps its part.
        without: component that is left out.
    """
    keep = [c for c in range(gaussians.n_components) if c != without]
    weights_C, means_CF = gaussians.weights.clone(), gaussians.means.clone()
    weights_C[component], means_CF[component] = weight, mean
    sigma = gaussians.covariances
    if gaussians.covariance != "tied":
        sigma = sigma.clone()
        diagonal = covariance.diagonal()
        sigma[component] = {"full": covariance, "diag": diagonal, "spherical": diagonal.mean()}[gaussians.covariance]
        sigma = sigma[keep]
    return Gaussians.build(weights_C[keep], means_CF[keep], sigma, gaussians.covariance)


def _check(gaussians: Gaussians, component: int) -> None:
    if not 0 <= component < gaussians.n_components:
        raise ValueError(f"component must be between 0 and {gaussians.n_components - 1}, got {component}")
