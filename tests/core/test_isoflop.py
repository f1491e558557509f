"""Equal cost: multiply-adds counted by hand and by torch, for every member, over random networks."""

import itertools
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mixtura.core.flops import WeightCost, count_flops
from mixtura.core.isoflop import (
    IsoFlop,
    active_counts,
    branches,
    convert,
    doped_rank,
    factorized_rank,
    scaled_width,
    widen,
    widening,
)
from mixtura.core.sparse_layers import Between, DopedSparse, ParallelSparse, SparseLinear, draw_mask, masked_parameters

SPARSITIES = (0.0, 0.5, 0.75, 0.9)


def perceptron(width: int, inputs: int = 20, depth: int = 2) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(inputs if i == 0 else width, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 5))


class Residual(nn.Module):
    """A stem, a strided block with a shortcut, a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.first = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, stride=2, bias=False)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = self.second(self.first(x).relu()) + self.shortcut(x)
        return self.head(x.mean((2, 3)))


def test_multiply_adds_are_those_counted_by_hand():
    report = count_flops(Residual(4), torch.zeros(2, 1, 8, 8))
    by_hand = {
        "stem.weight": 2 * 64 * 4 * 9,
        "first.weight": 2 * 16 * 8 * 4 * 9,
        "second.weight": 2 * 16 * 8 * 8 * 9,
        "shortcut.weight": 2 * 16 * 8 * 4,
        "head.weight": 2 * 5 * 8,
    }
    assert {name: cost.dense for name, cost in report.weights.items()} == by_hand
    assert report.dense == report.total == sum(by_hand.values()) and report.other == 0
    assert report.order == ("stem", "first", "second", "shortcut", "head")


def test_a_dense_network_counts_as_torch_counts_it():
    net, x = perceptron(16), torch.zeros(3, 20)
    with FlopCounterMode(display=False) as counter:
        net.eval()(x)
    assert 2 * count_flops(net, x).total == counter.get_total_flops()


def test_attention_scores_are_counted():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    assert count_flops(Attention(), torch.zeros(2, 3, 10, 4)).other == 2 * (2 * 3 * 10 * 10 * 4)


def test_a_mask_saves_its_share_and_a_training_step_follows_the_formula():
    net = nn.Sequential(SparseLinear(8, 4), nn.Linear(4, 2))
    net[0].set_mask(draw_mask((4, 8), 8))
    report = count_flops(net, torch.zeros(1, 8))
    assert (report.dense, report.total) == (40, 16)
    assert report.training_step() == 48
    assert report.training_step(100) == (3 * 16 * 100 + 2 * 16 + 40) / 101


def test_counting_leaves_mode_and_statistics_alone():
    net = perceptron(8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    count_flops(net, torch.randn(4, 20))
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_sizes_follow_the_papers_formulas():
    assert [round(widening(s), 2) for s in (0.5, 0.75, 0.9)] == [1.41, 2.0, 3.16]
    assert [branches(s) for s in SPARSITIES] == [1, 2, 4, 10]
    for inputs, outputs, s in itertools.product((9 * 16, 64), (16, 40), (0.5, 0.75, 0.9)):
        d = factorized_rank(inputs, outputs, s)
        assert d * (inputs + outputs) * (1 - s) >= inputs * outputs > (d - 1) * (inputs + outputs) * (1 - s)
        d = doped_rank(inputs, outputs, s)
        assert d * (inputs + outputs) <= s * inputs * outputs < (d + 1) * (inputs + outputs)
    assert scaled_width(16, 0.5) == 23 and scaled_width(16, 0.5, multiple_of=8) == 24


@pytest.mark.parametrize("member", ["parallel", "factorized", "doped"])
@pytest.mark.parametrize("s", SPARSITIES)
def test_a_converted_network_costs_what_the_dense_one_costs_to_one_weight(member: str, s: float):
    for seed, net, x in (
        (0, perceptron(33, inputs=21), torch.zeros(1, 21)),
        (1, perceptron(40, depth=3), torch.zeros(2, 20)),
        (2, Residual(8), torch.zeros(1, 1, 10, 10)),
    ):
        want = count_flops(net, x).total
        made = convert(
            net, IsoFlop(member, s), example_input=x, generator=torch.Generator().manual_seed(seed), fresh=True
        )
        report = count_flops(made, x)
        masks = masked_parameters(made)
        assert (not masks) == (s == 0)
        # Below by less than one weight of the cheapest layer; a doped layer's rank is not masked.
        finest = min((report.weights[n].each for n in masks), default=1.0)
        assert 0 <= want - report.total < finest
        assert abs(report.total / want - 1) < 0.001
        assert made(x.repeat(2, *[1] * (x.dim() - 1))).isfinite().all()


@pytest.mark.parametrize("s", SPARSITIES)
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_a_widened_network_costs_what_the_dense_one_costs(s: float, distribution: str):
    for factory, width, x in (
        (lambda w: perceptron(w, inputs=40), 16, torch.zeros(1, 40)),
        (Residual, 12, torch.zeros(1, 1, 12, 12)),
    ):
        want = count_flops(factory(width), x).total
        transform = IsoFlop("wide", s, distribution=distribution)
        report = count_flops(widen(factory, transform, width=width, example_input=x), x)
        assert abs(report.total / want - 1) < 0.001


def test_the_density_of_the_card_comes_out():
    """196-16-16-16-10 at s = 0.75: inputs and head are not widened away, so 0.419 and not 0.25 of the weights are active."""
    net = widen(
        lambda w: perceptron(w, inputs=196, depth=3)[:-1].append(nn.Linear(w, 10)),
        IsoFlop("wide", 0.75),
        width=16,
        example_input=torch.zeros(1, 196),
    )
    assert [net[i].density for i in (0, 3, 6)] == pytest.approx([0.4192] * 3, abs=5e-4)
    assert not isinstance(net[-1], SparseLinear)


def test_layer_match_gives_the_nominal_density():
    x = torch.zeros(1, 20)
    made = convert(perceptron(40), IsoFlop("parallel", 0.75, match="layer"), example_input=x, fresh=True)
    assert isinstance(made[0], ParallelSparse)
    assert all(abs(layer.density - 0.25) < 0.01 for layer in made[0].layers)
    wide = widen(perceptron, IsoFlop("wide", 0.75, match="layer"), width=40, example_input=x)
    assert abs(wide[0].density - 0.25) < 0.01
    # Why it is not the default: input and head do not widen as k squared.
    assert abs(count_flops(wide, x).total / count_flops(perceptron(40), x).total - 1) > 0.05


def test_erk_keeps_small_layers_denser_and_full_ones_full():
    costs = {"small": WeightCost(100, 100, 100), "large": WeightCost(10_000, 10_000, 10_000)}
    counts = active_counts(costs, 2000, shapes={"small": (10, 10), "large": (100, 100)})
    # Densities as 20/100 to 200/10000, ten to one, if the small layer could hold so many.
    assert counts == {"small": 100, "large": 1900}
    counts = active_counts(costs, 550, shapes={"small": (10, 10), "large": (100, 100)})
    assert counts["small"] == 50 and counts["large"] == 500


def test_convolutions_with_other_strides_are_matched_in_multiply_adds_and_not_in_weights():
    costs = {"early": WeightCost(6400, 100, 100), "late": WeightCost(1600, 100, 100)}
    counts = active_counts(costs, 4000)
    assert 64 * counts["early"] + 16 * counts["late"] == 4000


def test_sparsity_zero_changes_nothing():
    net, x = perceptron(16).eval(), torch.randn(4, 20)
    for member in ("parallel", "factorized", "doped"):
        torch.testing.assert_close(convert(net, IsoFlop(member, 0.0), example_input=x)(x), net(x))
    wide = widen(perceptron, IsoFlop("wide", 0.0), width=16, example_input=x)
    assert [tuple(p.shape) for p in wide.parameters()] == [tuple(p.shape) for p in net.parameters()]
    assert all(bool(found.mask.all()) for found in masked_parameters(wide).values())


def test_a_doped_layer_keeps_the_largest_weights_and_the_best_low_rank_rest():
    net, x = perceptron(32), torch.randn(4, 20)
    made = convert(net, IsoFlop("doped", 0.5), example_input=x)
    doped, weight = made[3], net[3].weight.detach()
    assert isinstance(doped, DopedSparse)
    kept = doped.sparse.mask
    assert weight[kept].abs().min() >= weight[~kept].abs().max()
    rest = weight * ~kept
    left, values, right = torch.linalg.svd(rest)
    best = left[:, : doped.rank] @ torch.diag(values[: doped.rank]) @ right[: doped.rank]
    torch.testing.assert_close(doped.v.weight @ doped.u.weight, best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(doped.sparse.bias, net[3].bias)


def test_a_converted_trained_model_says_that_layers_start_anew(caplog: pytest.LogCaptureFixture):
    net, x = perceptron(16), torch.zeros(1, 20)
    with caplog.at_level(logging.WARNING):
        convert(net, IsoFlop("doped", 0.5), example_input=x)
        assert not caplog.records
        convert(net, IsoFlop("parallel", 0.5), example_input=x)
    assert "2 layers start anew: a trained dense layer has no parallel form" in caplog.text


def test_the_same_generator_gives_the_same_network_and_the_input_stays():
    net, x = perceptron(16), torch.zeros(1, 20)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    make = lambda seed: convert(  # noqa: E731
        net, IsoFlop("factorized", 0.5), example_input=x, generator=torch.Generator().manual_seed(seed), fresh=True
    )
    one, two, other = make(0).state_dict(), make(0).state_dict(), make(1).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one) and not torch.equal(one["0.u.weight"], other["0.u.weight"])
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_stem_head_skipped_and_grouped_layers_stay_dense(caplog: pytest.LogCaptureFixture):
    net = Residual(8)
    net.second = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
    with caplog.at_level(logging.INFO):
        made = convert(net, IsoFlop("doped", 0.5, skip=("short*",)), example_input=torch.zeros(1, 1, 8, 8), fresh=True)
    assert {n.partition(".")[0] for n in masked_parameters(made)} == {"first"}
    assert "second is a grouped convolution and stays dense" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"member": "thin"}, "member must be one of"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\)"),
        ({"member": "parallel", "sparsity": 0.6}, r"gives 2.5: take 0.5 \(2 branches\) or 0.6667 \(3\)"),
        ({"match": "loss"}, "match must be one of"),
        ({"distribution": "er"}, "distribution must be one of"),
        ({"n_m": (2, 4)}, r"n_m=\(2, 4\) fixes the density at 2/4"),
    ],
)
def test_a_transformation_is_checked(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        IsoFlop(**({"member": "wide", "sparsity": 0.75} | options))


def test_what_cannot_be_converted_is_named():
    x = torch.zeros(1, 20)
    with pytest.raises(ValueError, match="use widen"):
        convert(perceptron(8), IsoFlop("wide", 0.5), example_input=x)
    with pytest.raises(ValueError, match="use convert"):
        widen(perceptron, IsoFlop("doped", 0.5), width=8, example_input=x)
    with pytest.raises(ValueError, match="Linear has no linear layer or convolution before its last"):
        convert(nn.Linear(20, 4), IsoFlop("doped", 0.5), example_input=x)
    tied = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="0 and 1 share their weight"):
        convert(tied, IsoFlop("doped", 0.5), example_input=x)
    made = widen(lambda w: perceptron(w, inputs=40), IsoFlop("wide", 0.5), width=16, example_input=torch.zeros(1, 40))
    with pytest.raises(ValueError, match="0 is sparse already"):
        convert(made, IsoFlop("doped", 0.5), example_input=torch.zeros(1, 40))


def test_a_budget_that_the_dense_layers_alone_exceed_names_the_largest_sparsity():
    """20-w-5 with a head of 5 w: at width k w the head alone costs the dense network's 25 w from k = 5 on, s = 0.96."""
    factory = lambda w: perceptron(w, depth=1)  # noqa: E731
    with pytest.raises(ValueError, match=r"the largest sparsity that fits is 0\.9[56]"):
        widen(factory, IsoFlop("wide", 0.97), width=64, example_input=torch.zeros(1, 20))
    widen(factory, IsoFlop("wide", 0.95), width=64, example_input=torch.zeros(1, 20))


