"""Training over processes equals training in one: outputs, every gradient, and the weights after steps of AdamW.

Every process gets other rows, not equally many, one gets no label; some experts get no token.
"""

from contextlib import nullcontext
from functools import cache
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parallel_models import CHANCE, MODELS, TINY, even_model, replayed, start_chance
from process_group import in_processes
from tiny_models import tiny_model
from torch import nn

from mixtura.core.gates import top_k
from mixtura.core.shared_batch import SharedBatch
from mixtura.core.sparsity_gate import column_statistics
from mixtura.lm.anatomy import find_moe, recorded_routing
from mixtura.lm.model import MixturaForCausalLM
from mixtura.lm.model.parts import inner_weights
from mixtura.lm.parallel import clip_gradients, gather_experts, make_mesh, parallelize_experts, reduce_gradients
from mixtura.lm.parallel.cluster import ModelShape
from mixtura.lm.parallel.experts import _Layout, parallel_experts, single_name
from mixtura.lm.parallel.gradients import expert_rules
from mixtura.lm.training import language_loss

STEPS, LENGTH = 10, 6
PARTS = [0, 3, 4, 5, 7]  # rows of the four parts of a batch: 3, 1, 1 and 2; of two halves: 4 and 3
SILENT = 4  # a row, all that one process has, of which no loss is wanted
FOUR = [
    ("even", {"expert": 4}, "direct"),
    ("even", {"expert": 1}, "direct"),
    ("even", {"expert": 2}, "direct"),
    ("even", {"expert": 2, "slices": 2}, "direct"),
    ("even", {"expert": 2, "tensor": 2}, "coordinated"),
    ("even", {"expert": 2, "tensor": 2}, "direct"),
    ("even", {"expert": 4, "node": 2}, "hierarchical"),
    ("pyramid", {"expert": 4}, "direct"),
    ("pyramid", {"expert": 4, "node": 2}, "hierarchical"),
    ("pyramid", {"expert": 2, "tensor": 2}, "coordinated"),
    ("translator", {"expert": 4}, "direct"),
    ("translator", {"expert": 2}, "direct"),
    ("translator", {"expert": 2, "tensor": 2}, "coordinated"),
    ("sparse", {"expert": 4}, "direct"),
    ("sparse", {"expert": 2}, "direct"),
    ("sparse, full", {"expert": 2, "slices": 2}, "direct"),
    ("sparse", {"expert": 2, "tensor": 2}, "coordinated"),
    ("sparse", {"expert": 2, "tensor": 2}, "direct"),
    ("sparse, full", {"expert": 4, "node": 2}, "hierarchical"),
]
TWO = [
    ("even", {"expert": 2}, "direct"),
    ("even", {"slices": 2}, "direct"),
    ("pyramid", {"tensor": 2}, "coordinated"),
    ("translator", {"expert": 2}, "direct"),
    ("translator", {"expert": 1}, "direct"),
    ("sparse", {"expert": 1}, "direct"),
    ("sparse, full", {"slices": 2}, "direct"),
    ("sparse", {"tensor": 2}, "coordinated"),
]


