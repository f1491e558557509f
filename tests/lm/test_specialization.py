"""Banned, dropped and fewer experts, against models whose answer is known."""

import pytest
import torch

from mixtura.core.gates import top_k
from mixtura.lm.evaluate import token_losses
from mixtura.lm.fine_grained import FineGrainedMoE
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.specialization import ban_top, drop_shared, fewer_active, without_best

TOKENS = torch.randint(2, 61, (3, 9), generator=torch.Generator().manual_seed(0))


def model(**parts):
    torch.manual_seed(0)
    shape = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 6,
    }
    return MixturaForCausalLM(MixturaConfig(**shape | experts | parts, initializer_range=0.3)).eval()


def loss(net):
    return float(token_losses(net, TOKENS).double().mean())


@pytest.mark.parametrize("renormalise", [True, False])
def test_the_best_experts_are_passed_over_and_nothing_leaves_the_softmax(renormalise):
    routing = top_k(torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), 2, renormalise=renormalise)
    got = without_best(routing, 3, renormalise=renormalise)
    for t in range(20):
        order = sorted(range(8), key=lambda e: -routing.logits[t, e].item())
        assert got.indices[t].tolist() == order[3:5]
        kept = routing.probs[t, order[3:5]]
        torch.testing.assert_close(got.weights[t], kept / kept.sum() if renormalise else kept)
    same = without_best(routing, 0, renormalise=renormalise)
    assert torch.equal(same.indices, routing.indices)
    torch.testing.assert_close(same.weights, routing.weights)


def test_banning_none_and_visiting_as_many_as_ever_change_nothing():
    net = model()
    assert ban_top(net, TOKENS, [0.0])[0.0] == pytest.approx(loss(net), abs=1e-5)
    assert fewer_active(net, TOKENS, [2])[2] == pytest.approx(loss(net), abs=1e-5)
    assert drop_shared(net, TOKENS)["with"] == pytest.approx(loss(net), abs=1e-5)


def test_banning_experts_that_are_all_the_same_costs_only_their_weight():
    net = model(norm_topk_prob=True)
    with torch.no_grad():
        for layer in net.model.layers:
            for stack in layer.mlp.experts.parameters():
                stack.copy_(stack[:1].expand_as(stack))
    # Weights that sum to 1 of experts that are all one: the rank does not matter.
    losses = ban_top(net, TOKENS, [0.0, 1 / 8, 1 / 2])
    assert losses[1 / 2] == pytest.approx(losses[0.0], abs=1e-5) and losses[1 / 8] == pytest.approx(
        losses[0.0], abs=1e-5
    )
    assert abs(ban_top(model(norm_topk_prob=True), TOKENS, [1 / 2])[1 / 2] - loss(model(norm_topk_prob=True))) > 1e-3


def test_dropping_shared_experts_is_the_model_with_their_weights_at_zero_and_one_more_routed():
    net, other = model(), model(num_experts_per_tok=3)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.shared_expert.down_proj.weight.zero_()
    before = loss(net)
    assert drop_shared(net, TOKENS)["without"] == pytest.approx(loss(other), abs=1e-5)
    assert loss(net) == before


def test_a_layer_probed_at_no_ban_answers_as_before():
    layer = FineGrainedMoE(6, 5, 7, 3, 2, init_std=0.5)
    x = torch.randn(2, 4, 6)
    routing = layer.mix(x).routing
    torch.testing.assert_close(layer.mix(x, without_best(routing, 0, renormalise=False)).hidden, layer(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ban_top(model(), TOKENS, [0.9]), "share=0.9 bans 7 of the 8 experts of model.layers.0.mlp"),
        (lambda: drop_shared(model(shared_expert_intermediate_size=0), TOKENS), "has no shared expert"),
        (lambda: fewer_active(torch.nn.Linear(2, 2), TOKENS, [1]), "Linear has no mixture layers"),
        (lambda: without_best(top_k(torch.zeros(1, 4), 2), 3, renormalise=True), "banned must be between 0 and 2"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
