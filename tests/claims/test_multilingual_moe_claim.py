"""Parts of the claim of multilingual-moe, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from mixtura.claims import _multilingual_runs as runs
from mixtura.claims import multilingual_moe as claim
from mixtura.core.gates import Routing


def routing(indices, n_experts):
    flat = torch.tensor(indices).view(-1, 1)
    logits = torch.zeros(len(flat), n_experts)
    return Routing(weights=torch.ones(flat.shape), indices=flat, logits=logits, probs=logits)


def test_a_curve_meets_a_loss_between_its_points():
    curve = {0.5: 3.0, 0.7: 2.6, 1.0: 2.0}
    assert claim.reached(curve, 2.8) == pytest.approx(0.6)
    assert claim.reached(curve, 2.3) == pytest.approx(0.85)
    assert claim.reached(curve, 3.5) == 0.5 and claim.reached(curve, 1.9) == math.inf


def test_tokens_without_a_place_are_counted_by_quarter_and_padding_is_not():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.tensor([[5, 5, -100, -100], [5, -100, -100, -100]])
    out = SimpleNamespace(
        encoder_routing=(routing([[0, 2, 1, 2], [2, 0, 2, 2]], 2),),  # index 2: no place, or padding
        decoder_routing=(routing([[2, 1, 2, 2], [0, 2, 2, 2]], 2),),
    )
    drops = runs.Drops.none()
    drops.add(out, {"attention_mask": mask, "labels": labels}, 4)
    assert drops.came.tolist() == [4, 3, 1, 1]
    assert drops.lost.tolist() == [2, 1, 0, 1]
    assert drops.shares() == pytest.approx([1 / 2, 1 / 3, 0, 1])


def test_arms_train_on_the_same_rows_and_are_measured_on_others():
    sizes = runs.SIZES["smoke"]
    data = runs.load_data(sizes, 0)
    batch, again = data.train.batch_at(3), runs.load_data(sizes, 0).train.batch_at(3)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    seen = {tuple(row.tolist()) for part in data.train.pairs.values() for row in part[1]}
    for held in (data.choose, data.test):
        for labels in (row for part in held for row in part["labels"]):
            assert tuple(labels[(labels >= 0)][:-1].tolist()) not in seen
    assert {len(part["labels"]) for part in data.language} == {2 * sizes.held}  # one language: translated and repaired


def test_dense_and_experts_differ_in_their_experts_alone():
    sizes = runs.SIZES["smoke"]
    data = runs.load_data(sizes, 0)
    dense, experts = (runs.new_model(sizes, data, n, 0, "random").state_dict() for n in (0, sizes.experts))
    shared = set(dense) & set(experts)
    assert all(dense[name].shape == experts[name].shape for name in shared)
    assert {name for name in dense if name not in shared} == {
        f"{half}.layers.1.mlp.{part}_proj.weight" for half in ("encoder", "decoder") for part in ("gate", "up", "down")
    }