def batch(step):
    """Ids, padding mask and labels of all rows of a step."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(1, TINY["vocab_size"], (PARTS[-1], LENGTH), generator=g)
    lengths = torch.randint(2, LENGTH + 1, (PARTS[-1], 1), generator=g)
    mask = (torch.arange(LENGTH) < lengths).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[SILENT] = -100
    return ids, mask, labels


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)


def bounds(places):
    """Where the parts of a batch's rows begin and end, for so many processes with rows of their own."""
    return PARTS[:: 4 // places]


def train(model, mesh=None, places=1, place=0, clip=0.05):
    """Losses, first gradients, gradient norms and logits of a training on a part of each batch; without a mesh, on all parts."""
    model.train()
    optimizer, shared = optimizer_of(model), SharedBatch()
    found = {"losses": [], "norms": []}
    part = slice(None) if mesh is None else slice(*bounds(places)[place : place + 2])
    for step in range(STEPS):
        ids, mask, labels = (t[part] for t in batch(step))
        optimizer.zero_grad()
        start_chance(step, place)
        with replayed(bounds(places), step) if mesh is None else nullcontext():
            out = model(input_ids=ids, attention_mask=mask, labels=labels, shared_batch=shared, use_cache=False)
        out.loss.backward()
        if mesh is None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        else:
            reduce_gradients(model, mesh)
            norm = clip_gradients(model, mesh, 0.0)
        if step == 0:
            found["logits"] = out.logits.detach()
            found["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if mesh is None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        else:
            clip_gradients(model, mesh, clip)
        found["norms"].append(float(norm))
        found["losses"].append(float(shared.sum(out.loss)) / shared.size)
        optimizer.step()
    return found


def whole_gradients(model, gradients):
    spread = dict(parallel_experts(model))
    found = {}
    for name, gradient in gradients.items():
        path, _, last = name.rpartition(".local_experts.")
        module = spread.get(path)
        whole = module.whole(last, gradient) if module is not None and last in module.stacked else gradient
        found[single_name(name)] = whole
    return found


def train_everywhere(rank, cases, world):
    results = []
    for name, degrees, plan in cases:
        mesh = make_mesh(world, **degrees)
        # Processes that hold the same tokens take the same part of the batch.
        places, place = world // mesh.tensor, rank // mesh.tensor
        model = parallelize_experts(MODELS[name](), mesh, plan=plan)
        found = train(model, mesh, places, place)
        found["gradients"] = whole_gradients(model, found["gradients"])
        found["state"] = gather_experts(model)
        found["part"] = bounds(places)[place : place + 2]
        found["held"] = sum(p.numel() for p in expert_rules(model))
        results.append(found)
    return results


@cache
def alone(name, places=1):
    """The training in one process, which draws as that many processes do where the model draws at all."""
    if name not in CHANCE and places > 1:
        return alone(name)
    model = MODELS[name]()
    return train(model, places=places) | {"state": model.state_dict()}


@pytest.mark.parametrize(("world", "cases"), [(4, FOUR), (2, TWO)], ids=["four", "two"])
def test_a_training_over_processes_is_the_training_in_one(world, cases):
    found = in_processes(world, train_everywhere, cases, world)
    for at, (name, degrees, plan) in enumerate(cases):
        mesh = make_mesh(world, **degrees)
        want = alone(name, world // mesh.tensor)
        for rank in range(world):
            got, where = found[rank][at], f"{name} {degrees} {plan}, process {rank}"
            same(got["logits"], want["logits"][slice(*got["part"])], f"logits, {where}")
            assert got["gradients"].keys() == want["gradients"].keys(), where
            for key, gradient in want["gradients"].items():
                same(got["gradients"][key], gradient, f"gradient of {key}, {where}")
            for key in ("losses", "norms"):
                same(torch.tensor(got[key]), torch.tensor(want[key]), f"{key}, {where}")
            assert got["state"].keys() == want["state"].keys(), where
            for key, tensor in want["state"].items():
                same(got["state"][key], tensor, f"{key} after {STEPS} steps, {where}", 1e-9)
            layers = find_moe(MODELS[name]())
            held = sum(
                sum(p.numel() for p in block.experts.parameters())
                // (mesh.for_experts(block.n_experts).owners * mesh.slices)
                for block in layers
            )
            assert got["held"] == held, where


def same(got, want, what, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def test_the_comparison_has_idle_experts_a_silent_process_and_losses_that_move():
    for name, make in MODELS.items():
        model = make().train()
        ids, mask, labels = batch(0)
        with recorded_routing(model) as routings:
            model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
        loads = [torch.bincount(r.indices.flatten(), minlength=r.n_experts) for r in routings.values()]
        assert all(len(load.unique()) > 1 for load in loads), "uneven"
        if name == "pyramid":
            assert loads[1][3] == 0, "an expert without a token"
        assert alone(name)["losses"][-1] < alone(name)["losses"][0]
    assert PARTS[2:4] == [SILENT, SILENT + 1]


def told(rank):
    """Statistics of all experts that a process is told, and the numbers that it receives for them, forward and back."""
    found = {}
    for name, slices in (("sparse", 1), ("sparse, full", 1), ("sparse, full", 2)):
        model = parallelize_experts(MODELS[name](), make_mesh(2, expert=2 // slices, slices=slices))
        experts = model.model.layers[1].mlp.experts
        statistics = model.config.router_statistics
        received, swap = [], dist.all_to_all_single

        def counting(out, *args, received=received, swap=swap, **kwargs):
            received.append(out.numel())
            return swap(out, *args, **kwargs)

        with mock.patch.object(dist, "all_to_all_single", counting):
            made = experts.gathered_statistics(*column_statistics(*inner_weights(experts.local_experts), statistics))
            forward = sum(received)
            sum(part.sum() for part in made).backward()
        counts = torch.tensor([forward, sum(received) - forward])
        found[f"{name} {slices}"] = [*(part.detach() for part in made), counts]
    return found


def test_processes_tell_each_other_means_and_variances_as_a_plan_counts_them_and_no_weights():
    E, D = 4, TINY["hidden_size"]
    numbers = {"sparse 1": 2 * E * (D + 1), "sparse, full 1": E * (D + D * D), "sparse, full 2": 2 * E * (D + D * D)}
    for found in in_processes(2, told):
        for key, (mean, spread, received) in found.items():
            model = MODELS[key[:-2]]()
            up, bias = inner_weights(model.model.layers[1].mlp.experts)
            want = column_statistics(
                up.detach(), None if bias is None else bias.detach(), model.config.router_statistics
            )
            same(mean, want[0], key, 1e-13)
            same(spread, want[1], key, 1e-13)
            assert received.tolist() == [numbers[key]] * 2, f"{key}: forward and back"
            if key.endswith("1"):
                assert received[0] == E * ModelShape.of(model.config).statistics_numbers, key


FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "deepseek_v2", "gpt_oss")


def family_step(family, mesh=None, part=slice(None)):
    model = tiny_model(family).train()
    if mesh is not None:
        parallelize_experts(model, mesh)
        start = gather_experts(model)
        single = tiny_model(family).state_dict()
        assert start.keys() == single.keys() and all(torch.equal(start[key], single[key]) for key in single), family
    ids = torch.randint(1, 60, (5, LENGTH), generator=torch.Generator().manual_seed(3))[part]
    loss = language_loss(model, ids, balance=0.1, z=0.01, shared=SharedBatch())
    loss.backward()
    if mesh is None:
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    reduce_gradients(model, mesh)
    return whole_gradients(model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def families_everywhere(rank):
    return {name: family_step(name, make_mesh(2), [slice(0, 3), slice(3, 5)][rank]) for name in FAMILIES}


def test_the_experts_of_transformers_families_spread_the_same_way():
    found = in_processes(2, families_everywhere)
    for family in FAMILIES:
        want = family_step(family)
        for rank in range(2):
            assert found[rank][family].keys() == want.keys()
            for name, gradient in want.items():
                # float32: sums in another order.
                close = torch.allclose(
                    found[rank][family][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-9
                )
                assert close, f"{family}, process {rank}, {name}"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("concatenated", [False, True])
def test_sliced_experts_sum_to_the_whole_one_in_every_layout(transposed, concatenated):
    g = torch.Generator().manual_seed(0)
    x, gate, up = torch.randn(3, 5, generator=g), torch.randn(6, 5, generator=g), torch.randn(6, 5, generator=g)
    down = torch.randn(5, 6, generator=g)
    stacked = torch.cat([gate, up]) if concatenated else torch.stack([gate, up], 1).flatten(0, 1)
    stacked, rows = (stacked.T[None], down.T[None]) if transposed else (stacked[None], down[None])
    layout = _Layout(transposed, True, concatenated, False)
    total = 0
    for up_part, down_part in zip(
        layout.cut("gate_up_proj", stacked, 3), layout.cut("down_proj", rows, 3), strict=True
    ):
        up_part, down_part = (t[0].T if transposed else t[0] for t in (up_part, down_part))
        g_part, u_part = up_part.chunk(2) if concatenated else (up_part[::2], up_part[1::2])
        total = total + (F.silu(x @ g_part.T) * (x @ u_part.T)) @ down_part.T
    torch.testing.assert_close(total, (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    for name, tensor in (
        ("gate_up_proj", stacked),
        ("down_proj", rows),
        ("gate_up_proj_bias", stacked[..., 0] if not transposed else stacked[:, 0]),
    ):
        assert torch.equal(layout.joined(name, layout.cut(name, tensor, 3)), tensor)


def test_what_cannot_be_spread_is_named():
    model = even_model()
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp: 4 experts do not divide into equal parts for expert=3; expert=1"
    ):
        parallelize_experts(model, make_mesh(3))
    with pytest.raises(ValueError, match=r"plan must be one of .* got 'tree'"):
        parallelize_experts(model, make_mesh(1), plan="tree")
    with pytest.raises(ValueError, match="slices=2, but the mesh was made for slices=1"):
        parallelize_experts(model, make_mesh(1), slices=2)
    with pytest.raises(ValueError, match="Linear has no mixture layers"):
        parallelize_experts(nn.Linear(2, 2), make_mesh(1))
    with pytest.raises(ValueError, match="slices must divide the 8 hidden units of an expert, got 3"):
        parallelize_experts(even_model(), make_mesh(3, slices=3))
    with pytest.raises(ValueError, match="neither bias nor norm; give slices=1"):
        parallelize_experts(tiny_model("gpt_oss"), make_mesh(2, slices=2))
    with pytest.raises(RuntimeError, match="a mesh of 2 processes needs a process group"):
        parallelize_experts(model, make_mesh(2))
    with pytest.raises(ValueError, match="spread over processes already"):
        parallelize_experts(parallelize_experts(model, make_mesh(1)), make_mesh(1))


def test_one_process_computes_what_the_model_does():
    model = even_model()
    ids, mask, _ = batch(0)
    want = model(input_ids=ids, attention_mask=mask).logits
    again = parallelize_experts(even_model(), make_mesh(1))
    torch.testing.assert_close(again(input_ids=ids, attention_mask=mask).logits, want, rtol=1e-12, atol=1e-12)
    assert [block.n_experts for block in find_moe(again)] == [4]
    state = gather_experts(again)
    assert state.keys() == model.state_dict().keys()
    MixturaForCausalLM(model.config).double().load_state_dict(state)


def test_top_k_weights_of_the_sentinel_are_nothing():
    model = parallelize_experts(even_model(), make_mesh(1))
    experts = next(module for _, module in parallel_experts(model))
    x, logits = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    routing = top_k(logits, 2)
    indices = routing.indices.clone()
    indices[:, 1] = 4
    got = experts(x, indices, routing.weights.masked_fill(indices == 4, float("inf")))
    torch.testing.assert_close(got, experts(x, indices[:, :1], routing.weights[:, :1]), rtol=1e-13, atol=0)
