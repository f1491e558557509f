"""What a plan says a device needs is what processes hold, and what the literature says fits."""

import pytest
import torch
from process_group import in_processes
from torch.distributed.tensor import DTensor

from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.parallel import make_mesh, parallelize_experts, reduce_gradients
from mixtura.lm.parallel.cluster import ModelShape
from mixtura.lm.parallel.forms import apply_plan
from mixtura.lm.parallel.plan import FORMS, Sizes, largest, memory, sizes_of
from mixtura.lm.parallel.sharded_experts import shard_experts, sharded_layers

FLOAT32_ADAM = (4, 4, 8)


def make_model(**changes):
    torch.manual_seed(0)
    return MixturaForCausalLM(
        MixturaConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_experts=8,
            tie_word_embeddings=True,
            **changes,
        )
    )


def counted(rank, sharded):
    """Bytes of weights, gradients and states after a step; experts copied and their bytes."""
    model, mesh = make_model().train(), make_mesh(4, node=2)
    if sharded:
        shard_experts(model, mesh, overlap=4, capacity=1)
    else:
        parallelize_experts(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(2):
        ids = torch.randint(0, 60, (2, 6), generator=torch.Generator().manual_seed(4 * step + rank))
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        reduce_gradients(model, mesh)
        optimizer.step()
    parameters = list(model.parameters())
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    held = [sum(t.numel() * t.element_size() for t in ts) for ts in (parameters, [p.grad for p in parameters], states)]
    return {"held": held, "copies": sum(int((x.placement & ~x.owners)[:, rank].sum()) for x in sharded_layers(model))}


def test_processes_hold_what_the_plan_says():
    want = memory(make_model(), make_mesh(4), "E", bytes=FLOAT32_ADAM)
    for found in in_processes(4, counted, False):
        assert sum(found["held"]) == pytest.approx(want.device, rel=0.02)
        assert found["held"] == pytest.approx([want.parts[k] for k in ("weights", "gradients", "states")], rel=0.02)
    sizes = sizes_of(make_model())
    plain, ours = (
        memory(
            Sizes(other=0, experts=sizes.experts, expert=sizes.expert, layers=2),
            make_mesh(4),
            form,
            bytes=FLOAT32_ADAM,
            **more,
        )
        for form, more in (("E", {}), ("hecate", {"capacity": 1}))
    )
    for found in in_processes(4, counted, True):
        # Experts and their states as under expert parallelism; copies come on top, a layer's worth each at most.
        assert sum(found["held"]) == pytest.approx(want.device, rel=0.02)
        assert plain.device == pytest.approx(ours.device - ours.parts["copies"])
        assert found["copies"] * sizes.expert * 8 <= ours.parts["copies"]


FORM_CASES = [("E+D", 2), ("E+Z", 4), ("E+D+Z", 2)]


def held_by_form(rank):
    """Bytes of gradients and of states of a process after a step, by form."""
    found = []
    for form, expert in FORM_CASES:
        mesh = make_mesh(4, expert=expert)
        model = apply_plan(make_model().train(), mesh, form)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
        ids = torch.randint(0, 60, (2, 6), generator=torch.Generator().manual_seed(rank))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        reduce_gradients(model, mesh)
        optimizer.step()
        states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
        found.append([sum(local_bytes(t) for t in ts) for ts in ([p.grad for p in model.parameters()], states)])
    return found


def local_bytes(t):
    t = t.to_local() if isinstance(t, DTensor) else t
    return t.numel() * t.element_size()


def test_forms_shard_gradients_and_states_as_the_plan_says():
    found = in_processes(4, held_by_form)
    for at, (form, expert) in enumerate(FORM_CASES):
        want = memory(make_model(), make_mesh(4, expert=expert), form, bytes=FLOAT32_ADAM).parts
        for rank in range(4):
            # Rows are cut whole, so a process may hold one more of some tensor.
            assert found[rank][at] == pytest.approx([want["gradients"], want["states"]], rel=0.02), form


@pytest.mark.parametrize("router", ["linear", "sparsity"])
def test_a_shape_counts_what_the_model_has(router):
    model = make_model(router=router)
    found, real = sizes_of(ModelShape.of(model.config)), sizes_of(model)
    assert found == real


def test_published_limits():
    assert memory(Sizes(other=1_400_000_000, experts=0), make_mesh(64), "E").device == pytest.approx(22e9, rel=0.03)
    without_slicing = memory(Sizes(other=15_000_000_000, experts=0), make_mesh(512), "E+Z")
    assert without_slicing.parts["weights"] == pytest.approx(30e9)
    huge = memory(Sizes(other=1_400_000_000, experts=3_500_000_000_000), make_mesh(512, tensor=8), "E+Z-Off+M")
    assert huge.parts["weights"] == pytest.approx(13.7e9, rel=0.03)
    assert huge.host == pytest.approx(96e9, rel=0.02)
    assert largest("E+Z-Off", make_mesh(512), 40e9, 100e9, 1_400_000_000) >= 3.4e12


def test_sharding_the_repeated_part_is_what_lets_the_base_grow():
    base = dict.fromkeys(("E", "E+Z"), 0)
    for form in base:
        mesh, low, high = make_mesh(512), 0, 10**12
        while high - low > 10**7:
            middle = (low + high) // 2
            fits = memory(Sizes(other=middle, experts=0), mesh, form).device <= 22.4e9
            low, high = (middle, high) if fits else (low, middle)
        base[form] = low
    assert base["E"] == pytest.approx(1.4e9, rel=0.02)
    assert 7 * base["E"] < base["E+Z"] < 8 * base["E"]  # 16 bytes a parameter against 2 and a share


def test_the_largest_model_is_the_last_that_fits():
    mesh = make_mesh(16, expert=8)
    for form in ("E", "E+D", "E+D+Z"):
        n = largest(form, mesh, 1e9, 0, 1_000_000)
        fits = [
            memory(Sizes(other=1_000_000, experts=n - 1_000_000 + more), mesh, form).device <= 1e9 for more in (0, 1)
        ]
        assert fits == [True, False]
    assert largest("E", mesh, 1e6, 0, 1_000_000) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: memory(Sizes(other=1, experts=1), make_mesh(2), "Z"), "form must be one of"),
        (lambda: memory(Sizes(other=1, experts=1), make_mesh(2), "E+D+M"), "needs a mesh with tensor > 1"),
        (lambda: memory(Sizes(other=1, experts=1), make_mesh(4, tensor=2), "E"), "take a form with M"),
        (lambda: memory(Sizes(other=1, experts=1), make_mesh(2), "E+D"), "take a smaller expert="),
        (lambda: memory(Sizes(other=1, experts=1), make_mesh(4, expert=2), "hecate"), "expert=4; got expert=2"),
        (lambda: largest("E+Z-Off", make_mesh(2), 1e9, 0, 10), "host_bytes must be > 0, got 0"),
    ],
)
def test_forms_that_do_not_fit_the_mesh_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_form_is_explained():
    assert all(len(words) > 20 for words in FORMS.values())
