"""A dense model's own hidden units as experts: all of them is the dense model, some of them are a sum with weights near 1."""

import copy

import pytest
import torch
import transformers as hf
from scipy.optimize import linear_sum_assignment

from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.upcycle import from_dense, upcycle
from mixtura.lm.upcycle.own_units import block_norms, fit_router
from mixtura.lm.upcycle.unit_groups import balanced_assignment, balanced_groups, profiles, unit_order

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, "qwen2_moe", "mixtral"),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, "mixtura", "mixtral"),  # a sliding window in every layer
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, "qwen2_moe", "qwen2_moe"),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, "mixtura", "qwen3_moe"),
}
TEXT = torch.randint(3, 64, (4, 32), generator=torch.Generator().manual_seed(1))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(family="llama", **parts):
    torch.manual_seed(0)
    config, model, *_ = FAMILIES[family]
    net = model(config(**SHAPE | parts)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@torch.no_grad()
def logits(model):
    return model(TEXT).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [0, 2])
def test_with_all_blocks_active_it_is_the_dense_model(family, shared, tmp_path):
    net = dense(family)
    before = copy.deepcopy(net.state_dict())
    mixture = from_dense(net, split=6, active=6 - shared, shared=shared, batches=TEXT)
    assert mixture.config.model_type == FAMILIES[family][2 if shared else 3]
    torch.testing.assert_close(logits(mixture), logits(net), **CLOSE)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    mixture.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(mixture)
    torch.testing.assert_close(logits(again), logits(mixture), rtol=0, atol=0)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shared", [0, 1])
def test_with_all_blocks_active_it_is_exact_in_float64_with_biases_too(gated, shared):
    torch.manual_seed(0)
    config = MixturaConfig(**SHAPE | {"mlp_gated": gated, "mlp_bias": True, "initializer_range": 0.3})
    net = MixturaForCausalLM(config).eval().double()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    mixture = from_dense(net, split=4, active=4 - shared, shared=shared, batches=TEXT)
    mixture.set_experts_implementation("eager")  # grouped_mm knows no float64
    torch.testing.assert_close(logits(mixture), logits(net), rtol=1e-10, atol=1e-10)


def unit_weights(mixture_layer, dense_mlp, x, active):
    """Weight of each dense hidden unit for each token, found by looking its rows up in the experts; and how often it is there."""
    up = dense_mlp.up_proj.weight
    size = mixture_layer.experts.gate_up_proj.shape[1] // 2
    _, weights, indices = mixture_layer.gate(x)
    seen, out = torch.zeros(len(up), dtype=torch.int64), torch.zeros(len(x), len(up))
    for row in mixture_layer.shared_expert.up_proj.weight:
        unit = (up == row).all(1).nonzero().item()
        seen[unit] += 1
        out[:, unit] = 1.0
    for e, rows in enumerate(mixture_layer.experts.gate_up_proj[:, size:]):
        gate = (weights * (indices == e)).sum(1)
        for row in rows:
            unit = (up == row).all(1).nonzero().item()
            seen[unit] += 1
            out[:, unit] = active * gate
    return out, seen


