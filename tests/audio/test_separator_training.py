"""Training on mixtures: batches, losses, what is learned, what is refused."""

import pytest
import torch

from mixtura.audio import NamedSounds, NoiseInvariantLoss, QuerySeparator
from mixtura.audio.separate import Mixing, fit_from_text, fit_from_video, fit_separator, query_loss, si_sdr
from mixtura.audio.separate.training import _drawn, mixture_loss
from mixtura.core.spectrum import loudness_weight, mask_targets
from mixtura.core.training import TrainConfig


def small(dim: int = 2, **changes) -> QuerySeparator:
    torch.manual_seed(0)
    shape = {
        "maps": 4,
        "depth": 2,
        "width": 8,
        "bands": 24,
        "sample_rate": 8000,
        "n_fft": 256,
        "hop": 128,
        "spread": 3.0,
    }
    return QuerySeparator(dim, **(shape | changes))


def tones(n: int, seed: int = 0):
    """Low tones are "hum", high ones are "beep"."""
    rng = torch.Generator().manual_seed(seed)
    t = torch.arange(4000) / 8000
    names = ["hum" if i % 2 else "beep" for i in range(n)]
    pitch = torch.rand(n, generator=rng) * 0.2 + 1
    base = torch.tensor([250.0 if name == "hum" else 1600.0 for name in names])
    return 0.05 * torch.sin(2 * torch.pi * (base * pitch)[:, None] * t), names


CONFIG = TrainConfig(steps=60, lr=1e-2, weight_decay=0.0)


def test_a_mixture_is_the_sum_of_its_sources_and_targets_are_theirs():
    model, (waves, _) = small().eval(), tones(4)
    sources, query = waves.reshape(2, 2, -1), torch.randn(2, 2, 2)
    parts = model.magnitude_bands(model.spectrum(sources))
    mixture = model.magnitude_bands(model.spectrum(sources.sum(1)))
    want = query_loss(model(sources.sum(1), query), mask_targets(parts, mixture), loudness_weight(mixture))
    torch.testing.assert_close(mixture_loss(model, sources, query, None), want)
    asked, noise = model(sources.sum(1), query, noise=True)
    want = NoiseInvariantLoss()(asked, noise, mask_targets(parts, mixture), loudness_weight(mixture))
    torch.testing.assert_close(mixture_loss(model, sources, query, NoiseInvariantLoss()), want)


def test_clips_of_one_group_never_meet_and_no_clip_meets_itself():
    rng = torch.Generator().manual_seed(0)
    groups = torch.tensor([0, 0, 0, 1, 2, 2])
    rows = _drawn(6, Mixing(batch=200), [torch.nonzero(groups == g)[:, 0] for g in range(3)], rng)
    assert bool((groups[rows[:, 0]] != groups[rows[:, 1]]).all())
    assert set(rows.flatten().tolist()) == set(range(6))
    rows = _drawn(6, Mixing(batch=200, sources=3), None, rng)
    assert all(len(set(row.tolist())) == 3 for row in rows)


def test_asked_by_text_it_pulls_the_named_tone_out():
    waves, names = tones(12)
    tower = NamedSounds({"hum": [], "beep": []})
    model = small(text=tower)
    losses = fit_from_text(model, waves, names, tower, CONFIG, mixing=Mixing(batch=4, mask="ratio")).losses
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    new, _ = tones(2, seed=9)
    found = model.separate(new.sum(0), ["a beep", "the hum"])[:, 0]
    for estimate, source in zip(found, new, strict=True):
        assert float(si_sdr(estimate, source)) > 8  # the mixture has 0
    assert float(si_sdr(found[0], new[1])) < 0, "the other tone is not what was asked for"


def test_pictures_teach_with_and_without_noise_heads_and_noise_heads_rest_first():
    waves, names = tones(12)

    class Tower:
        dim = 2

        def embed_image(self, images):
            return torch.stack([images.mean((1, 2)), 1 - images.mean((1, 2))], 1)

        def embed_text(self, texts):
            raise AssertionError("no text may be read in training")

    frames = torch.tensor([float(name == "hum") for name in names])[:, None, None, None].expand(-1, 3, 4, 4)
    models = {}
    for name, warmup in (("query", 0.5), ("noise-invariant", 1.0), ("woken", 0.5)):
        models[name] = small()
        objective = "noise-invariant" if name == "woken" else name
        config = TrainConfig(steps=6, lr=1e-2, weight_decay=0.0)
        fit_from_video(models[name], waves, frames, Tower(), config, objective=objective, mixing=Mixing(warmup=warmup))
    weights = {name: model.state_dict() for name, model in models.items()}
    assert all(torch.equal(weights["query"][key], value) for key, value in weights["noise-invariant"].items())
    assert not torch.equal(weights["woken"]["noise.0.weight"], weights["query"]["noise.0.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"waves": torch.zeros(4, 100)}, "4 of 4 clips are silent"),
        ({"waves": torch.full((4, 100), torch.nan)}, "NaN or infinity"),
        ({"embeddings": torch.ones(4, 3)}, "width 3, this separator takes 2"),
        ({"embeddings": torch.ones(3, 2)}, "got .4, 100. and .3, 2."),
        ({"groups": torch.zeros(4)}, "needs as many kinds of clips, got 1"),
        (
            {"objective": NoiseInvariantLoss(), "mixing": Mixing(sources=3)},
            "3 sources, and the separator 2 noise heads",
        ),
    ],
)
def test_bad_input_is_named(change, message: str):
    given = {"waves": torch.ones(4, 100), "embeddings": torch.ones(4, 2)} | change
    with pytest.raises(ValueError, match=message):
        fit_separator(small(), given.pop("waves"), given.pop("embeddings"), CONFIG, **given)


def test_a_mixture_needs_two_sources():
    with pytest.raises(ValueError, match="sources at least 2, got 16 and 1"):
        Mixing(sources=1)
