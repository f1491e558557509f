"""The mixture is found, read and rerouted in every family that the installed transformers has."""

import pytest
import torch
from tiny_models import E, families, folder_of, tiny_model
from torch import nn

from mixtura.core.gates import Routing
from mixtura.lm.anatomy import MoEBlock, find_moe, idle_experts, recorded_routing, rerouted
from mixtura.lm.decode.routing import RoutingRule, routed

# What cannot be served, and why: fewer than five families, or the anatomy has to learn more.
NOT_SERVED = {
    "doge": "its experts are rows of an embedding, retrieved by product keys; there is no experts module",
    "jetmoe": "its experts are two linear layers called with rows already sorted; indices and weights stay in its gate",
    "llama4": "it runs all experts on all tokens and scales what goes in; no indices ever reach them",
    "llama4_text": "as llama4",
    "dots3_note": "its vision part has sizes that must fit each other in ways of its own; dots3_note_text is served",
}
# Gates that do not choose by score alone, so that ranks of scores are not their choice.
OTHER_CHOICES = {
    "deepseek_v4": "the first layers choose by a hash of the token",
    "zaya": "one class more than experts: a token may skip them",
}
# Gates whose weights are neither their scores nor shares of them.
OTHER_WEIGHTS = {
    "deepseek_v4": "a gate that chooses by a hash of the token cannot be asked without tokens",
    "inkling_text": "weights are shared out between routed and shared experts",
    "phimoe": "a sparse mixer masks the scores anew for every choice",
    "zaya": "one class more than experts takes part in the softmax",
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def run(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def ids_for(seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(seed))


def test_fewer_than_five_families_are_not_served():
    assert len({folder_of(family) for family in NOT_SERVED}) < 5
    assert set(NOT_SERVED) <= set(families()), "a family that is served now, or gone, is still excused"
    assert len(families()) >= 52


@pytest.mark.parametrize("family", [f for f in families() if f not in NOT_SERVED])
def test_every_family_is_found_read_and_rerouted(family: str):
    model, ids = tiny_model(family), ids_for()
    blocks = find_moe(model)
    assert blocks and all(block.n_experts == E for block in blocks)
    plain = run(model, ids)

    with recorded_routing(model) as routings:
        recorded = run(model, ids)
    assert torch.equal(plain, recorded)
    for block in blocks:
        routing = routings[block.name]
        assert routing.weights.shape == routing.indices.shape == (ids.numel(), block.k)
        assert routing.logits.shape == (ids.numel(), E)
        if family not in OTHER_CHOICES:
            _ranks_are_the_gates_choice(block, routing)

    chosen = torch.zeros(ids.numel(), 1, dtype=torch.long)

    def only_the_first(block: MoEBlock, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ones_like(chosen, dtype=routing.weights.dtype), chosen

    with rerouted(model, only_the_first):
        changed = run(model, ids)
    assert not torch.allclose(plain, changed, atol=1e-4)
    _other_experts_play_no_part(model, blocks, ids, changed, only_the_first)
    assert torch.equal(run(model, ids), plain)


def _ranks_are_the_gates_choice(block: MoEBlock, routing: Routing) -> None:
    ranked = block.scores(routing).topk(block.k, dim=-1).indices.sort(-1).values
    assert torch.equal(ranked, routing.indices.sort(-1).values)
    if block.k > 1 and block.scoring.renormalises and block.expert_scale is None:
        torch.testing.assert_close(
            routing.weights.float().sum(-1), torch.full((len(routing.weights),), block.scale), rtol=1e-3, atol=1e-3
        )


def _other_experts_play_no_part(model, blocks, ids, want, change) -> None:
    """Weights of the experts that were not chosen are set to NaN: whoever reads one of them shows it."""
    saved = []
    for block in blocks:
        for parameter in block.experts.parameters():
            if parameter.dim() > 1 and parameter.shape[0] % E == 0:  # (E, ...), or all experts' rows one after another
                saved.append((parameter, parameter.detach().clone()))
                parameter.data[parameter.shape[0] // E :] = float("nan")
    assert len(saved) >= 2 * len(blocks)
    with rerouted(model, change):
        torch.testing.assert_close(run(model, ids), want)
    for parameter, values in saved:
        parameter.data.copy_(values)


@pytest.mark.parametrize("family", [f for f in families() if f not in NOT_SERVED])
def test_every_gates_weights_are_explained_by_the_text_and_by_one_token(family: str):
    model, ids = tiny_model(family), ids_for()
    blocks = find_moe(model)
    for block in blocks:
        for name, tensor in (*block.gate.named_buffers(), *block.gate.named_parameters()):
            if "bias" in name and tensor.shape == (E,):
                torch.nn.init.normal_(tensor, std=0.2)
    if family in OTHER_WEIGHTS:
        assert any(block.scoring.renormalises is None for block in blocks)
        with pytest.raises(ValueError, match="neither"), routed(model, RoutingRule.top(1), renorm="as_model"):
            pass
        return
    for text in (ids, ids[:1, :1]):
        with recorded_routing(model) as routings:
            run(model, text)
        for block in blocks:
            routing = routings[block.name]
            order = block.scores(routing).argsort(dim=-1, descending=True)[:, : block.k]
            assert torch.equal(order.sort(-1).values, routing.indices.sort(-1).values)
            weights, indices = RoutingRule.top(block.k).choose(block, routing, "as_model", None)
            want = torch.zeros(len(order), E).scatter(-1, routing.indices, routing.weights.float())
            got = torch.zeros(len(order), E).scatter(-1, indices, weights.float())
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_confident_token_does_not_look_renormalised():
    model, ids = tiny_model("olmoe"), ids_for()[:1]
    for block in find_moe(model):
        block.gate.weight.data *= 20  # the two best take all but nothing of the softmax
    first = {}
    for name, text in (("in a text", ids), ("alone", ids[:, :1])):
        with routed(model, RoutingRule.rank(2), renorm="as_model"):
            block = find_moe(model)[0]
            seen: list[torch.Tensor] = []
            hook = block.experts.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[2]))
            run(model, text)
            hook.remove()
        first[name] = seen[0][0]
    assert first["alone"] < 0.5
    torch.testing.assert_close(first["alone"], first["in a text"])


def test_asking_a_gate_leaves_no_trace():
    model = tiny_model("phimoe").train()  # adds noise in training
    before = torch.get_rng_state()
    calls: list[str] = []
    blocks = find_moe(model)
    blocks[0].gate.register_forward_hook(lambda *args: calls.append("heard"))
    assert blocks[0].scoring.renormalises is None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert not calls and not blocks[0].experts._forward_pre_hooks


@pytest.mark.parametrize("family", ["doge", "jetmoe", "llama4_text"])
def test_a_mixture_that_is_called_in_another_way_is_not_called_dense(family: str):
    with pytest.raises(ValueError, match="does not call its experts with"), recorded_routing(tiny_model(family)):
        pass


def test_correction_biases_count_when_experts_are_ranked():
    model = tiny_model("deepseek_v3")
    for block in find_moe(model):
        block.gate.e_score_correction_bias.copy_(torch.tensor([0.9, -0.9, 0.3, 0.0]))
    with recorded_routing(model) as routings:
        run(model, ids_for())
    for block in find_moe(model):
        routing = routings[block.name]
        assert not torch.equal(routing.logits.topk(block.k).indices.sort().values, routing.indices.sort().values)
        _ranks_are_the_gates_choice(block, routing)


def test_the_model_is_left_alone_after_an_exception():
    model, ids = tiny_model("mixtral"), ids_for()
    plain = run(model, ids)

    def fails(block: MoEBlock, routing: Routing):
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"), rerouted(model, fails):
        run(model, ids)
    assert torch.equal(run(model, ids), plain)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_idle_experts_answer_zeros_and_work_again_afterwards():
    model = tiny_model("mixtral")
    block = find_moe(model)[0]
    ids = torch.randint(2, 60, (2, 9))
    want = run(model, ids)
    answers = []
    block.experts.register_forward_hook(lambda module, args, output: answers.append(output))
    with idle_experts(block), pytest.raises(RuntimeError, match="inside"):
        run(model, ids)
        raise RuntimeError("inside")
    assert not answers[0].any() and answers[0].shape == (18, 32)
    torch.testing.assert_close(run(model, ids), want)
    assert answers[1].any()


def test_router_logits_that_the_model_reports_stay_raw():
    model, ids = tiny_model("mixtral"), ids_for()
    with torch.no_grad():
        want = model(input_ids=ids, output_router_logits=True).router_logits

        def swapped(block, routing):
            return routing.weights.flip(-1), routing.indices.flip(-1) * 0 + 1

        with rerouted(model, swapped):
            got = model(input_ids=ids, output_router_logits=True).router_logits
    # The first layer's logits do not depend on any expert; deeper ones do.
    assert torch.equal(want[0], got[0])


def test_recorded_routing_carries_gradients():
    model = tiny_model("mixtral")
    with recorded_routing(model) as routings:
        model(input_ids=ids_for())
    sum(r.logits.square().sum() + r.weights.sum() for r in routings.values()).backward()
    assert all(block.gate.weight.grad.abs().sum() > 0 for block in find_moe(model))


def test_shared_experts_are_told_apart():
    assert all(len(block.shared) == 1 for block in find_moe(tiny_model("deepseek_v3")))
    assert all(block.shared == () for block in find_moe(tiny_model("mixtral")))


def test_a_dense_model_has_no_mixture_and_says_its_class():
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    )
    assert find_moe(dense) == []
    with pytest.raises(ValueError, match="LlamaForCausalLM has no mixture layers"), recorded_routing(dense):
        pass


def test_a_model_without_weights_can_be_read():
    from mixtura.lm.cost import model_size
    from mixtura.lm.loading import empty_model

    model = tiny_model("mixtral")
    empty = empty_model(model.config)
    assert [b.name for b in find_moe(empty)] == [b.name for b in find_moe(model)]
    size = model_size(empty)
    assert size.total == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for b in find_moe(model) for p in b.experts.parameters())
    assert size.active == size.total - experts // 2