@torch.no_grad()
def test_a_layer_is_the_dense_sum_over_shared_and_chosen_units():
    net, active = dense(), 3
    mixture = from_dense(net, split=8, active=active, shared=1, batches=TEXT, generator=seeded())
    mixture.set_experts_implementation("eager")  # six units are too few for grouped_mm's strides
    x = torch.randn(40, 32, generator=seeded())
    for layer, source in zip(mixture.model.layers, net.model.layers, strict=True):
        weights, seen = unit_weights(layer.mlp, source.mlp, x, active)
        assert (seen == 1).all()  # own units: each once, none copied
        assert ((weights > 0).sum(1) == 48 // 8 * (active + 1)).all()
        inner = source.mlp.act_fn(source.mlp.gate_proj(x)) * source.mlp.up_proj(x) * weights
        torch.testing.assert_close(layer.mlp(x[None])[0], source.mlp.down_proj(inner), **CLOSE)


@torch.no_grad()
def test_gates_of_chosen_units_are_one_up_to_the_spread_and_the_choice_does_not_depend_on_it():
    net, off, chosen = dense(), [], []
    x = torch.randn(200, 32, generator=seeded())
    for spread in (0.1, 0.05):
        mixture = from_dense(net, split=8, active=3, shared=1, batches=TEXT, spread=spread, generator=seeded())
        _, weights, indices = mixture.model.layers[1].mlp.gate(x)
        off.append(float((3 * weights - 1).abs().mean()))
        chosen.append(indices.sort(dim=1).values)
    assert 0.001 < off[1] < 0.05
    assert off[0] == pytest.approx(2 * off[1], rel=0.1)
    assert torch.equal(*chosen)


def test_parameters_are_the_dense_models_and_the_routers_rows():
    net = dense()
    total = sum(p.numel() for p in net.parameters())
    plain = from_dense(net, split=8, active=4, shared=0, batches=TEXT)
    assert sum(p.numel() for p in plain.parameters()) == total + 2 * 8 * 32
    sharing = from_dense(net, split=8, active=3, shared=1, batches=TEXT)
    gates = 2 * 32  # Qwen2-MoE's gate of the shared expert, zeros
    assert sum(p.numel() for p in sharing.parameters()) == total + 2 * 7 * 32 + gates


def test_the_same_generator_gives_the_same_model_and_a_path_reads_as_the_model(tmp_path):
    net = dense()
    net.save_pretrained(tmp_path)
    one, two = (
        from_dense(m, split=8, active=3, shared=1, batches=[TEXT], generator=seeded(3)) for m in (net, tmp_path)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_the_door_makes_half_of_the_units_active():
    mixture = upcycle(dense(), method="own-units", batches=TEXT)
    config = mixture.config
    assert (config.num_experts, config.num_experts_per_tok, config.shared_expert_intermediate_size) == (7, 3, 6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"split": 5},
            ValueError,
            "split must be at least 2 and divide the 48 hidden units, got 5",
        ),
        ({"split": 1}, ValueError, "split must be at least 2"),
        ({"shared": 8}, ValueError, "shared must be between 0 and split - 1 = 7"),
        ({"active": 8}, ValueError, "active must be between 1 and split - shared = 7, got 8"),
        ({"active": 0}, ValueError, "active must be between 1"),
        ({"spread": 0.0}, ValueError, "spread must be above 0"),
        ({"batches": []}, ValueError, "batches holds no tokens"),
        ({"batches": [torch.tensor([[64]])]}, ValueError, "token id 64, the model knows 64"),
    ],
)
def test_what_does_not_fit_is_named(options, error, message):
    with pytest.raises(error, match=message):
        from_dense(dense(), **{"split": 8, "active": 3, "shared": 1, "batches": TEXT} | options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, TypeError, "needs batches"),
        ({"batches": TEXT, "noise": 1.0}, TypeError, r"has no option \['noise'\]"),
        ({"batches": TEXT, "n_experts": 8}, ValueError, "n_experts must be 7 or left out, got 8"),
    ],
)
def test_the_door_names_what_does_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        upcycle(dense(), method="own-units", **options)


def test_inputs_that_are_not_finite_are_named_by_layer():
    net = dense()
    with torch.no_grad():
        net.model.layers[0].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer 1 is not finite"):
        from_dense(net, split=8, active=3, shared=1, batches=TEXT)


# --- groups ---


@pytest.mark.parametrize("seed", range(4))
def test_groups_have_one_size_and_no_two_rows_would_both_gain(seed):
    cost = torch.rand(60, 5, generator=seeded(seed))
    groups = balanced_assignment(cost)
    assert groups.bincount(minlength=5).tolist() == [12] * 5
    gain = cost - cost.mean(1, keepdim=True)
    own = gain.gather(1, groups[:, None])
    worst = torch.stack([own[groups == g].max() for g in range(5)])
    # A row that prefers another group finds nobody there whom that group would give up for it.
    assert not ((gain < own) & (gain < worst)).any()
    best = cost.repeat_interleave(12, dim=1).numpy()
    least = best[linear_sum_assignment(best)].sum()
    assert least <= float(cost.gather(1, groups[:, None]).sum()) < 1.3 * least


def test_rows_that_cannot_be_divided_are_refused():
    with pytest.raises(ValueError, match="7 rows cannot be divided into 2"):
        balanced_assignment(torch.zeros(7, 2))


def test_equal_rows_are_divided_too():
    assert balanced_groups(torch.zeros(12, 3), 4, generator=seeded()).bincount().tolist() == [3] * 4


def test_planted_groups_are_found():
    truth = torch.arange(4).repeat_interleave(10)[torch.randperm(40, generator=seeded())]
    points = 3.0 * torch.eye(4)[truth] + 0.1 * torch.randn(40, 4, generator=seeded())
    groups = balanced_groups(points, 4, generator=seeded())
    assert len({(int(a), int(b)) for a, b in zip(truth, groups, strict=True)}) == 4


