"""What the claim compares is equal where it says so, and kept apart where it must be."""

import pytest
import torch

from mixtura.claims import _moe_x_decoders as decoders
from mixtura.claims import moe_x as claim
from mixtura.data.superposed_concepts import SuperposedConcepts
from mixtura.lm.cost import model_size
from mixtura.lm.wide_sparse import WideSparseMoE


def matrices(layer):
    """Elements of the matrices that one token is multiplied with."""
    if isinstance(layer, WideSparseMoE):
        experts = layer.experts
        return (experts.up_proj.numel() + experts.down_proj.numel()) * claim.ACTIVE // claim.EXPERTS
    return layer.up.numel() + layer.down.numel()


def test_all_layers_multiply_a_token_with_equally_many_weights_and_the_control_with_four_times_as_many():
    sizes = claim.SIZES["cpu"]
    found = {name: matrices(claim._layer(sizes, arm, 0)) for name, arm in claim.ARMS.items()}
    assert len(set(found.values())) == 1, found
    assert matrices(claim._layer(sizes, claim.WIDE, 0)) == 4 * found["moe_x"]


def test_all_layers_start_with_matrices_of_one_size():
    for arm in (*claim.ARMS.values(), claim.WIDE):
        for name, p in claim._layer(claim.SIZES["cpu"], arm, 0).named_parameters():
            if "bias" not in name and not name.startswith("gate"):
                assert abs(p.std().item() / claim.START - 1) < 6 / (2 * p.numel()) ** 0.5, (arm, name)


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
def test_all_decoders_have_equal_active_parameters_but_for_a_learned_gate_and_output_biases(scale):
    sizes = claim.SIZES[scale].chess
    rows = decoders.Rows(*[torch.zeros(1, 2, dtype=torch.int64)] * 4, vocabulary=30, padded=True)
    found = {
        n: model_size(decoders._decoder(sizes, rows, n, 0)).active for n in decoders.DECODERS if n != "moe_x_upcycled"
    }
    extra = {"switch", "relu_only"}
    gate, bias = sizes.layers * 8 * sizes.width, sizes.layers * sizes.width
    assert found["dense_gelu"] == found["dense_relu"]
    for name in ("switch", "relu_only", "moe_x"):
        assert found[name] == found["dense_gelu"] + bias + (gate if name in extra else 0)


def test_games_are_trained_on_or_held_out_and_the_parts_do_not_overlap(monkeypatch):
    seen = {}
    monkeypatch.setattr(decoders, "_arms", lambda sizes, rows, seed: seen.update(rows=rows) or ({}, {}))
    with pytest.raises(KeyError):
        decoders.chess(claim.SIZES["smoke"].chess, 0)
    rows = seen["rows"]
    parts = [{tuple(row) for row in part.tolist()} for part in (rows.train, rows.choose, rows.fit, rows.test)]
    assert all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == claim.SIZES["smoke"].chess.games


def test_the_rate_is_chosen_by_error_and_the_probe_is_measured_on_other_inputs():
    assert len({claim.CHOOSE, claim.FIT, claim.TEST}) == 3 and max(claim.CHOOSE, claim.FIT, claim.TEST) < 0
    sizes, task = claim.SIZES["smoke"], SuperposedConcepts(seed=0)
    layer = claim._layer(sizes, claim.ARMS["moe_x"], 0)
    row = claim._measured(layer, task, sizes)
    # Best of 1,024 units on the data it was chosen on: higher than on other data, by chance alone.
    assert row["coverage"] < row["fitted"]
    assert row["shuffled"] < row["coverage"]
