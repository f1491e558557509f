"""One door to all methods: what they promise at the start, what chance changes, what is refused."""

import copy

import pytest
import torch
import transformers as hf

from mixtura.lm.model import MixturaForCausalLM
from mixtura.lm.upcycle import CopyConfig, upcycle

CONFIG = hf.LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TOKENS = torch.arange(3, 27).view(2, 12)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order; logits are of size 1


def dense(seed=0):
    torch.manual_seed(seed)
    model = hf.LlamaForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_any_number_of_chosen_copies_computes_the_same(top_k):
    model = dense()
    torch.testing.assert_close(logits(upcycle(model, n_experts=5, top_k=top_k)), logits(model), **CLOSE)


def test_without_renormalising_the_feed_forward_part_is_scaled_by_the_chosen_gates():
    model = dense()
    mixture = upcycle(model, n_experts=4, top_k=1, renormalise=False)
    assert mixture.config.model_type == "qwen2_moe"
    x = torch.randn(1, 5, 32)
    want = model.model.layers[0].mlp(x)
    block = mixture.model.layers[0].mlp
    gates = block.gate(x)[1].view(1, 5, 1)
    torch.testing.assert_close(block(x), gates * want, **CLOSE)


@pytest.mark.parametrize("segments", [1, 2, 3, 4, 6])
def test_pieces_of_one_copy_are_chosen_together_and_add_up(segments):
    model = dense()
    mixture = upcycle(model, method="fine-grained", n_experts=4, top_k=2, segments=segments)
    _, _, indices = mixture.model.layers[0].mlp.gate(torch.randn(50, 32))
    chosen = (indices // segments).sort(-1).values
    assert (chosen.view(50, 2, segments) == chosen.view(50, 2, segments)[..., :1]).all()
    torch.testing.assert_close(logits(mixture), logits(model), **CLOSE)


def test_hidden_units_are_kept_and_only_regrouped():
    model = dense()
    mixture = upcycle(model, method="fine-grained", n_experts=2, segments=3)
    up = mixture.model.layers[0].mlp.experts.gate_up_proj[:, 16:]  # 48 hidden units in three pieces of 16
    assert torch.equal(up[:3].reshape(48, 32), model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(up[3:], up[:3])


def test_a_shared_piece_is_outside_the_router():
    mixture = upcycle(dense(), method="fine-grained", n_experts=4, top_k=2, segments=4, shared=1)
    config = mixture.config
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (12, 6, 12)
    assert config.shared_expert_intermediate_size == 12


def test_the_model_is_left_as_it_is_and_shares_nothing():
    model = dense()
    before = copy.deepcopy(model.state_dict())
    mixture = upcycle(model, n_experts=4)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_a_path_gives_what_the_model_gives(tmp_path):
    model = dense()
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path)
    from_path, from_model = upcycle(str(tmp_path), n_experts=3), upcycle(model, n_experts=3)
    assert torch.equal(logits(from_path), logits(from_model))
    assert from_path.generation_config.temperature == from_model.generation_config.temperature == 0.5


def test_the_seed_decides_the_router():
    routers = [upcycle(dense(), n_experts=3, seed=s).model.layers[1].mlp.gate.weight for s in (0, 0, 1)]
    assert torch.equal(routers[0], routers[1]) and not torch.equal(routers[0], routers[2])
    assert not torch.equal(routers[0], upcycle(dense(), n_experts=3).model.layers[0].mlp.gate.weight)


def test_noise_is_relative_to_the_weights():
    model = dense()
    plain, noisy = (upcycle(model, n_experts=4, noise=n).model.layers[0].mlp.experts.down_proj for n in (0.0, 0.5))
    share = (noisy - plain).std() / plain.std()
    # 4 * 32 * 48 = 6144 values: five standard errors of a standard deviation are 5 * 0.5 / sqrt(2 * 6144) = 0.023.
    assert abs(share - 0.5) < 0.023
    assert not torch.equal(noisy[0], noisy[1])


def test_units_drawn_anew_are_the_same_in_all_matrices_of_an_expert():
    model = dense()
    experts = upcycle(model, n_experts=4, reinit=0.25).model.layers[0].mlp.experts
    mlp = model.model.layers[0].mlp
    gate, up = experts.gate_up_proj.chunk(2, dim=1)
    fresh = torch.stack(
        (
            (gate != mlp.gate_proj.weight).any(-1),
            (up != mlp.up_proj.weight).any(-1),
            (experts.down_proj != mlp.down_proj.weight).any(-2),
        )
    )
    assert torch.equal(fresh[0], fresh[1]) and torch.equal(fresh[0], fresh[2])
    assert (fresh[0].sum(-1) == 12).all()  # a quarter of 48
    assert not torch.equal(fresh[0][0], fresh[0][1])


def test_half_precision_stays_half_precision():
    mixture = upcycle(dense().to(torch.bfloat16), n_experts=3)
    assert {p.dtype for p in mixture.parameters()} == {torch.bfloat16}
    assert mixture.config.dtype == torch.bfloat16


def test_branches_become_a_mixture_or_its_native_form():
    models = {"seed": dense(0), "code": dense(1)}
    attended = upcycle(models, method="branch-attend-mix")
    trained = upcycle(list(models.values()), method="branch-train-mix", top_k=2)
    assert type(attended) is MixturaForCausalLM and attended.config.attention_experts == 2
    assert trained.config.model_type == "mixtral"
    trained.train()(TOKENS, labels=TOKENS).loss.backward()


def test_the_mixture_trains():
    mixture = upcycle(dense(), n_experts=3).train()
    optimizer = torch.optim.SGD(mixture.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = mixture(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"method": "magic"}, ValueError, r"method must be one of \['copy', 'fine-grained'"),
        ({"n_experts": 4, "top_k": 5}, ValueError, "top_k must be between 1 and n_experts=4, got 5"),
        ({"n_experts": 1}, ValueError, "n_experts must be at least 2, got 1"),
        ({"method": "fine-grained", "segments": 5}, ValueError, "segments=5 must divide the 48 hidden units"),
        ({"method": "fine-grained", "segments": 4, "shared": 4}, ValueError, "between 0 and segments - 1 = 3"),
        ({"segments": 4}, TypeError, "has no option .*'segments'.*use fine-grained"),
        ({"noize": 1.0}, TypeError, "has no option .*'noize'.* it has .*'noise'"),
        ({"method": "branch-attend-mix"}, TypeError, "takes several models"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        upcycle(dense(), **options)


def test_several_models_need_a_method_for_several():
    models = {"seed": dense(0), "code": dense(1)}
    with pytest.raises(TypeError, match="takes one model, got dict; use branch-attend-mix"):
        upcycle(models)
    with pytest.raises(ValueError, match="one expert of each model: n_experts must be 2 or left out, got 8"):
        upcycle(models, method="branch-attend-mix", n_experts=8)
    with pytest.raises(TypeError, match="has no option 'attention'"):
        upcycle(models, method="branch-train-mix", attention="average")


def test_a_share_of_units_is_a_share():
    with pytest.raises(ValueError, match="reinit is a share"):
        CopyConfig(reinit=2.0)
