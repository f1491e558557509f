"""Every form of sharing a model gives the gradients of one process, and leaves in each process the share that it promises."""

import pytest
import torch
from parallel_models import MODELS, even_model, loss_of, replayed, start_chance
from process_group import in_processes
from tiny_models import tiny_model
from torch.distributed.tensor import DTensor

from mixtura.core.shared_batch import SharedBatch
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.parallel import clip_gradients, gather_experts, make_mesh, reduce_gradients
from mixtura.lm.parallel.forms import apply_plan, sliced_layers
from mixtura.lm.parallel.gradients import expert_rules
from mixtura.lm.parallel.training import ExpertParallel

FORMS = [
    ("even", "E", {"expert": 4}),
    ("even", "E+D", {"expert": 2}),
    ("even", "E+Z", {"expert": 4}),
    ("even", "E+D+Z", {"expert": 2}),
    ("even", "E+Z-Off", {"expert": 4}),
    ("even", "E+M", {"expert": 2, "tensor": 2}),
    ("even", "E+D+M", {"expert": 1, "tensor": 2}),
    ("even", "E+D+Z+M", {"expert": 1, "tensor": 2}),
    ("translator", "E+D+Z", {"expert": 2}),
    ("translator", "E+D+Z+M", {"expert": 1, "tensor": 2}),
    ("sparse", "E+Z", {"expert": 4}),
    ("sparse", "E+D+Z", {"expert": 2}),
    ("sparse", "E+D+Z+M", {"expert": 1, "tensor": 2}),
    ("sparse, full", "E+D+Z", {"expert": 1}),
]
ROWS = torch.randint(1, 40, (7, 5), generator=torch.Generator().manual_seed(5))


def step(model, rows, shared):
    loss = loss_of(model.train(), rows, shared)
    loss.backward()
    return float(shared.sum(loss)) / shared.size


def everywhere(rank):
    found = []
    for name, form, degrees in FORMS:
        mesh = make_mesh(4, **degrees)
        team = ExpertParallel(mesh, form=form)
        model = MODELS[name]()
        team.prepare(model)
        start = gather_experts(model)
        start_chance(0, team.stream)
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


def alone(name, places):
    """The step in one process, which draws as so many processes with rows of their own do."""
    model, bounds = MODELS[name](), [0, *torch.tensor([len(t) for t in ROWS.tensor_split(places)]).cumsum(0).tolist()]
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with replayed(bounds, 0):
        loss = step(model, ROWS, SharedBatch())
    gradients = {n: p.grad for n, p in model.named_parameters()}
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
    return {"loss": loss, "norm": norm, "gradients": gradients, "start": start}


def test_every_form_has_the_loss_and_every_gradient_of_one_process():
    for (name, form, degrees), *ranks in zip(FORMS, *in_processes(4, everywhere), strict=True):
        mesh = make_mesh(4, **degrees)
        want = alone(name, 4 // mesh.tensor)
        for got in ranks:
            for key in ("loss", "norm", "gradients"):
                torch.testing.assert_close(
                    got[key], want[key], rtol=1e-10, atol=1e-10, msg=lambda m, at=(name, form, key): f"{at}: {m}"
                )
            assert got["start"].keys() == want["start"].keys()
            assert all(torch.equal(got["start"][key], tensor) for key, tensor in want["start"].items())
        shares(name, form, mesh, ranks)


def shares(name, form, mesh, ranks):
    """What the processes hold, all together, and for the model whose parts are equal each of them."""
    model = MODELS[name]()
    whole_experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    rest = sum(p.numel() for p in model.parameters()) - whole_experts
    if mesh.tensor > 1:  # a matrix that a rule cuts is cut into halves, and its bias where its rows are
        cut = [model.get_submodule(path) for path, style in sliced_layers(model, 2).items()]
        biases = [
            m.bias for m, s in zip(cut, sliced_layers(model, 2).values(), strict=True) if "Col" in type(s).__name__
        ]
        rest -= sum(m.weight.numel() for m in cut) // 2 + sum(b.numel() for b in biases if b is not None) // 2
    sharded = "Z" in form
    held = {key: [got[key] for got in ranks] for key in ("experts", "rest")}
    assert sum(held["rest"]) == rest * (mesh.tensor if sharded else 4), (name, form)
    copies = 1 if sharded else mesh.expert_data
    assert sum(held["experts"]) == whole_experts * copies, (name, form)
    if name == "even":
        assert {key: len(set(numbers)) for key, numbers in held.items()} == {"experts": 1, "rest": 1}, (name, form)


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
