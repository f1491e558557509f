"""Mixing branches: identities, oracles, round trips and what is refused."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
import transformers as hf

from mixtura.core.training import TrainConfig
from mixtura.lm.model import MixturaForCausalLM
from mixtura.lm.tokens import byte_pair_tokenizer
from mixtura.lm.upcycle import BranchAttendConfig, average, branch, mix, to_standard, vocabularies_agree

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEEDS = {
    "llama": hf.LlamaConfig(**TINY, num_key_value_heads=2, tie_word_embeddings=True),
    "mistral": hf.MistralConfig(**TINY, num_key_value_heads=2, sliding_window=6),
    "qwen2": hf.Qwen2Config(**TINY, num_key_value_heads=2),
    "qwen3": hf.Qwen3Config(**TINY, num_key_value_heads=2, head_dim=8),
    "gemma": hf.GemmaConfig(**TINY, num_key_value_heads=1, head_dim=8),
    "olmo2": hf.Olmo2Config(**TINY, num_key_value_heads=2),
    "phi": hf.PhiConfig(**TINY),
    "cohere": hf.CohereConfig(**TINY, num_key_value_heads=2),
    "gpt_neox": hf.GPTNeoXConfig(**TINY),
    "falcon": hf.FalconConfig(**TINY),
}
TOKENS = torch.arange(3, 27).view(2, 12)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order; logits are of size 1
KINDS = ("expert-kv", "shared-kv", "average")


def seed_model(name="llama"):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(copy.deepcopy(SEEDS[name])).eval()
    return moved(model, 0.1, 0)


def moved(model, by, seed):
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return model


def branches(name="llama", by=0.05):
    seed = seed_model(name)
    return {"seed": seed, "a": moved(seed, by, 1), "b": moved(seed, by, 2)}


@torch.no_grad()
def logits(model, **kwargs):
    return model(TOKENS, **kwargs).logits


def force(model, expert):
    """Both gates of every block give one expert all the weight."""
    for layer in model.model.layers:
        n = layer.mlp.gate.num_experts
        one_hot = torch.nn.functional.one_hot(torch.tensor(expert), n).float()
        layer.mlp.gate.forward = lambda x, o=one_hot, e=expert: (
            o.expand(len(x), -1),
            torch.ones(len(x), 1),
            torch.full((len(x), 1), e),
        )
        if model.config.attention == "mixture":
            layer.self_attn._gates = lambda x, o=one_hot: o.expand(*x.shape[:-1], -1)
    return model


def test_average_of_weights_is_the_mean_of_each_tensor():
    models = branches()
    merged = mix(models, BranchAttendConfig(attention="average")).state_dict()
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"):
        mean = torch.stack([m.state_dict()[name] for m in models.values()]).mean(0)
        torch.testing.assert_close(merged[name], mean, rtol=0, atol=1e-7)


@pytest.mark.parametrize("attention", ["expert-kv", "shared-kv"])
@pytest.mark.parametrize("name", SEEDS)
def test_copies_of_one_model_with_gates_of_one_are_the_model(name, attention):
    seed = seed_model(name)
    # Copies with averaged weights: three equal float32 numbers added and divided by three may differ in the last place.
    mixture = mix({f"copy {i}": copy.deepcopy(seed) for i in range(4)}, BranchAttendConfig(attention=attention))
    for layer in mixture.model.layers:
        gate = layer.mlp.gate.forward
        layer.mlp.gate.forward = lambda x, g=gate: (g(x)[0], torch.ones(len(x), 1), g(x)[2])
    torch.testing.assert_close(logits(mixture), logits(seed), **CLOSE)


def test_with_real_gates_the_attention_of_copies_is_the_seeds_attention():
    seed = seed_model()
    mixture = mix({f"copy {i}": copy.deepcopy(seed) for i in range(4)})
    heard = {}
    for which, model in (("seed", seed), ("mixture", mixture)):
        block = model.model.layers[0].self_attn
        block.register_forward_hook(lambda m, a, out, w=which: heard.__setitem__(w, out[0].detach()))
        logits(model)
    torch.testing.assert_close(heard["mixture"], heard["seed"], **CLOSE)


@pytest.mark.parametrize("name", SEEDS)
def test_gates_on_one_expert_give_that_specialist_with_averaged_norms_and_embeddings(name):
    models = branches(name)
    merged, own = average(models), models["a"]
    state = own.state_dict()
    outside = [k for k in state if not any(part in k for part in ("self_attn", "attention.", "mlp."))]
    chimera = copy.deepcopy(own)
    chimera.load_state_dict(state | {k: merged.state_dict()[k] for k in outside})
    torch.testing.assert_close(logits(force(mix(models), 1)), logits(chimera), **CLOSE)


def test_shared_keys_and_values_are_the_mean_and_one_cache():
    models = branches()
    mixture = mix(models, BranchAttendConfig(attention="shared-kv"))
    name = "model.layers.0.self_attn.k_proj"
    mean = torch.stack([m.state_dict()[f"{name}.weight"] for m in models.values()]).mean(0)
    torch.testing.assert_close(mixture.state_dict()[name][0], mean, rtol=0, atol=1e-7)
    for attention, heads in (("expert-kv", 3 * 2), ("shared-kv", 2)):
        out = mix(models, BranchAttendConfig(attention=attention))(TOKENS, use_cache=True)
        assert out.past_key_values.layers[0].keys.shape[1] == heads


@pytest.mark.parametrize("attention", KINDS)
def test_both_routers_learn_from_the_loss_at_top_1(attention):
    mixture = mix(branches(), BranchAttendConfig(attention=attention, balance=0.0, z=0.0)).train()
    mixture(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in mixture.named_parameters():
        if "router" in name or "gate.weight" in name:
            assert parameter.grad.abs().max() > 1e-6, name
    routers = [n for n, _ in mixture.named_parameters() if "router" in n or "gate.weight" in n]
    assert len(routers) == 2 * (2 if attention != "average" else 1)


def test_renormalising_is_off_for_one_expert_where_it_stops_the_router_from_learning():
    assert (
        not mix(branches()).config.norm_topk_prob
        and mix(branches(), BranchAttendConfig(ffn_top_k=2)).config.norm_topk_prob
    )
    mixture = mix(branches(), BranchAttendConfig(balance=0.0, z=0.0, renormalise=True)).train()
    mixture(TOKENS, labels=TOKENS).loss.backward()
    gates = [p.grad for n, p in mixture.named_parameters() if "mlp.gate.weight" in n]
    assert all(g is None or g.abs().max() < 1e-7 for g in gates)


def test_a_sequential_seed_stays_sequential_and_a_parallel_one_parallel():
    assert mix(branches("llama")).config.block == "sequential"
    assert mix(branches("phi")).config.block == "parallel"


@pytest.mark.parametrize("attention", KINDS)
def test_the_models_are_left_as_they_are(attention):
    models = branches()
    before = {name: copy.deepcopy(m.state_dict()) for name, m in models.items()}
    mixture = mix(models, BranchAttendConfig(attention=attention))
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.zero_()
    for name, model in models.items():
        assert all(torch.equal(t, before[name][k]) for k, t in model.state_dict().items())


def test_the_same_generator_seed_draws_the_same_routers_and_another_draws_others():
    models, name = branches(), "model.layers.0.self_attn.router.weight"
    drawn = [mix(models, generator=torch.Generator().manual_seed(s)).state_dict()[name] for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert abs(drawn[0].std() - 0.02) < 5 * 0.02 / (2 * drawn[0].numel()) ** 0.5  # five standard errors


def test_round_trip_through_a_fresh_process(tmp_path):
    wanted = {}
    for attention in KINDS:
        mixture = mix(branches("qwen2"), BranchAttendConfig(attention=attention))
        mixture.save_pretrained(tmp_path / attention)
        wanted[attention] = logits(mixture)
    script = """
