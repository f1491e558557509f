"""A mixture of attentions against the sum of transformers' own attention modules, one by one."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from mixtura.lm.model import Attention, AttentionMixture, MixturaConfig
from mixtura.lm.model.attention import FEW_TOKENS, MixturaRotaryEmbedding

SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
KINDS = {
    "plain": (LlamaAttention, LlamaConfig(**SHAPE), {}),
    "biases": (LlamaAttention, LlamaConfig(**SHAPE, attention_bias=True), {"qkv_bias": True, "o_bias": True}),
    "query biases": (Qwen2Attention, Qwen2Config(**SHAPE), {"qkv_bias": True}),
    "query and key norms": (Qwen3Attention, Qwen3Config(**SHAPE), {"qk_norm": "head"}),
}
N = 3
# Same products, other order of summation: float32 rounding of outputs of size 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def mixture(engine="eager", **parts):
    torch.manual_seed(0)
    config = MixturaConfig(**SHAPE, attention="mixture", attention_experts=N, **parts)
    config._attn_implementation = engine
    layer = AttentionMixture(config, 0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (1.0 if parameter.shape[-2:] == (1, 8) else 0.0))
    return layer


def tables(layer, positions):
    return MixturaRotaryEmbedding(layer.config)(torch.zeros(1), positions[None])


def expert(layer, kind, i):
    """The i-th attention as a module of transformers, with that expert's weights."""
    cls, config, _ = KINDS[kind]
    config._attn_implementation = "eager"
    single = cls(config, 0).eval()
    names = {name: getattr(layer, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    state = {f"{k}.weight": v for k, v in names.items()}
    state |= {f"{k}.bias": b for k in names if (b := getattr(layer, f"{k}_bias")) is not None}
    if layer.q_norm is not None:
        state |= {"q_norm.weight": layer.q_norm.weight[:, 0], "k_norm.weight": layer.k_norm.weight[:, 0]}
    single.load_state_dict({k: v[min(i, len(v) - 1)] for k, v in state.items()})
    return single


def causal(length, seen=0):
    mask = torch.full((length, length + seen), float("-inf")).triu(1 + seen)
    return mask[None, None]


def by_hand(layer, kind, x):
    """sum_i g_i(x) MHA_i(x), one expert after the other."""
    gates = layer.router(x).softmax(-1)
    kept = {"soft": N, "top1": 1, "top2": 2}[layer.config.attention_routing]
    smallest = gates.topk(kept, dim=-1).values[..., -1:]
    gates = torch.where(gates >= smallest, gates, 0.0)
    positions = tables(layer, torch.arange(x.shape[1]))
    outputs = [
        expert(layer, kind, i)(x, position_embeddings=positions, attention_mask=causal(x.shape[1]))[0] for i in range(N)
    ]
    return sum(gates[..., i : i + 1] * y for i, y in enumerate(outputs))


@pytest.mark.parametrize("length", [7, FEW_TOKENS])
@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("routing", ["soft", "top1", "top2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["eager", "sdpa"])
def test_one_call_equals_the_sum_of_attentions(engine, kind, routing, kv, length):
    layer = mixture(engine, attention_kv=kv, attention_routing=routing, **KINDS[kind][2])
    x = torch.randn(2, length, 32)
    got = layer(x, tables(layer, torch.arange(length)), causal(length))[0]
    torch.testing.assert_close(got, by_hand(layer, kind, x), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_flex_attention_agrees(kv):
    from torch.nn.attention.flex_attention import create_block_mask

    layer, x = mixture("flex_attention", attention_kv=kv), torch.randn(1, 128, 32)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu")
    with torch.no_grad():
        got = layer(x, tables(layer, torch.arange(128)), mask)[0]
        torch.testing.assert_close(got, by_hand(layer, "plain", x), **CLOSE)


@pytest.mark.parametrize("kv", ["expert", "shared"])
def test_every_gradient_equals_that_of_the_sum(kv):
    layer, x = mixture("sdpa", attention_kv=kv), torch.randn(2, 9, 32, requires_grad=True)
    layer(x, tables(layer, torch.arange(9)), causal(9))[0].square().sum().backward()
    got = {name: p.grad.clone() for name, p in layer.named_parameters()} | {"x": x.grad.clone()}
    layer.zero_grad()
    x.grad = None
    positions, gates = tables(layer, torch.arange(9)), layer.router(x).softmax(-1)
    total = 0.0
    for i in range(N):
        one = Attention(MixturaConfig(**SHAPE), 0).eval()
        one.config._attn_implementation = "eager"
        weights = {
            f"{k}.weight": getattr(layer, k)[min(i, len(getattr(layer, k)) - 1)]
            for k in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        total = total + gates[..., i : i + 1] * torch.func.functional_call(one, weights, (x, positions, causal(9)))[0]
    total.square().sum().backward()
    want = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kv", ["expert", "shared"])
@pytest.mark.parametrize("engine", ["eager", "sdpa"])
def test_decoding_with_a_cache_equals_the_whole_pass(engine, kv):
    layer, x = mixture(engine, attention_kv=kv), torch.randn(2, 6, 32)
    whole = layer(x, tables(layer, torch.arange(6)), causal(6))[0]
    cache, parts = DynamicCache(), []
    for first, last in ((0, 4), (4, 5), (5, 6)):
        positions = tables(layer, torch.arange(first, last))
        parts.append(layer(x[:, first:last], positions, causal(last - first, first), past_key_values=cache)[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    assert cache.layers[0].keys.shape[1] == (N if kv == "expert" else 1) * 2


def test_a_batch_gives_what_its_rows_give():
    layer, x = mixture("sdpa"), torch.randn(3, 5, 32)
    positions = tables(layer, torch.arange(5))
    rows = [layer(row[None], positions, causal(5))[0] for row in x]
    torch.testing.assert_close(layer(x, positions, causal(5))[0], torch.cat(rows), **CLOSE)


def test_the_names_of_the_experts_do_not_matter():
    layer, x = mixture(), torch.randn(1, 5, 32)
    positions, order = tables(layer, torch.arange(5)), torch.tensor([2, 0, 1])
    before = layer(x, positions, causal(5))[0]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(parameter[order])
            assert name
    torch.testing.assert_close(layer(x, positions, causal(5))[0], before, **CLOSE)


def test_clones_give_the_attention_itself_whatever_the_gates():
    layer, x = mixture(), torch.randn(2, 5, 32)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer, name)[:] = getattr(layer, name)[:1].clone()
    positions = tables(layer, torch.arange(5))
    single = expert(layer, "plain", 0)(x, position_embeddings=positions, attention_mask=causal(5))[0]
    torch.testing.assert_close(layer(x, positions, causal(5))[0], single, **CLOSE)


def test_the_gates_of_a_pass_can_be_read_and_hold_no_graph():
    layer, x = mixture(attention_routing="top2"), torch.randn(2, 5, 32)
    layer(x, tables(layer, torch.arange(5)), causal(5))
    assert layer.routing.weights.shape == layer.routing.indices.shape == (10, 2)
    torch.testing.assert_close(layer.routing.probs, layer.routing.logits.softmax(-1))
    assert not layer.routing.weights.requires_grad