GROUPS = IsoFlop("wide", 0.5, match="layer", n_m=(2, 4))


def two_of_four(mask: torch.Tensor) -> bool:
    """Along the inputs, by a loop over groups: the second axis of a matrix and of a convolution."""
    columns = mask.transpose(0, 1)
    return all(bool((columns[i : i + 4].sum(0) == 2).all()) for i in range(0, len(columns), 4))


@pytest.mark.parametrize("member", ["parallel", "factorized", "doped"])
def test_two_of_four_masks_are_drawn_where_the_sparsity_is_a_half(member: str):
    transform = replace(GROUPS, member=member, between=Between(norm="none"))
    for net, x in ((perceptron(16), torch.zeros(1, 20)), (Residual(8), torch.zeros(1, 1, 8, 8))):
        made = convert(net, transform, example_input=x, fresh=True)
        masks = masked_parameters(made)
        assert masks and all(two_of_four(found.mask) for found in masks.values())
        # The rank of factorized layers is a whole number of groups, at most three more.
        assert count_flops(made, x).total < 1.3 * count_flops(net, x).total


def test_a_widened_network_has_groups_and_a_trained_doped_layer_keeps_the_largest_of_each():
    made = widen(perceptron, GROUPS, width=17, example_input=torch.zeros(1, 20), multiple_of=4)
    assert made[0].weight.shape == (24, 20) and all(two_of_four(f.mask) for f in masked_parameters(made).values())
    net = Residual(8)
    made = convert(net, replace(GROUPS, member="doped"), example_input=torch.zeros(1, 1, 8, 8))
    mask, sizes = made.second.sparse.mask, net.second.weight.detach().abs()
    assert two_of_four(mask)
    for i in range(0, 16, 4):
        kept = sizes[:, i : i + 4].masked_fill(~mask[:, i : i + 4], torch.inf).amin(1)
        assert bool((kept >= sizes[:, i : i + 4].masked_fill(mask[:, i : i + 4], 0).amax(1)).all())


def test_layers_that_groups_do_not_divide_and_other_densities_are_named():
    with pytest.raises(
        ValueError, match=r"4 does not divide the 21 inputs of 0.sparse.weight, \(16, 21\); leave the layer out by skip"
    ):
        convert(perceptron(16, 21), replace(GROUPS, member="doped"), example_input=torch.zeros(1, 21), fresh=True)
    with pytest.raises(ValueError, match=r"4 does not divide the 18 inputs of 3.weight, .*multiple_of"):
        widen(perceptron, GROUPS, width=13, example_input=torch.zeros(1, 20))
    with pytest.raises(ValueError, match=r"n_m=\(1, 4\) fixes the density at 1/4: give .* sparsity=0.75, got"):
        IsoFlop("wide", 0.5, match="layer", n_m=(1, 4))
    with pytest.raises(ValueError, match="0 < N <= M"):
        IsoFlop("wide", 0.5, match="layer", n_m=(4, 2))
