import pytest
import torch
from torch.nn import functional as F

from mixtura.core.training import TrainConfig
from mixtura.lm.sparse_autoencoder import SparseAutoencoder, fit_autoencoder


def test_at_most_k_latents_are_active_and_they_are_the_largest():
    model = SparseAutoencoder(8, 32, 3, generator=torch.Generator().manual_seed(0))
    h = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    z = model.encode(h)
    full = F.relu((h - model.centre) @ model.encoder.T)
    for got, all_ in zip(z, full, strict=True):
        kept = got.nonzero().flatten()
        assert len(kept) <= 3
        torch.testing.assert_close(got[kept].sort().values, all_.sort().values[-3:][-len(kept) :])
    torch.testing.assert_close(model(h), model.decode(z))


def test_directions_that_vectors_are_made_of_are_found():
    draw = torch.Generator().manual_seed(0)
    true = F.normalize(torch.randn(12, 16, generator=draw), dim=1)

    def vectors_at(step):
        own = torch.Generator().manual_seed(step)
        shown = torch.rand(256, 12, generator=own) < 0.1
        return (shown * (0.5 + torch.rand(256, 12, generator=own))) @ true

    model = fit_autoencoder(vectors_at, 48, 2, TrainConfig(steps=400, lr=5e-3, weight_decay=0.0), generator=draw)
    found = (true @ F.normalize(model.decoder, dim=1).T).max(1).values
    start = true @ F.normalize(SparseAutoencoder(16, 48, 2, generator=draw).decoder, dim=1).T
    assert found.median() > 0.95 > 0.8 > start.max(1).values.median()


def test_k_out_of_range_is_named():
    with pytest.raises(ValueError, match="k must be between 1 and latents=4, got 5"):
        SparseAutoencoder(2, 4, 5)
