"""Mixtures of streams: statistics that forget slowly, batch by batch.

The mean statistics a sample move a little towards each batch's, by a step (t + 2)^-0.6, and the mixture maximises them.
The statistics move with the coordinates, which follow the centre and spread of everything seen so far, so neither the
scale nor the place of the first batch matters.

Source: Cappé and Moulines 2009, Online expectation-maximization algorithm for latent data models, eq. 10-11 and sec. 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mixtura.core.gaussian import Gaussians
from mixtura.core.natural_form import Frame
from mixtura.core.sufficient import Statistics
from mixtura.density.em import Samples, expect, improve
from mixtura.density.missing import second_of
from mixtura.density.sources import Summary

__all__ = ["Stream", "begin", "implied_statistics", "proceed"]

POWER, DELAY = 0.6, 2


@dataclass(frozen=True)
class Stream:
    """What is kept between batches.

    Attributes:
        statistics: mean a sample, in the coordinates of ``frame``; their weights sum to 1.
        frame: those coordinates.
        summary: of all samples seen.
        n_batches: batches seen.
    """

    statistics: Statistics
    frame: Frame
    summary: Summary
    n_batches: int


def implied_statistics(gaussians: Gaussians) -> Statistics:
    """The mean statistics a sample of a mixture's own samples."""
    w_C, mu_CF = gaussians.weights, gaussians.means
    second_CFF = gaussians.full_covariances() + mu_CF[:, :, None] * mu_CF[:, None, :]
    second = second_of(w_C[:, None, None] * second_CFF, gaussians.covariance)
    return Statistics(w_C.clone(), w_C[:, None] * mu_CF, second, torch.zeros((), dtype=torch.float64))


def begin(samples: Samples, start: Gaussians, summary: Summary) -> tuple[Stream, Gaussians]:
    """The stream after its first batch, and the mixture, in the frame of ``samples``."""
    found = expect(samples, start).scaled(1 / samples.weight)
    gaussians, _ = improve(replace(samples, weight=1.0), start, found, 0, None)
    return Stream(found, samples.frame, summary, 1), gaussians


def proceed(stream: Stream, samples: Samples, gaussians: Gaussians, summary: Summary) -> tuple[Stream, Gaussians]:
    """The stream after another batch.

    Args:
        stream: before the batch.
        samples: the batch, with the frame of all samples up to it.
        gaussians: the mixture before the batch, in the frame of ``samples``.
        summary: of all samples up to the batch.
    """
    old, new = stream.frame, samples.frame
    moved = stream.statistics.mapped(old.scale / new.scale, (old.centre - new.centre) / new.scale, samples.covariance)
    step = (stream.n_batches + DELAY) ** -POWER
    found = moved.scaled(1 - step) + expect(samples, gaussians).scaled(step / samples.weight)
    gaussians, _ = improve(replace(samples, weight=1.0), gaussians, found, 0, None)
    return Stream(found, new, summary, stream.n_batches + 1), gaussians
