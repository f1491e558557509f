"""Channels of two widths over a whole model: salience by brute force, budgets, rounding, and what comes back from the disk."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from mixtura.core.gptq import NonFiniteHessian
from mixtura.core.quantize import nearest
from mixtura.lm.anatomy import find_moe
from mixtura.lm.compress import channel_salience as salience_module
from mixtura.lm.compress.channel_salience import allocate, channel_matrices, channel_salience, sample_losses
from mixtura.lm.compress.mixed_channel_linear import MixedChannelLinear
from mixtura.lm.compress.mixed_channels import (
    MixedChannelConfig,
    average_bits,
    convert,
    export_dense,
    high_share_for,
    stored_bits,
)
from mixtura.lm.compress.mixed_experts import convert as pack_experts
from mixtura.lm.loading import directory_bytes


def tokens(rows: int = 6, length: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def dense(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2 if "embed" not in name else 1.0)
    return model


class Scaled:
    """A quantizer whose error is a fraction of the real one."""

    def __init__(self, weight: torch.Tensor, bits: int, group: int, scale: float):
        self.values = weight + scale * (nearest(weight, bits, group).dequantize() - weight)

    def dequantize(self) -> torch.Tensor:
        return self.values


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch):
    def to(scale: float) -> None:
        monkeypatch.setattr(salience_module, "nearest", lambda w, b, g: Scaled(w, b, g, scale))

    return to


@torch.no_grad()
def brute_force(model, ids, name: str, scale: float) -> list[float]:
    """Mean over samples of |loss with one row quantized - loss|, row by row, in float64."""
    model = copy.deepcopy(model).double()
    weight = channel_matrices(model)[name]
    plain, kept = sample_losses(model, {"input_ids": ids}), weight.clone()
    found = []
    rough = nearest(kept.float(), 3, 32).dequantize().double()
    for row in range(len(weight)):
        weight[row] += scale * (rough[row] - kept[row])
        found.append((sample_losses(model, {"input_ids": ids}) - plain).abs().mean().item())
        weight[row] = kept[row]
    return found


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"])
def test_salience_ranks_rows_as_quantizing_each_alone_does(name: str, scaled):
    model, ids = dense(), tokens(4, 12)
    want = brute_force(model, ids, name, 0.1)
    scaled(0.1)
    got = channel_salience(model, ids, bits=3, group_size=32, targets=[name])[name]
    assert spearmanr(got, want).statistic >= 0.9
    assert got.sum() == pytest.approx(sum(want), rel=0.2)


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_salience_becomes_the_gradient_times_the_error_as_the_error_vanishes(family: str, scaled):
    """Against ordinary gradients of weights, sample by sample; experts too, whose tokens are scattered."""
    model = dense() if family == "llama" else tiny_model(family)
    ids, scale = tokens(3, 12), 1e-3
    scaled(scale)
    got = channel_salience(model, ids, bits=3, group_size=32)
    want = {name: torch.zeros(len(w)) for name, w in channel_matrices(model).items()}
    for row in ids:
        model.zero_grad()
        sample_losses(model, {"input_ids": row[None]}).sum().backward()
        parameters = dict(model.named_parameters())
        for name, weight in channel_matrices(model).items():
            grad = parameters.get(name, parameters.get(f"{name}.weight")).grad.reshape(weight.shape)
            off = nearest(weight.detach(), 3, min(32, weight.shape[1])).dequantize() - weight.detach()
            want[name] += scale * (grad * off).sum(1).abs() / len(ids)
    for name, values in got.items():
        # Smaller, and the error would vanish in the float32 of the weight it is taken off; the square adds a part of 1e-4.
        torch.testing.assert_close(values, want[name], rtol=1e-3, atol=1e-3 * float(want[name].max()), msg=name)


def test_samples_of_one_batch_are_judged_apart():
    model, ids = dense(), tokens(4, 12)
    alone, together = channel_salience(model, ids), channel_salience(model, [ids])
    dictionaries = channel_salience(model, [{"input_ids": ids[:3]}, {"input_ids": ids[3:]}])
    for name, values in alone.items():
        torch.testing.assert_close(together[name], values, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(dictionaries[name], values, rtol=1e-4, atol=1e-9)


def test_signs_do_not_cancel_over_samples():
    """Two samples that pull in opposite directions: salient each, and their mean gradient is next to nothing."""
    model, ids = dense(), tokens(8, 12)
    judged = channel_salience(model, ids)
    summed = channel_salience(model, [torch.cat(list(ids))[None]])  # one long sample
    assert sum(v.sum() for v in judged.values()) > 1.5 * sum(v.sum() for v in summed.values())


def test_padding_counts_for_nothing():
    model, ids = dense(), tokens(2, 12)
    padded = torch.cat([ids, torch.full((2, 5), 3)], 1)
    mask = torch.cat([torch.ones(2, 12), torch.zeros(2, 5)], 1).long()
    want, got = channel_salience(model, ids), channel_salience(model, [{"input_ids": padded, "attention_mask": mask}])
    for name, values in want.items():
        torch.testing.assert_close(got[name], values, rtol=1e-4, atol=1e-9)


def test_parts_of_the_estimate_are_what_they_say():
    model, ids = dense(), tokens(3, 12)
    full, square = channel_salience(model, ids), channel_salience(model, ids, first_order=False)
    diagonal = channel_salience(model, ids, fisher="diagonal")
    for name, values in full.items():
        assert (values >= 0).all() and (square[name] >= 0).all() and (diagonal[name] >= values - 1e-6).any()
        assert not torch.equal(values, square[name])
    assert model.training is False and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_one_list_over_the_model_takes_the_largest_and_keeps_the_budget():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (50, 16), "b": (30, 64), "c": (20, 48)}
    salience = {n: torch.rand(o, generator=generator) * (1 + 9 * (n == "b")) for n, (o, _) in shapes.items()}
    whole = sum(o * i for o, i in shapes.values())
    for share in (0.0, 0.07, 0.5, 1.0):
        for scope in ("global", "layer", "random"):
            found = allocate(salience, shapes, share, scope=scope, generator=generator)
            spent = sum(int(found[n].sum()) * shapes[n][1] for n in shapes)
            if scope == "layer":  # to the nearest row of each
                assert abs(spent - share * whole) <= (16 + 64 + 48) / 2
            else:
                assert share * whole - 64 < spent <= share * whole
        found = allocate(salience, shapes, share, budget="channels")
        assert sum(int(m.sum()) for m in found.values()) == int(share * 100)
    found = allocate(salience, shapes, 0.3)
    per_weight = {n: salience[n] / shapes[n][1] for n in shapes}
    least = min(float(per_weight[n][m].min()) for n, m in found.items() if m.any())
    left = sorted((float(v) for n in shapes for v in per_weight[n][~found[n]]), reverse=True)
    assert left[0] <= least  # nobody left out is worth more than someone taken
    assert found["b"].float().mean() > found["a"].float().mean()
    even = allocate(salience, shapes, 0.3, scope="layer")
    assert [round(float(m.float().mean()), 1) for m in even.values()] == [0.3, 0.3, 0.3]


FAMILIES = ("llama", "qwen2", "gemma2", "mixtral", "olmoe", "qwen2_moe", "deepseek_v3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_model_comes_back_from_the_disk_to_the_bit(family: str, tmp_path: Path):
    model, ids = tiny_model(family), tokens()
    want = logits(model, ids)
    small = convert(model, ids, MixedChannelConfig(high_share=0.3))
    assert torch.equal(logits(model, ids), want)  # the input is left alone
    got = logits(small, ids)
    assert (got - want).abs().mean() < 0.5 * want.abs().mean()
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), got)
    assert average_bits(again) == average_bits(small) == pytest.approx(5.2, abs=0.05)
    plain = export_dense(again, torch.float32)
    for module in again.modules():
        if isinstance(module, MixedChannelLinear):
            module.act_bits = None
    # Fifteen bits of every activation are left, in every layer.
    torch.testing.assert_close(logits(plain, ids), logits(again, ids), rtol=2e-3, atol=2e-3)


def test_it_generates_the_same_tokens_in_a_new_process(tiny_dense: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_dense)
    ids = torch.randint(2, 200, (4, 30), generator=torch.Generator().manual_seed(0))
    small = convert(model, ids)
    small.save_pretrained(tmp_path / "m")
    call = "m.generate(torch.arange(5, 15)[None], max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()"
    code = (
        "import mixtura, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'm')!r})\nprint({call})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(eval(call, {"m": small, "torch": torch}))


def test_a_head_tied_to_the_embedding_stays_tied_and_in_float(tmp_path: Path):
    model, ids = dense(tie_word_embeddings=True), tokens()
    table = model.get_input_embeddings().weight.clone()
    small = convert(model, ids)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again.lm_head.weight, table)
    assert not any("embed" in n or "head" in n for n in again.config.quantization_config.layers)


def test_a_weight_that_two_layers_share_is_quantized_once():
    model, ids = dense(), tokens()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    small = convert(model, ids)
    first, second = (layer.mlp.up_proj for layer in small.model.layers)
    assert isinstance(first, MixedChannelLinear) and second is first


def test_the_file_holds_what_the_bits_say(tmp_path: Path):
    model, ids = dense(hidden_size=256, intermediate_size=512, tie_word_embeddings=True), tokens(2)
    small = convert(model, ids, MixedChannelConfig(rounding="nearest", clip=False))
    small.save_pretrained(tmp_path)
    weights = sum(w.numel() for w in channel_matrices(model).values())
    rest = 4 * (64 * 256 + 5 * 256)  # float32: the table and the norms
    stated = stored_bits(small) * weights / 8 + rest
    assert average_bits(small) == pytest.approx(4.4, abs=0.02)
    # Codes, a float16 scale a group, a byte of zero point for low groups, four bytes an output.
    outputs = sum(w.shape[0] for w in channel_matrices(model).values())
    assert stored_bits(small) == pytest.approx(4.4 + 16 / 128 + 0.9 * 8 / 128 + 32 * outputs / weights, rel=0.01)
    # The header of a safetensors file is a fixed cost.
    assert directory_bytes(tmp_path) == pytest.approx(stated, rel=0.01, abs=20_000)
    resident = sum(t.nbytes for m in small.modules() if isinstance(m, MixedChannelLinear) for t in m.buffers())
    assert resident == pytest.approx(stored_bits(small) * weights / 8, rel=1e-6)


def test_gptq_changes_every_layers_output_less_than_rounding_to_nearest():
    model, ids = dense(), tokens(24, 40)
    inputs = {}
    layers = {n: m for n, m in model.named_modules() if n in channel_matrices(model)}
    hooks = [m.register_forward_pre_hook(lambda m, a, n=n: inputs.update({n: a[0]})) for n, m in layers.items()]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    first = [n for n in layers if ".layers.0." in n]  # later ones are fed by what was quantized before
    judged = channel_salience(model, ids[:2], bits=3)
    off = {}
    for rounding in ("gptq", "nearest"):
        config = MixedChannelConfig(rounding=rounding, clip=False, low_bits=3, act_bits=None)
        small = convert(model, ids, config, salience=judged)
        off[rounding] = {
            n: (inputs[n].flatten(0, 1) @ (small.get_submodule(n).weight() - layers[n].weight.detach()).T).norm()
            for n in first
        }
    for n in first:
        assert off["gptq"][n] < off["nearest"][n], n


def test_mixed_channels_in_what_the_experts_compressor_left_in_float(tmp_path: Path):
    model, ids = tiny_model("mixtral"), tokens()
    packed = pack_experts(model, ids, average_bits=2.25, other_bits=None)
    small = convert(packed, ids)
    assert type(find_moe(small)[0].experts).__name__ == "PackedExperts"
    assert type(small.model.layers[0].self_attn.q_proj).__name__ == "MixedChannelLinear"
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), logits(small, ids))
    with pytest.raises(ValueError, match=r"quantized already \(mixtura-mixed-channels\)"):
        convert(again, ids)


def test_the_share_of_an_average_and_what_is_out_of_reach():
    assert high_share_for(4.4) == pytest.approx(0.1) and high_share_for(3.5, 3, 8) == pytest.approx(0.1)
    for bits in (3.9, 8.1):
        with pytest.raises(ValueError, match=rf"bits={bits} cannot be reached.*lies between 4 and 8"):
            high_share_for(bits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"high_share": 1.5}, r"high_share must lie in \[0, 1\], got 1.5"),
        ({"low_bits": 5}, "low_bits must be one of"),
        ({"low_bits": 8}, "high_bits=8 must be larger than low_bits=8"),
        ({"act_bits": 4}, "act_bits must be 8 or None"),
        ({"rounding": "up"}, "rounding must be one of"),
        ({"budget": "rows"}, "budget must be one of"),
        ({"scope": "block"}, "scope must be one of"),
        ({"group_size": 8}, "group_size must be at least 16"),
    ],
)
def test_settings_that_cannot_be_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MixedChannelConfig(**fields)


def test_bad_input_is_named():
    model, ids = dense(), tokens()
    with pytest.raises(ValueError, match="no calibration batch"):
        channel_salience(model, [])
    with pytest.raises(ValueError, match="L >= 2"):
        channel_salience(model, ids[:, :1])
    with pytest.raises(ValueError, match=r"targets names 'w_proj', which matches none of model\.layers\.0"):
        channel_salience(model, ids, targets=["w_proj"])
    with pytest.raises(ValueError, match="fisher must be"):
        channel_salience(model, ids, fisher="full")
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 2"):
        allocate({"a": torch.ones(2)}, {"a": (2, 4)}, 2)
    with pytest.raises(ValueError, match="a has 2 rows in salience"):
        allocate({"a": torch.ones(2)}, {"a": (3, 4)}, 0.1)
    with pytest.raises(TypeError, match="LlamaModel gives no logits"):
        channel_salience(LlamaModel(model.config), ids)
    with pytest.raises(ValueError, match=r"mlp.down_proj: width 40 has no divisor"):
        convert(dense(intermediate_size=40), ids)
    small = convert(model, ids)
    with pytest.raises(ValueError, match=r"quantized already \(mixtura-mixed-channels\); start from the checkpoint"):
        convert(small, ids)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e30
    with pytest.raises(ValueError, match=r"the gradient of model.layers.\d.* on sample 0 is not finite"):
        channel_salience(model, ids)
    with pytest.raises(NonFiniteHessian, match=r"model.layers.1.mlp.down_proj"):
        convert(model, ids, salience={n: torch.ones(len(w)) for n, w in channel_matrices(model).items()})
