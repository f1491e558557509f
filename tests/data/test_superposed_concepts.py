import pytest
import torch

from mixtura.data.superposed_concepts import SuperposedConcepts


def test_inputs_and_targets_are_sums_over_the_shown_concepts():
    task = SuperposedConcepts(seed=3)
    x, y, shown = task.batch(0, 200)
    into, out = task._directions
    # In double precision 64 dimensions tell the few shown concepts' strengths exactly.
    for n in range(200):
        own = into[shown[n]].double()
        strength = torch.linalg.lstsq(own.T, x[n].double()[:, None]).solution[:, 0] if len(own) else own.new_zeros(0)
        assert ((strength > 0.49) & (strength < 1.51)).all()
        torch.testing.assert_close((strength @ own).float(), x[n], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(((2 * strength).tanh() @ out[shown[n]].double()).float(), y[n], rtol=1e-4, atol=1e-4)


def test_an_input_shows_two_topics_and_four_concepts_on_average():
    _, _, shown = SuperposedConcepts().batch(1, 20_000)
    topics = shown.view(-1, 16, 12).any(-1).sum(1)
    assert topics.max() == 2
    # Five standard errors: the count is binomial, 24 places of 1/6, variance 10/3.
    assert abs(shown.sum(1).float().mean() - 4.0) < 5 * (10 / 3 / 20_000) ** 0.5
    assert (shown.float().mean(0) - 4 / 192).abs().max() < 6 * (4 / 192 / 20_000) ** 0.5


def test_a_layer_drawn_from_the_same_seed_does_not_start_with_the_directions():
    for seed in (0, 1, 2):
        start = torch.randn(2048, 64, generator=torch.Generator().manual_seed(seed))
        into = SuperposedConcepts(seed=seed)._directions[0]
        cosine = torch.nn.functional.normalize(into, dim=1) @ torch.nn.functional.normalize(start, dim=1).T
        assert cosine.max() < 0.7  # the largest of 400,000 random ones is near 0.57


def test_the_same_step_gives_the_same_batch_and_another_step_or_seed_another():
    first = SuperposedConcepts(seed=1).batch(4, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, SuperposedConcepts(seed=1).batch(4, 8), strict=True))
    assert not torch.equal(first[0], SuperposedConcepts(seed=1).batch(5, 8)[0])
    assert not torch.equal(first[0], SuperposedConcepts(seed=2).batch(4, 8)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topics": 7}, "topics must divide concepts=192, got 7"),
        ({"shown_topics": 17}, "shown_topics must be between 1 and topics=16, got 17"),
        ({"shown": 25.0}, "shown must be above 0 and at most 24"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SuperposedConcepts(**options)
