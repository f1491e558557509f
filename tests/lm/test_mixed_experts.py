"""Compression of a mixture: factors, allocation, rounding, and what comes back from the disk."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mixtura.core.gptq import NonFiniteHessian
from mixtura.core.quantize import nearest
from mixtura.lm.anatomy import find_moe, recorded_routing
from mixtura.lm.compress.factors import ExpertFactors, expert_factors
from mixtura.lm.compress.layers import LayerInputs, linear_inputs, other_linears
from mixtura.lm.compress.mixed_experts import RELEASED, allocate_bits, convert, export_dense
from mixtura.lm.loading import directory_bytes

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")


def tokens(rows: int = 6, length: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_errors_by_routed_tokens_equal_recomputing_the_block_with_one_expert_rounded():
    model, ids = tiny_model("mixtral"), tokens()
    factors = expert_factors(model, ids, bits=(1, 2, 3))
    block = find_moe(model)[1]
    kept: list[torch.Tensor] = []
    hook = block.module.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    logits(model, ids)
    hook.remove()
    x = torch.cat(kept)
    with torch.no_grad():
        want = block.module(x)
        for e in range(4):
            for j, b in enumerate((1, 2, 3)):
                up, down = (p.data[e].clone() for p in (block.experts.gate_up_proj, block.experts.down_proj))
                block.experts.gate_up_proj.data[e] = nearest(up, b, 32).dequantize()
                block.experts.down_proj.data[e] = nearest(down, b, 32).dequantize()
                naive = (block.module(x) - want).norm()
                block.experts.gate_up_proj.data[e], block.experts.down_proj.data[e] = up, down
                assert factors.error[1, e, j] == pytest.approx(naive.item(), rel=1e-4)


def test_frequencies_sum_to_k_and_weights_are_probabilities_before_renormalisation():
    model, ids = tiny_model("mixtral"), tokens()
    factors = expert_factors(model, ids)
    assert factors.frequency.sum(1) == pytest.approx([2.0] * 4)
    with recorded_routing(model) as routings:
        logits(model, ids)
    for i, block in enumerate(find_moe(model)):
        routing = routings[block.name]
        want = torch.zeros(4)
        for t in range(len(routing.logits)):
            for e in routing.indices[t].tolist():
                want[e] += routing.logits[t].softmax(-1)[e] / len(routing.logits)
        torch.testing.assert_close(factors.weight[i], want, rtol=1e-4, atol=1e-6)


def test_identical_experts_with_identical_gates_have_identical_factors():
    model = tiny_model("mixtral")
    for block in find_moe(model):
        block.gate.weight.data[1] = block.gate.weight.data[0]
        block.experts.gate_up_proj.data[1] = block.experts.gate_up_proj.data[0]
        block.experts.down_proj.data[1] = block.experts.down_proj.data[0]
    # With both always chosen together the tie between them cannot fall on one side.
    for block in find_moe(model):
        block.gate.weight.data[2:] = -block.gate.weight.data[0]
    factors = expert_factors(model, tokens(20, 40))
    for i in range(4):
        both = factors.frequency[i, :2]
        assert both[0] == pytest.approx(both[1].item(), abs=1e-6)
        assert factors.weight[i, 0] == pytest.approx(factors.weight[i, 1].item(), rel=1e-4)
        torch.testing.assert_close(factors.error[i, 0], factors.error[i, 1], rtol=1e-4, atol=1e-5)


def test_factors_survive_the_disk(tmp_path: Path):
    factors = expert_factors(tiny_model("mixtral"), tokens())
    factors.save(tmp_path / "f.safetensors")
    again = ExpertFactors.load(tmp_path / "f.safetensors")
    assert torch.equal(again.error, factors.error) and again.bits == (1, 2, 3) and again.tokens == factors.tokens


def test_allocations_meet_the_average_and_spend_it_where_it_counts():
    factors = ExpertFactors(
        frequency=torch.tensor([[1.0, 0.5, 0.3, 0.2]] * 2),
        weight=torch.tensor([[0.6, 0.2, 0.1, 0.1]] * 2),
        error=torch.tensor([[[9.0, 3.0, 1.0]] * 4, [[90.0, 30.0, 10.0]] * 4]),
        bits=(1, 2, 3),
        tokens=100,
    )
    block = allocate_bits(factors, 2.0, equality=True)
    assert block.sum(1).tolist() == [8, 8] and block[0, 0] == 3
    model = allocate_bits(factors, 2.0, equality=True, scope="model", at_least={})
    assert model.sum() == 16 and model[1].sum() > model[0].sum()  # the second block hurts ten times as much
    assert allocate_bits(factors, 2.0, exponents=RELEASED).shape == (2, 4)
    assert allocate_bits(factors, 3.0).sum(1).tolist() == [11, 11]  # one expert of 2 bits stays
    assert allocate_bits(factors, 3.0, at_least={}).sum(1).tolist() == [12, 12]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_compressed_model_comes_back_from_the_disk_to_the_bit(family: str, tmp_path: Path):
    model, ids = tiny_model(family), tokens()
    small = convert(model, ids, average_bits=2.25)
    want = logits(small, ids)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), want)
    torch.testing.assert_close(logits(export_dense(again, torch.float32), ids), want, rtol=1e-3, atol=1e-3)


def test_it_loads_in_a_process_that_only_imports_mixtura(tmp_path: Path):
    model, ids = tiny_model("mixtral"), tokens(1, 8)
    small = convert(model, ids.repeat(4, 5), average_bits=2.0)
    small.save_pretrained(tmp_path / "m")
    code = (
        "import mixtura, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'm')!r})\n"
        f"print(m(input_ids=torch.tensor({ids.tolist()})).logits.double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(logits(small, ids).double().sum().item(), rel=1e-5)


def test_the_file_holds_what_the_bits_say(tmp_path: Path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
    )
    model = MixtralForCausalLM(config).eval()
    small = convert(model, tokens(), average_bits=2.5, rounding="nearest")
    small.save_pretrained(tmp_path)
    experts = 2 * 8 * 3 * 256 * 256
    attention = 2 * (2 * 256 * 256 + 2 * 256 * 128)
    scales = 24 / 128  # bits a weight: float16 scale and a byte of zero point for each group of 128
    rest = 4 * (2 * 64 * 256 + 2 * 8 * 256 + 5 * 256)  # float32: embedding, head, routers, norms
    stated = (experts * (2.5 + scales) + attention * (4 + scales)) / 8 + rest
    assert directory_bytes(tmp_path) == pytest.approx(stated, rel=0.05)
    held = sum(block.experts.nbytes for block in find_moe(small))
    assert held <= 2.5 / 16 * (2 * experts) * 1.15


def test_gptq_changes_a_blocks_output_less_than_rounding_to_nearest():
    """For every expert with more tokens than twice its width, on the inputs it was calibrated with."""
    model, ids = tiny_model("mixtral"), tokens(24, 40)
    errors = {}
    for rounding in ("gptq", "nearest"):
        small = convert(model, ids, allocation=torch.full((4, 4), 2), other_bits=None, rounding=rounding)
        errors[rounding] = _errors_by_expert(model, small, ids)
    assert len(errors["gptq"]) >= 3
    for expert, off in errors["gptq"].items():
        assert off < errors["nearest"][expert], expert


def _errors_by_expert(model, small, ids) -> dict[int, float]:
    """First block: squared output error of each expert on its tokens."""
    block, packed = find_moe(model)[0], find_moe(small)[0]
    seen = {}
    hook = block.experts.register_forward_pre_hook(lambda module, args: seen.update(x=args[0], indices=args[1]))
    logits(model, ids)
    hook.remove()
    found = {}
    for e in range(4):
        x = seen["x"][(seen["indices"] == e).any(-1)]
        if len(x) > 2 * x.shape[1]:
            indices = torch.full((len(x), 1), e)
            ones = torch.ones(len(x), 1)
            with torch.no_grad():
                off = block.experts(x, indices, ones) - packed.experts(x, indices, ones)
            found[e] = off.square().sum().item()
    return found


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_linear_layers_share_a_hessian_where_they_read_the_same_tensor(family: str):
    model = tiny_model(family)
    batches = list(tokens(rows=6).split(4))
    inputs = LayerInputs(model, batches)
    path, layer = inputs.layers[0]
    linears = other_linears(layer)
    alone = {name: torch.zeros(()) for name in linears}

    def add(name: str):
        def hook(module, args) -> None:
            x = args[0].flatten(0, -2)
            alone[name] = alone[name] + 2 * x.T @ x

        return hook

    hooks = [linear.register_forward_pre_hook(add(name)) for name, linear in linears.items()]
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    with torch.inference_mode():
        shared = linear_inputs(inputs, layer, linears)
    assert sorted(name for names, _ in shared for name in names) == sorted(linears)
    for names, hessian in shared:
        for name in names:
            torch.testing.assert_close(hessian, alone[name], msg=f"{path}.{name}")
    if family == "mixtral":
        assert sorted(map(len, (names for names, _ in shared))) == [1, 3]  # the output alone; queries, keys and values


def test_the_input_model_is_left_alone_unless_told_otherwise():
    model, ids = tiny_model("mixtral"), tokens()
    want = logits(model, ids)
    convert(model, ids, average_bits=2.0)
    assert torch.equal(logits(model, ids), want)
    assert convert(model, ids, average_bits=2.0, inplace=True) is model


def test_an_idle_expert_is_said_and_still_rounded(caplog):
    model = tiny_model("mixtral")
    for block in find_moe(model):
        block.gate.weight.data[3] = 0
        block.gate.weight.data[:3] = block.gate.weight.data[:3].abs()
    hook = [b.gate.register_forward_hook(_never_the_last) for b in find_moe(model)]
    small = convert(model, tokens(), average_bits=2.0)
    assert hook and "saw no calibration token" in caplog.text
    assert all(torch.isfinite(b.experts.up.dequantize(3)).all() for b in find_moe(small))


def _never_the_last(module, args, output):
    logits_TE, weights, indices = output
    return logits_TE, weights, indices.clamp(max=2)


def test_bad_input_is_named():
    model, ids = tiny_model("mixtral"), tokens()
    dense = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM is a dense model"):
        convert(dense, ids)
    with pytest.raises(ValueError, match=r"average_bits=9 cannot be met.*between 1\.75 and 3"):
        convert(model, ids, average_bits=9)
    with pytest.raises(ValueError, match="average_bits=1 cannot be met"):
        convert(model, ids, average_bits=1)
    with pytest.raises(ValueError, match=r"allocation must have shape \(4, 4\)"):
        convert(model, ids, allocation=torch.ones(2, 4))
    with pytest.raises(ValueError, match="rounding must be"):
        convert(model, ids, rounding="up")
    small = convert(model, ids, average_bits=2.0)
    with pytest.raises(ValueError, match="packed already"):
        convert(small, ids)
    with pytest.raises(ValueError, match=r"no stacked gate_up_proj|biases|transposed"):
        convert(tiny_model("gpt_oss"), ids)
    find_moe(model)[0].experts.gate_up_proj.data[0, 0, 0] = float("nan")
    with pytest.raises((ValueError, NonFiniteHessian)):
        convert(model, ids, average_bits=2.0)


@pytest.mark.parametrize("attention", ["expert-kv", "shared-kv"])
def test_attention_experts_are_packed_and_come_back(attention: str, tiny_dense: Path, tmp_path: Path):
    from mixtura.lm import upcycle

    model = upcycle([str(tiny_dense)] * 3, method="branch-attend-mix", attention=attention, top_k=2)
    ids = torch.randint(2, 200, (4, 30), generator=torch.Generator().manual_seed(0))
    want = logits(model, ids)
    small = convert(model, ids, average_bits=3.0)
    assert type(small.model.layers[0].self_attn.q_stack).__name__ == "PackedLinear"
    assert (logits(small, ids) - want).abs().mean() < 0.2 * want.abs().mean()
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), logits(small, ids))
    torch.testing.assert_close(
        logits(export_dense(again, torch.float32), ids), logits(small, ids), rtol=1e-3, atol=1e-3
    )


def test_unstacking_attention_changes_nothing(tiny_dense: Path):
    from mixtura.lm import upcycle
    from mixtura.lm.compress.layers import unstack_attention

    model = upcycle([str(tiny_dense)] * 2, method="branch-attend-mix")
    ids = torch.randint(2, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    want = logits(model, ids)
    unstack_attention(model)
    torch.testing.assert_close(logits(model, ids), want, rtol=1e-5, atol=1e-5)
