import pytest
import torch
from torch.nn import functional as F

from mixtura.data.concept_mixture import ConceptMixture


def test_a_target_is_the_common_map_and_the_shown_concepts_own_one_by_one():
    task = ConceptMixture(width=6, content=4, concepts=5, shown=2, common=3, rank=2, seed=3)
    maps = task._maps
    c = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[0, 1], [4, 2], [3, 0], [1, 2], [2, 3], [0, 4], [1, 4]])
    x, y = task._input(c, chosen), task._target(c, chosen)
    for n in range(7):
        want = maps["common_out"] @ F.relu(maps["common_in"] @ c[n])
        shown = maps["place"] @ c[n]
        for k in chosen[n]:
            want = want + maps["own_out"][k] @ F.relu(maps["own_in"][k] @ c[n])
            shown = shown + maps["keys"][k]
        torch.testing.assert_close(y[n], want)
        torch.testing.assert_close(x[n], shown)


def test_the_same_step_gives_the_same_batch_and_another_step_or_seed_another():
    first = ConceptMixture(seed=1).batch(4, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, ConceptMixture(seed=1).batch(4, 8), strict=True))
    assert not torch.equal(first[0], ConceptMixture(seed=1).batch(5, 8)[0])
    assert not torch.equal(first[0], ConceptMixture(seed=2).batch(4, 8)[0])


def test_more_concepts_shown_than_there_are_is_refused():
    with pytest.raises(ValueError, match="shown must be between 1 and concepts=2, got 3"):
        ConceptMixture(concepts=2)


def test_a_layer_that_starts_from_the_same_seed_does_not_know_the_keys():
    for seed in range(4):
        keys = ConceptMixture(seed=seed)._maps["keys"]
        start = torch.randn(4096, 64, generator=torch.Generator().manual_seed(seed))
        cosine = F.normalize(keys, dim=1) @ F.normalize(start, dim=1).T
        assert cosine.max() < 0.7  # the largest of 100,000 random ones is near 0.55
