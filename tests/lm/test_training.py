"""Training a mixture: what learns, what the loss holds, and where it refuses."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mixtura.core.balance import load_balance_loss, router_z_loss
from mixtura.core.training import NonFiniteLoss
from mixtura.data.texts import corpus
from mixtura.lm import train, upcycle
from mixtura.lm.anatomy import find_moe
from mixtura.lm.evaluate import perplexity
from mixtura.lm.loading import load_tokenizer
from mixtura.lm.tokens import blocks
from mixtura.lm.training import language_loss, select_trainable


@pytest.fixture
def moe(tiny_dense: Path):
    return upcycle(str(tiny_dense), method="copy", n_experts=4, top_k=2, noise=0.1).float(), load_tokenizer(tiny_dense)


def sums() -> dict[str, list[str]]:
    return {"sums": corpus("arithmetic", characters=30_000).train}


def test_training_lowers_the_perplexity_of_held_out_text(moe):
    model, tokenizer = moe
    held_out = blocks(tokenizer, corpus("arithmetic", characters=30_000).held_out, 32)
    before = perplexity(model, held_out)
    history = train(model, tokenizer, sums(), steps=40, batch_size=8, length=32, lr=3e-3)
    assert perplexity(model, held_out) < 0.5 * before
    assert len(history.losses) == 40


def test_the_loss_is_the_next_tokens_plus_the_balance_of_every_layer(moe):
    model, _ = moe
    ids = torch.randint(2, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    seen = []
    hooks = [b.gate.register_forward_hook(lambda module, args, out: seen.append(out)) for b in find_moe(model)]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        for hook in hooks:
            hook.remove()
        want = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for out in seen:
            want = want + (0.1 * load_balance_loss(out[0].softmax(-1), out[2]) + 0.01 * router_z_loss(out[0])) / len(
                seen
            )
        got = language_loss(model, ids, balance=0.1, z=0.01)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_only_what_was_named_learns_and_flags_are_put_back(moe):
    model, tokenizer = moe
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    train(model, tokenizer, sums(), steps=2, batch_size=2, length=32, trainable="router", lr=1e-2)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if ".mlp.gate." in name}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with select_trainable(model, "experts", layers=[2]):
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {n for n in before if ".mlp.gate." in n or ("layers.2." in n and ".experts." in n)}


def test_attention_experts_learn_with_the_experts(tiny_dense: Path):
    model = upcycle([str(tiny_dense)] * 2, method="branch-attend-mix").float()
    with select_trainable(model, "experts", layers=[0]):
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "model.layers.0.self_attn.q_proj" in learning and "model.layers.1.self_attn.q_proj" not in learning


def test_the_same_seed_gives_the_same_weights(tiny_dense: Path):
    ends = []
    for _ in range(2):
        model = upcycle(str(tiny_dense), method="copy", n_experts=4).float()
        train(model, load_tokenizer(tiny_dense), sums(), steps=3, batch_size=2, length=32, seed=5)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


def test_what_cannot_be_trained_is_refused(moe, tiny_dense: Path):
    model, tokenizer = moe
    with pytest.raises(TypeError, match=r"must be in float32 to be trained, got torch\.bfloat16"):
        train(upcycle(str(tiny_dense)).bfloat16(), tokenizer, sums(), steps=1)
    with pytest.raises(ValueError, match="do not fill one block"):
        train(model, tokenizer, ["short"], steps=1, length=64)
    with pytest.raises(ValueError, match="trainable must be one of"):
        train(model, tokenizer, sums(), steps=1, length=32, trainable="none")
    with pytest.raises(ValueError, match=r"layers must lie in 0\.\.2, got \[5\]"):
        train(model, tokenizer, sums(), steps=1, length=32, trainable="experts", layers=[5])
    model.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(NonFiniteLoss, match="at step 0"):
        train(model, tokenizer, sums(), steps=1, length=32)


def test_a_run_goes_on_only_with_what_it_trained_and_how_it_balanced(moe, tmp_path: Path):
    model, tokenizer = moe
    begun = {"steps": 2, "batch_size": 2, "length": 32, "checkpoint_every": 1, "out": tmp_path / "state"}
    train(model, tokenizer, sums(), **begun)
    for changed, message in (
        ({"trainable": "router"}, "holds a run with trainable=None, this one has 'router'"),
        ({"layers": [0]}, "holds a run with layers=None, this one has"),
        ({"balance": 0.1}, "holds a run with balance=None, this one has 0.1"),
        ({"z": 0.0}, "holds a run with z=None, this one has 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model, tokenizer, sums(), **begun | changed)
    assert train(model, tokenizer, sums(), **begun).resumed_at == 2


@pytest.mark.parametrize(("argument", "value"), [("balance", -0.1), ("z", float("nan")), ("batch_size", 0)])
def test_a_number_that_makes_no_sense_is_named(argument, value, moe):
    model, tokenizer = moe
    with pytest.raises(ValueError, match=f"{argument} must be"):
        train(model, tokenizer, sums(), steps=1, length=32, **{argument: value})


def test_the_config_says_whether_each_sequence_and_which_devices_are_balanced():
    from mixtura.core.balance import device_balance_loss, load_balance_loss
    from mixtura.lm.model import MixturaConfig, MixturaForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": 61,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    scope = {"balance_per": "sequence", "device_balance_coef": 0.3, "device_groups": 2}
    model = MixturaForCausalLM(MixturaConfig(**shape, num_experts=4, initializer_range=0.3, **scope)).eval()
    ids = torch.randint(2, 61, (3, 7), generator=torch.Generator().manual_seed(0))
    want = language_loss(model, ids)
    for logits in model(ids, output_router_logits=True).router_logits:
        for row in logits.view(3, 7, 4):
            one = (row.softmax(-1), row.topk(2).indices)
            even = 0.1 * load_balance_loss(*one) + 0.3 * device_balance_loss(*one, [[0, 1], [2, 3]])
            want = want + even / 6  # the mean over three sequences and two layers
    torch.testing.assert_close(language_loss(model, ids, balance=0.1), want)


def test_gradient_checkpointing_changes_no_loss_and_no_gradient(moe):
    model, _ = moe
    ids = torch.randint(2, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train().zero_grad(set_to_none=True)
        language_loss(model, ids, balance=0.5, z=0.1).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():  # the same operations in the same order
        assert torch.equal(found[1][name], gradient), name
