"""What the claim compares is equal where it says so, and kept apart where it must be."""

import pytest

from mixtura.claims import deepseek_moe as claim
from mixtura.lm.anatomy import find_moe


def experts(blocks):
    """Parameters of routed and shared experts: all, and those of one token."""
    total = active = 0
    for block in blocks:
        routed = sum(p.numel() for p in block.experts.parameters())
        shared = sum(p.numel() for module in block.shared for p in module.parameters())
        total += routed + shared
        active += routed * block.k // block.n_experts + shared
    return total, active


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
def test_all_decoders_have_equal_expert_parameters_in_all_and_a_token(scale):
    sizes = claim.SIZES[scale]
    found = {name: experts(find_moe(claim._decoder(sizes, arm, 0))) for name, arm in claim.ARMS.items()}
    assert len(set(found.values())) == 1, found
    assert find_moe(claim._decoder(sizes, claim.ARMS["deepseek"], 0))[0].k == 7


def test_all_layers_of_the_concepts_have_equal_expert_parameters():
    sizes = claim.SIZES["cpu"]
    found = set()
    for arm in claim.ARMS.values():
        layer = claim._layer(sizes, arm, 0)
        shared = sum(p.numel() for p in layer.shared.parameters()) if layer.shared is not None else 0
        routed = sum(p.numel() for p in layer.experts.parameters())
        found.add((routed + shared, routed * layer.gate.config.k // layer.gate.n_experts + shared))
    assert len(found) == 1


def test_held_out_rows_are_not_trained_on_and_the_two_halves_do_not_overlap():
    text = claim._rows(claim.SIZES["smoke"], seed=0)
    trained = {tuple(row.tolist()) for rows in text.train.values() for row in rows}
    chosen, tested = ({tuple(row.tolist()) for row in rows} for rows in (text.choose, text.test))
    assert trained and chosen and tested
    assert not trained & chosen and not trained & tested and not chosen & tested


def test_the_better_form_of_a_rival_is_chosen_without_looking_at_the_test():
    arms = {"a": {"choose": 1.0, "test": 9.0}, "b": {"choose": 2.0, "test": 0.0}}
    assert claim._better(arms, "a", "b")["test"] == 9.0