def test_one_loud_token_is_not_the_profile():
    sizes = torch.rand(50, 6, generator=seeded())
    loud = sizes.clone()
    loud[0] *= 1000
    torch.testing.assert_close(profiles(loud), profiles(sizes))
    torch.testing.assert_close(profiles(sizes).norm(dim=1), torch.ones(6))


def test_units_of_every_token_are_shared_and_those_that_fire_together_are_grouped():
    generator = seeded(5)
    kind = torch.arange(4).repeat_interleave(6)[torch.randperm(24, generator=generator)]  # 0: always
    topic = torch.randint(1, 4, (200,), generator=generator)
    fires = (kind == topic[:, None]) | (kind == 0)
    activations = fires * (1 + 0.1 * torch.randn(200, 24, generator=generator)) * torch.where(kind == 0, 0.5, 1.0)
    down = torch.randn(8, 24, generator=generator)
    down = down / down.norm(dim=0)
    order = unit_order(activations, down, split=4, shared=1, generator=generator)
    blocks = kind[order].view(4, 6)
    assert (blocks == blocks[:, :1]).all() and blocks[0, 0] == 0
    # What counts is what a unit writes, not what it holds.
    topic_one = (kind == 1).float()
    order = unit_order(activations, down * (1 + 9 * topic_one), split=4, shared=1, generator=generator)
    assert (kind[order[:6]] == 1).all()


def test_norms_are_those_of_what_blocks_write():
    a, down = torch.randn(5, 12, generator=seeded()), torch.randn(7, 12, generator=seeded(1))
    norms = block_norms(a, down, 3)
    assert norms[2, 1] == pytest.approx(float((down[:, 4:8] @ a[2, 4:8]).norm()), rel=1e-5)


def test_the_router_finds_the_blocks_that_write_most():
    x, truth = torch.randn(500, 16, generator=seeded()), torch.randn(6, 16, generator=seeded(1))
    norms = 5.0 + 0.3 * x @ truth.T
    loud = torch.ones(500, 1)
    loud[::7] = 1000.0  # a few tokens whose norms are all large must not decide
    rows = fit_router(x, norms * loud, spread=0.1)
    logits_TE = x @ rows.T
    assert (logits_TE.argmax(1) == norms.argmax(1)).float().mean() > 0.95
    centred = logits_TE - logits_TE.mean(1, keepdim=True)
    assert float(centred.square().mean().sqrt()) == pytest.approx(0.1, rel=1e-4)


def test_half_of_the_units_say_more_when_grouped_by_what_fires_together():
    generator = seeded(7)
    width, units, topics = 32, 96, 6
    directions = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q[: topics + 1]
    topic_of = torch.randint(topics, (units,), generator=generator)
    always = torch.rand(units, generator=generator) < 0.25
    gate = torch.where(always[:, None], directions[topics], directions[topic_of]) * 4.0
    down = torch.randn(width, units, generator=generator)

    def texts(n):
        topic = torch.randint(topics, (n,), generator=generator)
        return 2.0 * (directions[topic] + directions[topics]) + 0.1 * torch.randn(n, width, generator=generator)

    def lost(order, seen, asked, shared):
        """Share of the output's energy that is missing with half of the blocks active, the router fitted on other tokens."""
        a, d = torch.relu(seen @ gate.T)[:, order], down[:, order]
        rows = fit_router(seen, block_norms(a, d, 12)[:, shared:], spread=0.1)
        chosen = (asked @ rows.T).topk(6 - shared, dim=1).indices
        on = torch.zeros(len(asked), 12 - shared).scatter(1, chosen, 1.0)
        on = torch.cat((torch.ones(len(asked), shared), on), dim=1).repeat_interleave(units // 12, dim=1)
        inner = torch.relu(asked @ gate.T)[:, order]
        return float(((inner * (1 - on)) @ d.T).square().sum() / (inner @ d.T).square().sum())

    seen, asked = texts(400), texts(200)
    activations = torch.relu(seen @ gate.T)
    ours = unit_order(activations, down, split=12, shared=3, generator=generator)
    apart = unit_order(activations, down, split=12, shared=0, generator=generator)  # no block is always on
    chance = torch.randperm(units, generator=generator)
    assert lost(ours, seen, asked, 3) < 0.1 * lost(chance, seen, asked, 3)
    assert lost(apart, seen, asked, 0) < 0.1 * lost(chance, seen, asked, 0)
