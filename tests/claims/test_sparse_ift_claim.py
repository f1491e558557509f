"""What the claim of sparse layers of equal cost compares."""

import torch

from mixtura.claims import sparse_ift
from mixtura.core.flops import count_flops
from mixtura.core.isoflop import IsoFlop, widen


def test_the_dense_perceptron_takes_the_multiply_adds_of_the_card_and_the_wide_ones_no_more():
    example = torch.zeros(1, 196)

    def dense(width):
        return sparse_ift.perceptron(width, inputs=196)

    assert count_flops(dense(16), example).total == 196 * 16 + 2 * 16 * 16 + 16 * 10 == 3808
    for s, hidden in ((0.5, 23), (0.75, 32), (0.9, 51)):
        made = widen(dense, IsoFlop("wide", s), width=16, example_input=example)
        assert made[0].out_features == hidden and count_flops(made, example).total == 3808


def test_both_sides_see_the_same_batches_and_the_same_seed_gives_the_same_accuracy():
    images = sparse_ift._images("smoke", pooled=True)
    data = sparse_ift.Images(images.x.flatten(1), images.y, images.test_x.flatten(1), images.test_y)

    def accuracy(method, seed):
        def build():
            return widen(
                lambda w: sparse_ift.perceptron(w, inputs=16),
                IsoFlop("wide", 0.5),
                width=16,
                example_input=data.x[:1],
                generator=torch.Generator().manual_seed(seed),
            )

        return sparse_ift._classified(build, data, seed, 1, 0.05, method, "cpu")

    first, model, explored = accuracy("rigl", 0)
    again, twin, _ = accuracy("rigl", 0)
    assert first == again and all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    _, still, stood = accuracy("static", 0)
    assert explored > stood and torch.equal(still[0].mask, still[0].weight != 0)
