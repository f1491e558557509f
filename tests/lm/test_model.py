"""The decoder made of parts: caches, engines, losses, saving."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from mixtura.core.balance import device_balance_loss, load_balance_loss, router_z_loss
from mixtura.lm.families import parameter_shapes
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.model.decoder import routing_loss

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
LATENT = {
    "attention": "latent",
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
ATTENTION_EXPERTS = {"attention": "mixture", "attention_experts": 3}
PARTS = {
    "dense": {},
    "experts": {"num_experts": 4},
    "experts beside a shared one": {"num_experts": 4, "shared_expert_intermediate_size": 16, "dense_layers": [0]},
    "plain experts with biases": {"num_experts": 4, "mlp_gated": False, "mlp_bias": True, "norm": "layer"},
    "gated experts with biases": {"num_experts": 4, "mlp_bias": True, "norm_bias": True},
    "attention experts": {**ATTENTION_EXPERTS, "num_experts": 3, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "shared keys, in parallel": {**ATTENTION_EXPERTS, "attention_kv": "shared", "block": "parallel"},
    "norms behind, window": {"norm_placement": "after", "qk_norm": "full", "sliding_window": 4, "num_experts": 4},
    "latent attention": {**LATENT, "num_experts": 4, "shared_expert_intermediate_size": 16, "balance_per": "sequence"},
    "latent queries too": {**LATENT, "q_lora_rank": 7, "qkv_bias": True, "o_bias": True},
    "partly rotated": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}
TOKENS = torch.randint(2, 61, (2, 11), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order; logits are of size 1


def model(**parts):
    torch.manual_seed(0)
    return MixturaForCausalLM(MixturaConfig(**SHAPE | copy.deepcopy(parts), initializer_range=0.1)).eval()


def gradients(net, **kwargs):
    net.zero_grad()
    net(TOKENS, labels=TOKENS, **kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("engine", ["grouped_mm", "batched_mm", "mixtura"])
@pytest.mark.parametrize("name", [name for name in PARTS if "experts" in name])
def test_every_experts_engine_agrees_with_the_loop_forward_and_backward(name, engine):
    net = model(**PARTS[name])
    net.set_experts_implementation("eager")
    want, want_grads = net(TOKENS).logits, gradients(net)
    net.set_experts_implementation(engine)
    torch.testing.assert_close(net(TOKENS).logits, want, **CLOSE)
    for key, grad in gradients(net).items():
        torch.testing.assert_close(grad, want_grads[key], **CLOSE, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", PARTS)
def test_attention_engines_agree(name):
    net = model(**PARTS[name])
    want = net(TOKENS).logits
    net.set_attn_implementation("eager")
    torch.testing.assert_close(net(TOKENS).logits, want, **CLOSE)


@pytest.mark.parametrize("name", PARTS)
def test_decoding_token_by_token_equals_the_whole_pass(name):
    net = model(**PARTS[name])
    whole, cache, parts = net(TOKENS).logits, None, []
    for first, last in ((0, 6), (6, 7), (7, 9), (9, 11)):
        out = net(TOKENS[:, first:last], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


@pytest.mark.parametrize("name", PARTS)
def test_padding_on_the_left_changes_nothing(name):
    net = model(**PARTS[name])
    padded = F.pad(TOKENS, (3, 0), value=0)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = net(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(got, net(TOKENS).logits, **CLOSE)


@pytest.mark.parametrize("router", ["linear", "sparsity"])
@pytest.mark.parametrize("training", [False, True])
def test_padding_takes_no_place_of_an_expert_with_a_limit(training, router):
    limits = {"capacity_factor": 0.7, "eval_capacity_factor": 0.7, "min_capacity": 1, "capacity_policy": "prefix"}
    net = model(num_experts=4, router=router, **limits).train(training)
    row = TOKENS[:1]  # of several rows the first would take places of the others
    padded = F.pad(row, (9, 0), value=0)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = net(padded, attention_mask=mask, position_ids=positions).logits[:, 9:]
    want = net(row).logits
    torch.testing.assert_close(got, want, **CLOSE)
    unlimited = model(num_experts=4, router=router).train(training)
    assert not torch.allclose(unlimited(row).logits, want, **CLOSE)  # the limit is felt


def test_generate_continues_with_the_likeliest_tokens():
    net = model(**PARTS["attention experts"])
    got = net.generate(TOKENS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    ids = TOKENS
    for _ in range(5):
        ids = torch.cat((ids, net(ids).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(got, ids)


@pytest.mark.parametrize("name", PARTS)
def test_saving_and_loading_gives_the_same_bits(name, tmp_path):
    net = model(**PARTS[name])
    net.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is MixturaForCausalLM
    assert torch.equal(again(TOKENS).logits, net(TOKENS).logits)
    assert AutoConfig.from_pretrained(tmp_path).num_experts == net.config.num_experts


def test_recomputing_activations_gives_the_same_gradients_those_of_the_gates_included():
    net = model(**PARTS["attention experts"]).train()
    want = gradients(net)
    net.gradient_checkpointing_enable()  # the name of transformers 5.20 to 5.23
    got = gradients(net, use_cache=False)
    for key in want:
        torch.testing.assert_close(got[key], want[key], **CLOSE, msg=lambda m, k=key: f"{k}: {m}")
    assert want["model.layers.0.mlp.gate.weight"].abs().sum() > 0


def test_the_gate_losses_are_added_in_training_and_not_in_evaluation():
    net = model(num_experts=4, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    plain = net(TOKENS, labels=TOKENS)
    asked = net(TOKENS, labels=TOKENS, output_router_logits=True)
    net.train()
    trained = net(TOKENS, labels=TOKENS)
    assert plain.aux_loss is None and plain.router_logits is None
    by_hand = 0.0
    for logits in asked.router_logits:
        probs = logits.softmax(-1)
        by_hand += 0.5 * load_balance_loss(probs, probs.topk(2).indices) + 0.25 * router_z_loss(logits)
    torch.testing.assert_close(asked.aux_loss, by_hand)
    torch.testing.assert_close(asked.loss, plain.loss + by_hand)
    torch.testing.assert_close(trained.loss, asked.loss)


def test_padding_does_not_count_in_the_gate_losses():
    config = MixturaConfig(**SHAPE, num_experts=4)
    logits = torch.randn(2 * 5, 4)
    mask = torch.ones(2, 5)
    mask[0, :3] = 0
    kept = logits[mask.reshape(-1).bool()]
    torch.testing.assert_close(routing_loss((logits,), config, mask), routing_loss((kept,), config, None))


def test_the_cache_of_latent_attention_holds_the_latent_and_one_rotated_key_a_token():
    cache = model(**PARTS["latent attention"])(TOKENS, use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (2, 1, 11, 12) and cache.layers[0].values.shape == (2, 1, 11, 4)


def test_balance_of_each_sequence_and_between_devices_is_added_by_layer():
    config = MixturaConfig(
        **SHAPE,
        num_experts=4,
        router_aux_loss_coef=0.5,
        router_z_loss_coef=0.0,
        device_balance_coef=0.25,
        device_groups=2,
        balance_per="sequence",
    )
    layers = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    want = 0.0
    for logits in layers:
        for row, kept in zip(logits, mask.bool(), strict=True):
            probs = row[kept].softmax(-1)
            chosen = probs.topk(2).indices
            want += 0.5 / 2 * load_balance_loss(probs, chosen)
            want += 0.25 / 2 * device_balance_loss(probs, chosen, [[0, 1], [2, 3]])
    got = routing_loss(tuple(layer.flatten(0, 1) for layer in layers), config, mask)
    torch.testing.assert_close(got, want)


def test_top1_gates_that_are_made_to_sum_to_one_teach_the_router_nothing():
    free = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "num_experts": 4, "num_experts_per_tok": 1}
    gate = "model.layers.0.mlp.gate.weight"
    assert gradients(model(**free, norm_topk_prob=False).train())[gate].abs().max() > 1e-6
    # p / p is 1 up to rounding, and its gradient is the rounding of two equal terms.
    assert gradients(model(**free, norm_topk_prob=True).train())[gate].abs().max() < 1e-7


def test_parameter_counts_of_the_papers_small_models():
    """BAM (2408.08274), Table 9: totals of the seed, BTX and both variants; they contain the routers of both parts."""
    shape = {
        "vocab_size": 256_000,
        "hidden_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        "block": "parallel",
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False}
    attention = {"attention": "mixture", "attention_experts": 4}
    wanted = {
        587_209_728: {},
        700_480_512: experts,
        776_002_560: experts | attention,
        738_253_824: experts | attention | {"attention_kv": "shared"},
    }
    for count, parts in wanted.items():
        shapes = parameter_shapes(MixturaConfig(**shape, **parts))
        assert sum(s.numel() for s in shapes.values()) == count


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"num_experts": 4, "num_experts_per_tok": 5},
            "num_experts_per_tok must be between 1 and num_experts=4, got 5",
        ),
        ({**LATENT, "kv_lora_rank": 0}, "needs kv_lora_rank >= 1, got 0"),
        ({**LATENT, "num_key_value_heads": 2}, "num_key_value_heads must be 4, got 2"),
        ({**LATENT, "qk_norm": "head"}, "has no qk_norm"),
        (
            {"num_experts": 4, "device_balance_coef": 0.1, "device_groups": 3},
            "device_groups that divide num_experts=4, got 3",
        ),
        ({"num_experts": 4, "router_aux_loss_coef": -1.0}, "router_aux_loss_coef must be >= 0"),
        ({"num_experts": 4, "balance_per": "row"}, "balance_per must be one of"),
        ({"norm": "batch"}, r"norm must be one of \['rms', 'rms_plus_one', 'layer'\], got 'batch'"),
        ({"shared_expert_intermediate_size": 8}, "needs routed experts"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"block": "parallel", "norm_placement": "after"}, "norm_placement='before' only"),
        ({"attention": "mixture", "attention_routing": "top2"}, "attention_experts >= 2"),
        ({"hidden_size": 36}, r"head_dim must be even \(positions turn pairs of its coordinates\), got 9"),
        ({"hidden_act": "gleu"}, "hidden_act must be one of .*'silu'.*, got 'gleu'"),
        ({"num_experts": 4, "dense_layers": [2]}, r"dense_layers must lie in 0\.\.1, got \[2\]"),
        ({"no_rope_layers": [-1]}, r"no_rope_layers must lie in 0\.\.1, got \[-1\]"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        MixturaConfig(**SHAPE | parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_that_the_grouped_product_refuses_are_computed_by_the_loop(dtype):
    net = model(num_experts=4, hidden_size=36, num_attention_heads=2, moe_intermediate_size=10).to(dtype)
    net(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert net.get_experts_implementation()[""] == "eager"
    assert model(num_experts=4).get_experts_implementation()[""] == "grouped_mm"


def test_half_precision_keeps_its_dtype_and_stays_near():
    net = model(**PARTS["attention experts"])
    want = net(TOKENS).logits
    got = net.to(torch.bfloat16)(TOKENS).logits
    assert got.dtype == torch.bfloat16
    # bfloat16 has 8 bits; a dozen roundings in a row of values of size 1. A token may change its expert, so: on average.
    assert (got.float() - want).abs().mean() < 0.02
