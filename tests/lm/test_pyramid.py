"""Pyramids of experts beside fixed networks: against one-hot products, hand calculations and the dense model they start from."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mixtura.core.balance import load_balance_loss
from mixtura.core.capacity import capacity
from mixtura.core.dispatch import experts_forward
from mixtura.core.gates import limit_capacity, top_k
from mixtura.lm import upcycle
from mixtura.lm.anatomy import find_moe, recorded_routing
from mixtura.lm.cost import model_size
from mixtura.lm.families import NotDense, native_family, read_dense, why_not
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.pyramid import PAPER, PyramidResidualFFN, by_layer, expert_schedule, paper_config
from mixtura.lm.training import language_loss
from mixtura.lm.upcycle.pyramid import PyramidConfig, convert

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
PYRAMID = {
    "num_experts": [0, 2, 0, 4],
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "shared_expert_intermediate_size": 48,
    "shared_combine": "coefficient",
    "router_float32": True,
}
TIGHT = {"capacity_factor": 1.0, "eval_capacity_factor": 1.0, "min_capacity": 1}
TOKENS = torch.randint(2, 61, (2, 11), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order; logits are of size 1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def decoder(**parts):
    torch.manual_seed(0)
    return MixturaForCausalLM(MixturaConfig(**SHAPE | PYRAMID | copy.deepcopy(parts), initializer_range=0.2)).eval()


def dense_model(**parts):
    torch.manual_seed(0)
    return MixturaForCausalLM(MixturaConfig(**SHAPE | copy.deepcopy(parts), initializer_range=0.2)).eval()


def llama():
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return LlamaForCausalLM(LlamaConfig(**{n: SHAPE[n] for n in names}, initializer_range=0.2)).eval()


def one_hot_mixture(x, up, down, logits, k, factor):
    """The mixture by masks and products over [T, E, C], nothing sorted: what tables must reproduce."""
    n_tokens, n_experts = logits.shape
    places = max(math.ceil(n_tokens * k * factor / n_experts), 4)
    probs = logits.softmax(-1)
    values, indices = probs.topk(k, dim=-1)
    chosen = F.one_hot(indices, n_experts).to(x.dtype)  # (T, K, E)
    queue = chosen.flatten(0, 1).cumsum(0).view_as(chosen) - 1  # place of a pair among its expert's, in token order
    kept = chosen * (queue < places)
    slots = F.one_hot(queue.clamp(0, places - 1).long(), places).to(x.dtype) * kept[..., None]  # (T, K, E, C)
    inside = torch.einsum("tkec,td->ecd", slots, x)
    hidden = F.relu(torch.einsum("ecd,ehd->ech", inside, up))
    outside = torch.einsum("ech,edh->ecd", hidden, down)
    return torch.einsum("tkec,tk,ecd->td", slots, values, outside), n_tokens * k - int(kept.sum())


def by_table(x, up, down, logits, k, factor):
    n_tokens, n_experts = logits.shape
    routing = top_k(logits, k, renormalise=False)
    limit = capacity(n_tokens, n_experts, factor * k)
    routing = limit_capacity(routing, limit, policy="prefix")
    return experts_forward(x, up, down, routing.indices, routing.weights, activation="relu"), routing.dropped


@pytest.mark.parametrize("tokens", [1, 7, 1024])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 1), (4, 2), (64, 1), (64, 2)])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_tables_give_what_one_hot_products_give_in_output_and_every_gradient(tokens, experts, factor, k):
    draw = seeded(tokens + experts)
    inputs = [
        torch.randn(*shape, generator=draw) * 0.5
        for shape in ((tokens, 6), (experts, 5, 6), (experts, 6, 5), (tokens, experts))
    ]
    found = []
    for way in (one_hot_mixture, by_table):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, dropped = way(*leaves, k, factor)
        (y * torch.arange(6.0)).sum().backward()
        found.append([y, *(t.grad for t in leaves)])
        found[-1].append(torch.tensor(dropped))
    for name, want, got in zip(("y", "x", "up", "down", "logits", "dropped"), *found, strict=True):
        # 1e-6 of the largest entry: a weight's gradient sums up to 1024 rows in float32, in another order.
        scale = max(1.0, want.abs().max().item())
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


def one(x, up, down):
    gate, value = (up @ x).chunk(2)
    return down @ (F.silu(gate) * value)


@pytest.mark.parametrize("combine", ["sum", "coefficient"])
def test_the_layer_is_the_formula_token_by_token(combine):
    layer = PyramidResidualFFN(6, 5, 3, combine=combine, generator=seeded()).double()
    experts, fixed = layer.experts.experts, layer.experts.fixed
    if combine == "coefficient":
        with torch.no_grad():
            layer.experts.coefficient.weight.normal_(generator=seeded(2))
            layer.experts.coefficient.bias.normal_(generator=seeded(3))
    x = torch.randn(9, 6, generator=seeded(1), dtype=torch.float64)
    rows = []
    for u in x:
        p = (layer.gate.weight @ u).softmax(0)
        e = int(p.argmax())
        routed = p[e] * one(u, experts.gate_up_proj[e], experts.down_proj[e])
        always = one(u, fixed.up_proj.weight, fixed.down_proj.weight)
        a = b = torch.tensor(1.0, dtype=torch.float64)
        if combine == "coefficient":
            a, b = (layer.experts.coefficient.weight @ u + layer.experts.coefficient.bias).softmax(-1)
        rows.append(a * routed + b * always)
    # The coefficient is computed in float32, as the released code does.
    torch.testing.assert_close(layer(x), torch.stack(rows), rtol=1e-6, atol=1e-6)


def test_one_expert_and_a_sum_is_the_sum_of_two_networks():
    layer = PyramidResidualFFN(6, 5, 1, combine="sum", generator=seeded()).double()
    x = torch.randn(7, 6, generator=seeded(1), dtype=torch.float64)
    expert, fixed = layer.experts.experts, layer.experts.fixed
    want = torch.stack([one(u, expert.gate_up_proj[0], expert.down_proj[0]) for u in x]) + fixed(x)
    torch.testing.assert_close(layer(x), want)


def test_the_router_learns_from_the_output_alone():
    layer = PyramidResidualFFN(6, 5, 3, aux_coef=0.0, generator=seeded())
    layer(torch.randn(9, 6, generator=seeded(1))).square().sum().backward()
    assert layer.gate.weight.grad.abs().max() > 1e-3  # weights made to sum to 1 would leave it at 0


def test_dropped_tokens_are_counted_and_keep_the_fixed_network_and_evaluation_keeps_the_first():
    layer = PyramidResidualFFN(6, 5, 2, combine="sum", drop=True, min_capacity=1, generator=seeded()).eval()
    with torch.no_grad():
        layer.gate.weight.zero_()  # all tie: every token wants expert 0, which takes 8 / 2
    x = torch.randn(8, 6, generator=seeded(1))
    out = layer.mix(x)
    assert out.routing.dropped == 4 and out.routing.indices.flatten().tolist() == [0] * 4 + [2] * 4
    torch.testing.assert_close(out.hidden[4:], layer.experts.fixed(x)[4:])
    assert (out.hidden[:4] - layer.experts.fixed(x)[:4]).abs().min(0).values.max() > 1e-3
    # Balance is asked of what the gate wanted: all to expert 0, at probability 1/2.
    assert out.aux_loss.item() == pytest.approx(0.01)


def test_training_keeps_tokens_of_every_place_alike_and_the_same_seed_keeps_the_same():
    layer = PyramidResidualFFN(4, 3, 1, drop=True, capacity_factor=0.5, generator=seeded()).train()
    x = torch.randn(20, 4, generator=seeded(1))
    kept = torch.zeros(20)
    for i in range(200):
        kept += layer.mix(x, seeded(i)).routing.indices.flatten() == 0
    # Each place is kept with probability 1/2 in 200 draws: standard deviation 7; six of them, 20 places, false alarm < 1e-7.
    assert (kept - 100).abs().max() < 6 * 7.08
    first, again = (layer.mix(x, seeded(5)).routing.indices for _ in range(2))
    assert torch.equal(first, again)


def test_identical_start_copies_one_network_and_independent_start_does_not():
    same = PyramidResidualFFN(6, 5, 3, init="identical", generator=seeded())
    stacked, single = same.experts.experts.down_proj, same.experts.fixed.down_proj.weight
    assert all(torch.equal(expert, single) for expert in stacked)
    stacked = PyramidResidualFFN(6, 5, 3, generator=seeded()).experts.experts.down_proj
    assert not torch.equal(stacked[0], stacked[1])


@pytest.mark.parametrize(("name", "billions"), zip(PAPER, (13, 4, 3.5, 52, 31, 27), strict=True))
def test_the_papers_models_have_the_papers_parameters(name, billions):
    with torch.device("meta"):
        total = model_size(MixturaForCausalLM(paper_config(name))).total
    assert total == pytest.approx(billions * 1e9, rel=0.03)


# The decoder.


@pytest.mark.parametrize("engine", ["eager", "grouped_mm", "batched_mm", "mixtura"])
@pytest.mark.parametrize("limits", [{}, TIGHT])
def test_every_engine_computes_a_pyramid_with_and_without_limits(engine, limits):
    want, got = decoder(**limits), decoder(**limits)
    want.set_experts_implementation("eager")
    got.set_experts_implementation(engine)
    for net in (want, got):
        net(TOKENS, labels=TOKENS).loss.backward()
    torch.testing.assert_close(got(TOKENS).logits, want(TOKENS).logits, **CLOSE)
    grads = [dict(net.named_parameters()) for net in (want, got)]
    for name, p in grads[0].items():
        if p.grad is not None:
            torch.testing.assert_close(grads[1][name].grad, p.grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_layers_have_the_experts_the_list_says_and_dropped_tokens_are_seen():
    net = decoder(**TIGHT)
    assert [block.n_experts for block in find_moe(net)] == [2, 4]
    with recorded_routing(net) as routings:
        net(TOKENS)
    for routing in routings.values():
        limit = math.ceil(22 / routing.n_experts)
        counts = torch.bincount(top_k(routing.logits, 1).indices.flatten(), minlength=routing.n_experts)
        assert routing.dropped == int((counts - limit).clamp(min=0).sum()) > 0


def test_the_balance_of_a_training_counts_what_gates_wanted():
    net = decoder(**TIGHT)
    free = decoder()
    routed, wide = (language_loss(n, TOKENS, balance=1.0) - language_loss(n, TOKENS) for n in (net, free))
    with recorded_routing(net) as routings:
        net(TOKENS)
    wanted = [load_balance_loss(r.probs, top_k(r.logits, 1).indices) for r in routings.values()]
    torch.testing.assert_close(routed, sum(wanted) / 2, **CLOSE)
    assert wide > 0


def test_gates_are_computed_in_float32_whatever_the_weights_are():
    net = decoder().to(torch.bfloat16)
    logits = net(TOKENS, output_router_logits=True).router_logits
    assert {t.dtype for t in logits} == {torch.float32}
    plain = decoder(router_float32=False).to(torch.bfloat16)(TOKENS, output_router_logits=True).router_logits
    assert {t.dtype for t in plain} == {torch.bfloat16}


def test_a_pyramid_is_saved_and_loaded_to_the_bit(tmp_path):
    net = decoder(**TIGHT)
    net.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.num_experts == [0, 2, 0, 4]
    for engine in ("mixtura", "eager"):
        for m in (net, again):
            m.set_experts_implementation(engine)
        assert torch.equal(again(TOKENS).logits, net(TOKENS).logits)


def test_equal_counts_in_a_list_are_one_number_and_dense_layers():
    config = MixturaConfig(**SHAPE | PYRAMID | {"num_experts": [0, 4, 0, 4]})
    assert config.num_experts == 4 and config.dense_layers == [0, 2]
    assert [config.experts_of(i) for i in range(4)] == [0, 4, 0, 4]


@pytest.mark.parametrize("held", [{"num_experts": [0, 4, 0, 4]}, {"num_experts": 4}])
def test_a_sum_of_equal_counts_is_written_as_qwen2_moe(held, tmp_path):
    net = decoder(shared_combine="sum", qkv_bias=True, **held)
    net.save_pretrained(tmp_path, family="qwen2_moe")
    native = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(native).__name__ == "Qwen2MoeForCausalLM"
    torch.testing.assert_close(native(TOKENS).logits, net(TOKENS).logits, **CLOSE)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "layers with different numbers of experts"),
        ({"num_experts": 4}, "a learned share of the shared expert"),
        ({"num_experts": 4, "shared_combine": "sum", **TIGHT}, "a limit on the tokens of an expert"),
    ],
)
def test_what_no_family_holds_is_said_together_with_vllm(parts, message, tmp_path):
    with pytest.raises(ValueError, match=f"cannot express .*{message}.*vLLM"):
        decoder(**parts).save_pretrained(tmp_path, family="qwen2_moe")


# From a dense model.


@pytest.mark.parametrize("combine", ["sum", "coefficient"])
@pytest.mark.parametrize("parts", [{}, {"mlp_gated": False, "mlp_bias": True, "norm": "layer"}])
def test_conversion_changes_no_bit_of_the_output(combine, parts):
    dense = dense_model(**parts)
    with torch.no_grad():
        for name, p in dense.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=seeded())
    # An engine of our own choice for both would be one more difference: attention and norms are the same code here.
    grown = convert(dense, PyramidConfig(num_experts=[2, 4], combine=combine))
    assert torch.equal(grown(TOKENS).logits, dense(TOKENS).logits)
    assert [block.n_experts for block in find_moe(grown)] == [2, 4]


@pytest.mark.parametrize("combine", ["sum", "coefficient"])
def test_conversion_of_a_transformers_model_keeps_its_logits_and_the_model_as_it_was(combine):
    dense = llama()
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    grown = upcycle(dense, method="pyramid", n_experts=[2, 4], combine=combine)
    assert torch.equal(grown(TOKENS).logits, dense(TOKENS).logits)
    assert all(torch.equal(t, before[name]) for name, t in dense.state_dict().items())
    assert grown.config.num_experts == [0, 2, 0, 4] and grown.config.shared_combine == combine


@pytest.mark.parametrize("combine", ["sum", "coefficient"])
def test_after_twenty_steps_every_expert_has_moved_and_no_two_are_equal(combine):
    grown = convert(dense_model(), PyramidConfig(num_experts=[2, 4], combine=combine)).train()
    start = {name: p.detach().clone() for name, p in grown.named_parameters() if ".experts." in name}
    for gate_up in (p for name, p in start.items() if "gate_up" in name):
        assert not torch.equal(gate_up[0], gate_up[1])  # noise told them apart
    optimizer = torch.optim.AdamW(grown.parameters(), lr=1e-3)
    for step in range(20):
        ids = torch.randint(2, 61, (4, 32), generator=seeded(step))
        optimizer.zero_grad()
        grown(ids, labels=ids).loss.backward()
        optimizer.step()
    for name, p in grown.named_parameters():
        if ".experts." in name:
            moved = (p.detach() - start[name]).flatten(1).abs().amax(1)
            assert (moved > 1e-4).all(), name
            for i in range(len(p)):
                for j in range(i):
                    assert not torch.equal(p[i], p[j]), name


def test_a_sum_with_equal_counts_becomes_a_native_family():
    grown = upcycle(llama(), method="pyramid", n_experts=4, combine="sum")
    assert type(grown).__name__ == "Qwen2MoeForCausalLM"
    torch.testing.assert_close(grown(TOKENS).logits, llama()(TOKENS).logits, **CLOSE)


def test_a_pyramid_is_no_dense_model_and_is_cut_into_segments_layer_by_layer():
    from mixtura.lm.upcycle import segment

    net = decoder(shared_combine="sum")
    with pytest.raises(NotDense, match="already a mixture"):
        read_dense(net)
    fine = segment(net, 2)
    assert fine.config.num_experts == [0, 4, 0, 8]
    torch.testing.assert_close(fine(TOKENS).logits, net(TOKENS).logits, **CLOSE)
    assert native_family(net.config) is None and why_not("mixtral", net.config)


def test_a_pyramid_is_looked_into_layer_by_layer(tmp_path):
    from mixtura.lm import inspect
    from mixtura.lm.tokens import byte_pair_tokenizer

    tokenizer = byte_pair_tokenizer(["one two three"], 260)
    net = decoder(vocab_size=260, **TIGHT)
    report = inspect(net, tokenizer, {"a": ["one two three " * 20], "b": ["x y z " * 20]}, length=8, batch_size=2)
    assert [len(experts) for experts in report.top_tokens] == [2, 4]
    share = torch.tensor(report.share)
    assert share.shape == (2, 2, 4) and share[0, :, 2:].eq(0).all()
    torch.testing.assert_close(share.sum(-1), torch.ones(2, 2))
    assert all(0 <= value <= 1 for value in report.entropy)
    report.to_html(tmp_path / "report.html")
    assert "2 mixture layers of 2 or 4 experts" in (tmp_path / "report.html").read_text()


def test_bits_for_experts_of_layers_that_differ_are_refused_with_what_would_do():
    from mixtura.lm.compress.mixed_experts import convert as pack

    with pytest.raises(ValueError, match=r"layers have \[2, 4\] experts, .*mixllm"):
        pack(decoder(shared_combine="sum"), [TOKENS])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expert_schedule(0, 4, 8), "num_moe_layers must be at least 1, got 0"),
        (lambda: expert_schedule(4, 8, 4), "top must be at least base=8"),
        (lambda: expert_schedule(4, 4, 8, 5), "num_top must be between 0 and num_moe_layers=4, got 5"),
        (lambda: by_layer([4, 8, 8], 4), r"one number for each of the 2 layers with experts .* got 3: \[4, 8, 8\]"),
        (lambda: by_layer([4, 0], 4), "num_experts must be at least 1 in every layer"),
        (lambda: by_layer(4, 1), "none of 1 layers would have experts"),
        (lambda: by_layer(4, 4, every=2, offset=2), "offset in"),
        (lambda: paper_config("7b"), "name must be one of"),
        (lambda: PyramidResidualFFN(6, 5, 0), "num_experts must be at least 1, got 0"),
        (lambda: PyramidResidualFFN(6, 5, 2, capacity_factor=0.0), "capacity_factor must be > 0, got 0.0"),
        (lambda: PyramidResidualFFN(6, 5, 2, combine="max"), "combine must be one of"),
        (lambda: PyramidResidualFFN(6, 5, 2, init="zeros"), "init must be one of"),
        (lambda: PyramidResidualFFN(6, 5, 2, backend="magic"), "backend must be one of"),
        (lambda: PyramidResidualFFN(6, 5, 2, aux_coef=-1.0), "aux_coef must be >= 0"),
        (
            lambda: PyramidResidualFFN(6, 5, 2, name="block 3")(torch.full((2, 6), torch.nan)),
            "of block 3 are not finite",
        ),
        (lambda: PyramidConfig(combine="max"), "combine must be one of"),
        (lambda: upcycle(llama(), method="pyramid", n_experts=4, top_k=2), "top_k must be 1 for a pyramid"),
        (lambda: upcycle(llama(), method="pyramid", n_experts=[4]), "one number for each of the 2 layers"),
        (lambda: MixturaConfig(**SHAPE | {"num_experts": [4, 4]}), r"for each of the 4 layers, .* got 2"),
        (lambda: MixturaConfig(**SHAPE | {"num_experts": [4, 4, -1, 4]}), "num_experts must be whole numbers >= 0"),
        (lambda: MixturaConfig(**SHAPE | PYRAMID | {"num_experts_per_tok": 3}), "between 1 and num_experts=2, got 3"),
        (
            lambda: MixturaConfig(**SHAPE | {"num_experts": 4, "shared_combine": "coefficient"}),
            "needs a part that every",
        ),
        (lambda: MixturaConfig(**SHAPE | PYRAMID | {"shared_combine": "max"}), "shared_combine must be one of"),
        (lambda: MixturaConfig(**SHAPE | PYRAMID | {"capacity_factor": -1.0}), "capacity_factor must be >= 0"),
        (lambda: MixturaConfig(**SHAPE | PYRAMID | {"capacity_policy": "last"}), "capacity_policy must be one of"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_list_of_experts_for_another_method_is_refused():
    with pytest.raises(TypeError, match="n_experts as a list goes with method='pyramid'"):
        upcycle(llama(), n_experts=[2, 4])
