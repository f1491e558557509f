"""Every form of sharing a model gives the gradients of one process, and leaves in each process the share that it promises."""

import pytest
import torch
from parallel_models import even_model
from process_group import in_processes
from tiny_models import tiny_model
from torch.distributed.tensor import DTensor

from mixtura.core.shared_batch import SharedBatch
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.parallel import clip_gradients, gather_experts, make_mesh, reduce_gradients
from mixtura.lm.parallel.forms import apply_plan, sliced_layers
from mixtura.lm.parallel.gradients import expert_rules
from mixtura.lm.parallel.training import ExpertParallel
from mixtura.lm.training import language_loss

FORMS = [
    ("E", {"expert": 4}),
    ("E+D", {"expert": 2}),
    ("E+Z", {"expert": 4}),
    ("E+D+Z", {"expert": 2}),
    ("E+Z-Off", {"expert": 4}),
    ("E+M", {"expert": 2, "tensor": 2}),
    ("E+D+M", {"expert": 1, "tensor": 2}),
    ("E+D+Z+M", {"expert": 1, "tensor": 2}),
]
ROWS = torch.randint(1, 40, (7, 5), generator=torch.Generator().manual_seed(5))


def step(model, rows, shared):
    loss = language_loss(model, rows, balance=0.5, z=0.1, shared=shared)
    loss.backward()
    return float(shared.sum(loss)) / shared.size


def everywhere(rank):
    found = []
    for form, degrees in FORMS:
        mesh = make_mesh(4, **degrees)
        team = ExpertParallel(mesh, form=form)
        model = even_model()
        team.prepare(model)
        start = gather_experts(model)
        loss = step(model, team.rows(ROWS), team.shared)
        reduce_gradients(model, mesh)
        norm = float(clip_gradients(model, mesh, 0.0))
        named = list(model.named_parameters())
        gradients = {team.name(n): team.whole(n, p, p.grad) for n, p in named if p.grad is not None}
        own = {n: (p.to_local() if isinstance(p, DTensor) else p).numel() for n, p in named}
        held = sum(own[n] for n, p in named if p in expert_rules(model))
        rest = sum(own.values()) - held
        found.append(
            {"loss": loss, "norm": norm, "gradients": gradients, "start": start, "experts": held, "rest": rest}
        )
    return found


def test_every_form_has_the_loss_and_every_gradient_of_one_process():
    alone = even_model()
    start = alone.state_dict()
    whole_experts = sum(p.numel() for n, p in alone.named_parameters() if ".experts." in n)
    whole_rest = sum(p.numel() for p in alone.parameters()) - whole_experts
    loss = step(alone, ROWS, SharedBatch())
    want = {n: p.grad for n, p in alone.named_parameters()}
    norm = float(torch.nn.utils.clip_grad_norm_(alone.parameters(), float("inf")))
    # What no rule cuts over the tensor axis: norms and gates.
    uncut = sum(p.numel() for n, p in alone.named_parameters() if "norm" in n or ".gate." in n)
    for (form, degrees), *ranks in zip(FORMS, *in_processes(4, everywhere), strict=True):
        mesh = make_mesh(4, **degrees)
        for got in ranks:
            torch.testing.assert_close(got["loss"], loss, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(
                got["norm"], norm, rtol=1e-10, atol=1e-10, msg=lambda m, form=form: f"{form}: {m}"
            )
            assert got["gradients"].keys() == want.keys()
            for name, gradient in want.items():
                torch.testing.assert_close(
                    got["gradients"][name],
                    gradient,
                    rtol=1e-10,
                    atol=1e-10,
                    msg=lambda m, at=(name, form): f"{at}: {m}",
                )
            assert got["start"].keys() == start.keys()
            assert all(torch.equal(got["start"][name], tensor) for name, tensor in start.items())
            rest = whole_rest if "M" not in form else uncut + (whole_rest - uncut) // 2
            sharded = "Z" in form
            assert got["rest"] == (rest // (4 // mesh.tensor) if sharded else rest), form
            copies = mesh.expert_data if sharded else 1
            assert got["experts"] == whole_experts // (mesh.owners * copies), form


@pytest.mark.parametrize(
    ("form", "mesh", "message"),
    [
        ("D+Z", make_mesh(4), r"form must be E with any of D, Z, Z-Off, M joined by \+ .*; got 'D\+Z'"),
        ("E+Z+Z-Off", make_mesh(4), "Z or Z-Off, not both"),
        ("E", make_mesh(4, expert=2), r"form E keeps one copy of the experts, and the mesh has 2; say E\+D"),
        ("E+M", make_mesh(4), r"form E\+M does not go with a mesh of tensor=1; make the mesh with tensor=2 or more"),
        ("E+Z", make_mesh(4, tensor=2), r"form E\+Z does not go with a mesh of tensor=2; say \+M"),
        ("E+M", make_mesh(3, tensor=3), r"layers\.0\.self_attn\.q_proj has 2 heads, which tensor=3 does not divide"),
    ],
)
def test_a_form_that_does_not_fit_says_what_would(form, mesh, message):
    with pytest.raises(ValueError, match=message):
        apply_plan(even_model(), mesh, form)


def test_what_cannot_be_cut_stays_whole():
    names = sliced_layers(even_model(), 2)
    assert {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "lm_head",
        "model.embed_tokens",
    } <= names.keys()
    assert not any("norm" in name or name.endswith(".gate") for name in names)
    config = MixturaConfig(vocab_size=40, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, qk_norm="head")
    config.tie_word_embeddings = True
    names = sliced_layers(MixturaForCausalLM(config), 2)
    assert not any("self_attn" in name for name in names) and "lm_head" not in names
    assert "model.layers.0.self_attn.o_proj" in sliced_layers(tiny_model("mixtral"), 2)