import sys, torch, transformers, mixtura.lm.model
out = {}
for attention in ("expert-kv", "shared-kv", "average"):
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{attention}").eval()
    with torch.no_grad():
        out[attention] = model(torch.arange(3, 27).view(2, 12)).logits
torch.save(out, f"{sys.argv[1]}/logits")
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    got = torch.load(tmp_path / "logits")
    for attention in KINDS:
        assert torch.equal(got[attention], wanted[attention]), attention


@pytest.mark.parametrize(
    ("name", "config", "family"),
    [
        ("llama", BranchAttendConfig(attention="average"), "qwen2_moe"),
        ("llama", BranchAttendConfig(attention="average", ffn_top_k=2), "mixtral"),
        ("llama", BranchAttendConfig(attention="average", ffn_top_k=2, renormalise=False), "qwen2_moe"),
        ("qwen2", BranchAttendConfig(attention="average"), "qwen2_moe"),
        ("qwen3", BranchAttendConfig(attention="average"), "qwen3_moe"),
        ("olmo2", BranchAttendConfig(attention="average"), "flex_olmo"),
    ],
)
def test_to_standard_writes_a_native_family_with_the_same_logits(name, config, family):
    mixture = mix(branches(name), config)
    standard = to_standard(mixture)
    assert standard.config.model_type == family
    torch.testing.assert_close(logits(standard), logits(mixture), rtol=1e-4, atol=1e-4)


def test_attention_experts_have_no_standard_form():
    with pytest.raises(ValueError, match="mixtral cannot express attention experts"):
        to_standard(mix(branches()))
    with pytest.raises(TypeError, match="must be a MixturaForCausalLM, got LlamaForCausalLM"):
        to_standard(seed_model())


