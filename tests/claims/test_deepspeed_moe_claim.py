"""What the claim compares is equal where it says so, and the figures follow from the runs."""

from dataclasses import replace

import pytest
import torch

from mixtura.claims import deepspeed_moe as claim
from mixtura.claims._window_model import WindowModel


def size(shape, sizes):
    return sum(p.numel() for p in WindowModel(replace(sizes.window, blocks=shape), 0).parameters())


def test_the_pyramid_has_about_half_the_parameters_of_the_standard_mixture():
    sizes = claim.SIZES["cpu"]
    assert size(claim.PYRAMID, sizes) / size(claim.ARMS["moe_16"], sizes) < 0.55
    assert size(claim.STUDENT, sizes) < size(claim.PYRAMID, sizes)


def test_no_arm_drops_a_token_and_a_single_gate_is_not_made_one():
    window = claim.SIZES["cpu"].window
    for shape in (*claim.ARMS.values(), *claim.HALVES.values(), claim.STUDENT):
        for layer in WindowModel(replace(window, blocks=shape), 0).layers:
            if hasattr(layer, "gate"):
                assert layer.gate.config.capacity_factor == layer.gate.config.eval_capacity_factor == 0
                assert layer.gate.config.renormalise == (layer.gate.config.k == 2)


def test_held_out_windows_are_not_trained_on_and_the_two_halves_do_not_overlap():
    text = claim._text(claim.SIZES["smoke"], seed=0)
    chosen, tested = ({tuple(row.tolist()) for row in rows} for rows in (text.choose, text.test))
    assert chosen and tested
    # Windows of six tokens may stand in two documents by chance, above all in sums; most must not.
    assert len(chosen & tested) < 0.2 * len(tested)
    batch = claim._batch(text, 0, claim.SIZES["smoke"], seed=0)
    assert torch.equal(batch, claim._batch(text, 0, claim.SIZES["smoke"], seed=0))
    assert not torch.equal(batch, claim._batch(text, 1, claim.SIZES["smoke"], seed=0))


def test_what_decoding_reads_is_all_but_the_experts_that_nobody_visits():
    sizes = claim.SIZES["smoke"]
    shape = claim.PYRAMID
    model = WindowModel(replace(sizes.window, blocks=shape), 0)
    with torch.no_grad():
        for layer in model.layers:
            if hasattr(layer, "gate"):
                layer.gate.weight.zero_()  # all go to expert 0: 3 and 7 experts are not read
    text = claim._text(sizes, seed=0)
    total = sum(p.numel() for p in model.parameters())
    assert claim._read(model, text.test) == total - 10 * 3 * 16 * 16


@pytest.mark.parametrize("stop", [0.5, 1.0])
def test_a_taught_student_learns_something_else_than_an_untaught_one(stop):
    sizes = claim.SIZES["smoke"]
    text = claim._text(sizes, seed=0)
    teacher = WindowModel(replace(sizes.window, blocks=claim.PYRAMID), 7)
    plain = claim._trained(sizes, text, claim.STUDENT, 1e-2, 0)
    none = claim._trained(sizes, text, claim.STUDENT, 1e-2, 0, claim.Teacher(teacher, 0.0))
    taught = claim._trained(sizes, text, claim.STUDENT, 1e-2, 0, claim.Teacher(teacher, stop))
    assert torch.equal(plain.embed, none.embed) and not torch.equal(plain.embed, taught.embed)
