"""Language models of equal cost: every member and family counts, trains sparse, and comes back from the disk as it went."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import in_processes
from transformers import AutoModelForCausalLM

from mixtura.core.isoflop import IsoFlop
from mixtura.core.sparse_layers import Between, masked_parameters
from mixtura.core.sparse_training import MaskConfig
from mixtura.core.training import TrainConfig, fit
from mixtura.lm.isoflop import BETWEEN, convert, count, widened_config
from mixtura.lm.parallel import make_mesh
from mixtura.lm.parallel.training import ExpertParallel
from mixtura.lm.training import language_loss, train

MEMBERS = ("wide", "parallel", "factorized", "doped")
LENGTH = 24


def tiny(family: str, **more: Any) -> Any:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        MixtralConfig,
        MixtralForCausalLM,
    )

    torch.manual_seed(0)
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ends)).eval()
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **ends,
    }
    if family == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape, **more)).eval()


def converted(family: str, member: str, s: float) -> Any:
    return convert(tiny(family), IsoFlop(member, s, between=BETWEEN), length=LENGTH, fresh=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("s", [0.0, 0.5, 0.75])
def test_a_converted_model_costs_what_the_dense_one_costs(family: str, member: str, s: float):
    want = count(tiny(family), LENGTH).total
    report = count(converted(family, member, s), LENGTH)
    assert abs(report.total / want - 1) < 0.001
    assert (report.dense > 1.05 * want) == (s > 0)


def test_attention_scores_of_a_wider_model_are_taken_off_its_density():
    """k = 2: the scores cost twice as much, and the masked weights get less for it."""
    dense, wide = count(tiny("llama"), LENGTH), count(converted("llama", "wide", 0.75), LENGTH)
    assert wide.other == 2 * dense.other > 0
    masked = sum(c.sparse for n, c in wide.weights.items() if n != "lm_head.weight")
    assert masked == pytest.approx(dense.total - wide.other - 2 * dense.weights["lm_head.weight"].dense, rel=1e-3)


def test_embeddings_head_norms_and_router_have_no_mask():
    names = masked_parameters(converted("mixtral", "wide", 0.5)).keys()
    parts = {name.rpartition(".")[2] if "experts" in name else name.split(".")[-2] for name in names}
    assert parts == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("member", MEMBERS)
def test_a_trained_model_stays_sparse_and_loads_to_the_same_bits(family: str, member: str, tmp_path: Path):
    model = converted(family, member, 0.5)
    before = {n: (found.active, found.mask.clone()) for n, found in masked_parameters(model).items()}

    def loss_at(step: int) -> torch.Tensor:
        return language_loss(model, torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(step)))

    fit(model, loss_at, TrainConfig(steps=6), masks=MaskConfig(every=2))
    assert {n: found.active for n, found in masked_parameters(model).items()} == {n: a for n, (a, _) in before.items()}
    assert any(not torch.equal(found.mask, before[n][1]) for n, found in masked_parameters(model).items())
    model.save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    masks = masked_parameters(loaded)
    assert all(torch.equal(found.mask, masks[n].mask) for n, found in masked_parameters(model).items())
    assert loaded.config.quantization_config.sparsity == 0.5
    # Trains on from there as it would have without the detour.
    fit(loaded, lambda step: language_loss(loaded, ids), TrainConfig(steps=1))


def test_every_directory_gives_the_same_tokens_in_a_new_process(tmp_path: Path, tiny_dense: Path):
    from mixtura.lm import loading

    model, tokenizer = loading.load(tiny_dense)
    ids = tokenizer("12 + 3", return_tensors="pt").input_ids
    want = []
    for member in MEMBERS:
        made = convert(model, IsoFlop(member, 0.5, between=BETWEEN), length=LENGTH)
        loading.save(made, tokenizer, tmp_path / member, card={"title": "x", "base": [], "recipe": "", "command": ""})
        want.append(str(made.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()))
    code = (
        "import sys, mixtura\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "for path in sys.argv[1:]:\n"
        "    m, t = (c.from_pretrained(path) for c in (AutoModelForCausalLM, AutoTokenizer))\n"
        "    ids = t('12 + 3', return_tensors='pt').input_ids\n"
        "    print(m.generate(ids, max_new_tokens=8, do_sample=False)[0].tolist())"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / member) for member in MEMBERS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-len(MEMBERS) :] == want


def test_a_wide_checkpoint_loads_without_mixtura_as_a_dense_model_with_zeros(tmp_path: Path):
    import json

    from transformers import LlamaForCausalLM

    model = converted("llama", "wide", 0.75)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("quantization_config")["member"] == "wide"
    (tmp_path / "config.json").write_text(json.dumps(config))  # as if nobody had registered the method
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)


def test_heads_keep_their_size_and_groups_their_ratio():
    wide = widened_config(tiny("llama").config, 0.75)
    assert (wide.hidden_size, wide.num_attention_heads, wide.num_key_value_heads) == (64, 8, 4)
    assert (wide.head_dim, wide.intermediate_size) == (8, 112)
    assert widened_config(tiny("llama").config, 0.5, multiple_of=16).intermediate_size == 80


def test_a_doped_model_is_nearer_to_the_trained_one_than_one_that_starts_anew():
    dense, ids = tiny("llama"), torch.arange(20)[None]
    kept = convert(dense, IsoFlop("doped", 0.25), length=LENGTH)
    fresh = convert(dense, IsoFlop("doped", 0.25), length=LENGTH, fresh=True)
    want = dense(ids).logits
    assert (kept(ids).logits - want).norm() < 0.5 * (fresh(ids).logits - want).norm()


def test_what_cannot_be_converted_is_named():
    sparse = converted("llama", "wide", 0.5)
    with pytest.raises(ValueError, match="quantized or sparse already"):
        convert(sparse, IsoFlop("doped", 0.5))
    other = tiny("llama").config
    other.model_type = "falcon"
    with pytest.raises(ValueError, match="can be widened, got falcon; take another member"):
        widened_config(other, 0.5)
    with pytest.raises(ValueError, match="length must be between 1 and the model's 64 positions, got 65"):
        convert(tiny("llama"), IsoFlop("doped", 0.5), length=65)
    with pytest.raises(ValueError, match="branches without an activation"):
        convert(tiny("llama"), IsoFlop("parallel", 0.5, between=Between(norm="none", activation="none")), length=8)


def test_a_widening_whose_head_eats_the_budget_names_the_largest_sparsity():
    model = tiny("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"the largest sparsity that fits is 0\.\d+"):
        convert(model, IsoFlop("wide", 0.97), length=LENGTH)


def test_a_checkpoint_of_another_structure_is_refused(tmp_path: Path):
    import json

    converted("llama", "doped", 0.5).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"has a sparse model\.layers\.1\.self_attn\.q_proj, which LlamaForCausalLM does not"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


class Letters:
    """A tokenizer, one token a letter."""

    eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 95 + 1 for letter in text]}


@pytest.mark.parametrize(("family", "member"), [("mixtral", "wide"), ("gpt2", "factorized"), ("llama", "doped")])
def test_two_of_four_masks_live_through_training_and_the_disk(family: str, member: str, tmp_path: Path):
    transform = IsoFlop(member, 0.5, match="layer", between=BETWEEN, n_m=(2, 4))
    model = convert(tiny(family), transform, length=LENGTH, multiple_of=4)
    before = {n: found.mask.clone() for n, found in masked_parameters(model).items()}
    ids = torch.arange(40)[None] % 96
    train(
        model, Letters(), ["Of every four, two."] * 60, steps=8, batch_size=2, length=16
    )  # which sees from the config that there are groups to keep
    masks = masked_parameters(model)
    assert all(bool((found.mask.reshape(-1, 4).sum(-1) == 2).all()) for found in masks.values())
    assert any(not torch.equal(found.mask, before[n]) for n, found in masks.items())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    train(loaded, Letters(), ["Of every four, two."] * 60, steps=8, batch_size=2, length=16)
    assert all(bool((f.mask.reshape(-1, 4).sum(-1) == 2).all()) for f in masked_parameters(loaded).values())


def test_groups_of_inputs_are_refused_where_a_family_holds_outputs_in_rows():
    transform = IsoFlop("wide", 0.5, match="layer", n_m=(2, 4))
    with pytest.raises(ValueError, match="gpt2 holds its matrices the other way round; take another member"):
        convert(tiny("gpt2"), transform, length=LENGTH)


def over_two(rank: int, folder: Path) -> dict[str, Any]:
    team = ExpertParallel(make_mesh(2), form="E+D+Z")
    model = trained_sparsely(folder / "two", team, stop=7)
    masks = {n: t for n, t in team.state(model).items() if "mask" in n}
    # And what one process began goes on in two.
    state = team.state(trained_sparsely(folder / "one", team))
    return {"masks": masks, "state": state}


def trained_sparsely(out: Path, team: Any = None, stop: int | None = None) -> Any:
    model = converted("llama", "doped", 0.5).double()
    if team is not None:
        team.adopt(model)

    def loss_at(step: int) -> torch.Tensor:
        ids = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(step))
        if team is None:
            return language_loss(model, ids)
        return language_loss(model, team.rows(ids), shared=team.shared)

    masks = MaskConfig(every=2, joint_decay=True)
    fit(model, loss_at, TrainConfig(steps=12), masks=masks, out=out, stop=stop, team=team)
    return model


def test_a_sparse_model_that_fsdp_cuts_trains_and_resumes_in_one_process_or_two(tmp_path: Path):
    want = trained_sparsely(tmp_path / "whole").state_dict()
    half = trained_sparsely(tmp_path / "one", stop=7).state_dict()
    found = in_processes(2, over_two, tmp_path)[0]
    assert found["masks"] and all(torch.equal(t, half[n]) for n, t in found["masks"].items())
    for state in (found["state"], trained_sparsely(tmp_path / "two").state_dict()):
        for name, tensor in want.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-7, atol=1e-9)