def test_branch_trains_each_domain_and_leaves_the_seed(tmp_path):
    seed, text = seed_model(), torch.arange(3, 35).view(4, 8)
    before = copy.deepcopy(seed.state_dict())
    train = TrainConfig(steps=4, lr=1e-2)
    models = branch(
        seed, {"a": text, "b": text.flip(1)}, general=text.roll(3, 1), train=train, batch_size=2, out=tmp_path
    )
    assert list(models) == ["seed", "a", "b"] and models["seed"] is seed
    assert all(torch.equal(t, before[k]) for k, t in seed.state_dict().items())
    loss = {name: m(text, labels=text).loss.item() for name, m in models.items()}
    assert loss["a"] < loss["seed"]
    again = branch(seed, {"a": text}, general=text.roll(3, 1), train=train, batch_size=2, out=tmp_path)
    assert torch.equal(again["a"].model.norm.weight, models["a"].model.norm.weight)  # taken from the checkpoint


def other_width():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TINY | {"hidden_size": 64, "num_key_value_heads": 2}))


def with_config(**fields):
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(**TINY | {"num_key_value_heads": 2, "tie_word_embeddings": True} | fields)
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: seed_model("qwen2"), "differ in architecture: 'llama' and 'qwen2'"),
        (lambda: with_config(vocab_size=65), "differ in vocab_size: 64 and 65"),
        (lambda: with_config(hidden_size=64), "differ in hidden_size: 32 and 64"),
        (lambda: with_config(tie_word_embeddings=False), "differ in tie_word_embeddings: True and False"),
        (lambda: with_config(rope_theta=5e5), "differ in rope_parameters: .*10000.*500000"),
        (lambda: seed_model().to(torch.bfloat16), "differ in dtype: torch.float32 and torch.bfloat16"),
    ],
)
def test_branches_that_differ_are_refused_with_the_first_difference(other, message):
    with pytest.raises(ValueError, match=message):
        mix({"seed": seed_model(), "other": other()})


def test_windows_that_differ_are_refused():
    other = copy.deepcopy(seed_model("mistral"))
    other.config.sliding_window = 8
    with pytest.raises(ValueError, match="differ in sliding_window: 6 and 8"):
        mix({"seed": seed_model("mistral"), "other": other})


def test_a_tensor_that_is_not_what_its_config_says_is_named():
    other = moved(seed_model(), 0.1, 1)
    other.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has shape \(40, 32\).*\(48, 32\)"):
        mix({"seed": seed_model(), "other": other})


def test_tokenizers_that_differ_are_refused_with_the_token():
    with pytest.raises(ValueError, match="token 'b' is 1 in 'seed' and 2 in 'code'"):
        vocabularies_agree({"seed": {"a": 0, "b": 1}, "code": {"a": 0, "b": 2}})
    vocabularies_agree({"seed": {"a": 0}, "code": {"a": 0}, "unknown": {}})


def test_tokenizers_beside_checkpoints_are_compared(tmp_path):
    folders = {name: tmp_path / name for name in ("seed", "a", "b")}
    for (name, folder), text in zip(folders.items(), ("tea time", "tea time", "xyz xyz xyz"), strict=True):
        branches()[name].save_pretrained(folder)
        byte_pair_tokenizer([text] * 9, 260).save_pretrained(folder)
    mix({name: folders[name] for name in ("seed", "a")})
    with pytest.raises(ValueError, match=r"tokenizers differ: token .* in 'seed' and .* in 'b'"):
        mix(folders)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mix({"seed": seed_model()}), "at least 2 models .* got 1"),
        (lambda: mix(branches(), BranchAttendConfig(ffn_top_k=4)), "at most the number of models, 3, got 4"),
        (lambda: BranchAttendConfig(attention="both"), r"\['expert-kv', 'shared-kv', 'average'\], got 'both'"),
        (lambda: BranchAttendConfig(attention="average", routing="top1"), "has no effect"),
        (lambda: branch(seed_model(), {}, train=TrainConfig(steps=1)), "at least one domain"),
        (lambda: branch(seed_model(), {"seed": TOKENS}, train=TrainConfig(steps=1)), "must not be called 'seed'"),
    ],
)
def test_arguments_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_cache_of_a_mixture_of_other_size_is_refused():
    three, models = mix(branches()), branches()
    two = mix({name: models[name] for name in ("seed", "a")})
    cache = three(TOKENS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 6 key/value heads in layer 0, this model has 4"):
        two(TOKENS[:, :1], past_key_values=cache)


def test_clones_are_mixed_with_a_warning(caplog):
    seed = seed_model()
    with caplog.at_level(logging.WARNING):
        mix({"seed": seed, "same": copy.deepcopy(seed), "other": moved(seed, 0.1, 1)})
    assert [r.message for r in caplog.records if "identical" in r.message] == [
        "seed and same are identical, so their experts start as clones of each other"
    ]


def test_mixed_models_are_ours_and_name_their_experts(tmp_path):
    mixture = mix(branches())
    assert type(mixture) is MixturaForCausalLM
    mixture.save_pretrained(tmp_path)
    assert hf.AutoConfig.from_pretrained(tmp_path).expert_names == ["seed", "a", "b"]
