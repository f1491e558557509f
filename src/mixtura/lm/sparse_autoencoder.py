"""A small sparse autoencoder, trained afterwards on a dense model's hidden vectors: what readable layers are compared with.

    z = the k largest entries of relu(W_e (h - b)),  h' = W_d z + b,  loss = |h - h'|^2

Columns of W_d have length 1, so that an entry of z says how much of its direction is there.

Shapes: N vectors, C their width, U latents.
Source: Gao et al. 2024 (2406.04093), eq. 1-3, without its auxiliary loss for latents that never fire.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixtura.core.training import TrainConfig, fit

__all__ = ["SparseAutoencoder", "fit_autoencoder"]


class SparseAutoencoder(nn.Module):
    """Autoencoder of which k of U latents are active at a time, (N, C) -> (N, C).

    Args:
        width: C.
        latents: U.
        k: active latents of a vector.
        generator: source of chance for the start.
    Raises:
        ValueError: k outside [1, U].
    """

    def __init__(self, width: int, latents: int, k: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not 1 <= k <= latents:
            raise ValueError(f"k must be between 1 and latents={latents}, got {k}")
        self.k = k
        directions = F.normalize(torch.randn(latents, width, generator=generator), dim=1)
        self.encoder = nn.Parameter(directions.clone())
        self.decoder = nn.Parameter(directions.clone())  # rows are W_d's columns
        self.centre = nn.Parameter(torch.zeros(width))

    def encode(self, h: Tensor) -> Tensor:
        """Latents (N, U), at most k of them above 0."""
        z_NU = F.relu((h - self.centre) @ self.encoder.T)
        top = z_NU.topk(self.k, dim=-1)
        return torch.zeros_like(z_NU).scatter(-1, top.indices, top.values)

    def decode(self, z: Tensor) -> Tensor:
        """(N, U) -> (N, C)."""
        return z @ F.normalize(self.decoder, dim=1) + self.centre

    def forward(self, h: Tensor) -> Tensor:
        return self.decode(self.encode(h))


def fit_autoencoder(
    vectors_at: Callable[[int], Tensor],
    latents: int,
    k: int,
    config: TrainConfig,
    *,
    generator: torch.Generator | None = None,
) -> SparseAutoencoder:
    """Train an autoencoder on vectors that come batch by batch.

    Args:
        vectors_at: step -> vectors (N, C), without gradient.
        latents, k: see `SparseAutoencoder`.
        config: steps and rate.
        generator: source of chance for the start.
    Returns:
        The autoencoder, whose loss was the squared error over the variance of each batch.
    """
    first = vectors_at(0)
    model = SparseAutoencoder(first.shape[1], latents, k, generator=generator).to(first.device)
    with torch.no_grad():
        model.centre.copy_(first.mean(0))

    def loss_at(step: int) -> Tensor:
        h_NC = vectors_at(step)
        return F.mse_loss(model(h_NC), h_NC) / h_NC.var(0, correction=0).mean().clamp(min=1e-12)

    fit(model, loss_at, config, label=f"autoencoder k={k}")
    return model.eval()
