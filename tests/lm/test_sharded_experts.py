"""Sharded experts with copies are the experts of one process: collectives, gradients, weights, memory, new owners."""

import gc
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from process_group import in_processes

from mixtura.core.shared_batch import SharedBatch
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.parallel import clip_gradients, gather_experts, make_mesh, reduce_gradients
from mixtura.lm.parallel.cluster import Cluster
from mixtura.lm.parallel.experts import parallel_experts, single_name
from mixtura.lm.parallel.placement import homogeneous
from mixtura.lm.parallel.sharded_experts import reshard, shard_experts, sharded_layers
from mixtura.lm.parallel.sparse_collectives import (
    Transfer,
    bytes_moved,
    rearranged,
    sparse_all_gather,
    sparse_reduce_scatter,
)

STEPS, RESHARD, LENGTH, EXPERTS = 12, 5, 6, 8
PARTS = [0, 3, 4, 5, 7]
FAST = Cluster(nodes=2, devices_per_node=2, inter_bw=1e15, intra_bw=1e15, flops=1e6, memory=1e9)


def placements(seed):
    owners = homogeneous(EXPERTS, 4)[torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(seed))]
    return owners, owners | (torch.rand(EXPERTS, 4, generator=torch.Generator().manual_seed(seed + 1)) < 0.4)


def collect(rank):
    """Stacks, sums and inner products of the two collectives, and the bytes that left and came."""
    import torch.distributed as dist

    group, found = dist.group.WORLD, []
    for seed in range(4):
        before, after = placements(seed)
        whole = torch.randn(EXPERTS, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        transfer = Transfer.between(before, after, rank)
        moved = [0, 0]
        swap = dist.all_to_all_single

        def counting(out, rows, *args, moved=moved, swap=swap, **kwargs):
            moved[0] += rows.numel() * rows.element_size()
            moved[1] += out.numel() * out.element_size()
            return swap(out, rows, *args, **kwargs)

        dist.all_to_all_single = counting
        shard = whole[before[:, rank]]
        stack = sparse_all_gather(shard, transfer, group).wait()
        dist.all_to_all_single = swap
        y = torch.randn(stack.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * seed + rank))
        home = sparse_reduce_scatter(y, transfer, group).wait()
        ahead, behind = (stack * y).sum(), (shard * home).sum()
        own, slots = transfer.slots.tensor_split([transfer.n_own])
        found.append(
            {"stack": stack, "slots": slots, "y": y, "home": home, "own": own}
            | {"moved": torch.tensor(moved), "ahead": ahead, "behind": behind}
        )
    return found


def test_weights_come_as_they_are_and_gradients_go_home_in_order():
    found = in_processes(4, collect)
    for seed in range(4):
        before, after = placements(seed)
        whole = torch.randn(EXPERTS, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        sums = torch.zeros_like(whole)
        for rank in range(4):  # in the order of ranks, as the collective promises
            sums.index_add_(0, found[rank][seed]["slots"], found[rank][seed]["y"])
        moved = bytes_moved(before, after, whole[0].numel() * 8)
        for rank in range(4):
            got = found[rank][seed]
            assert got["own"].tolist() == before[:, rank].nonzero().flatten().tolist()
            assert sorted(got["slots"].tolist()) == (after & ~before)[:, rank].nonzero().flatten().tolist()
            assert torch.equal(got["stack"], whole[got["slots"]])
            assert torch.equal(got["home"], sums[got["own"]])
            assert torch.equal(got["moved"], moved[:, rank])
        assert sum(f[seed]["ahead"] for f in found) == pytest.approx(
            float(sum(f[seed]["behind"] for f in found)), rel=1e-12
        )


def collect_twice(rank):
    """Copies that came in two transfers, the second only of what was new, and those of one transfer; and what the second sent."""
    import torch.distributed as dist

    group, found = dist.group.WORLD, []
    for seed in range(4):
        before, first = placements(seed)
        more = first | placements(seed + 50)[1]
        shard = torch.randn(EXPERTS, 3, generator=torch.Generator().manual_seed(seed))[before[:, rank]]
        parts = [Transfer.between(before, first, rank), Transfer.between(before, more, rank, already=first)]
        whole = Transfer.between(before, more, rank)
        stacks = [(part, sparse_all_gather(shard, part, group).wait()) for part in parts]
        found.append(
            [rearranged(stacks, whole), sparse_all_gather(shard, whole, group).wait(), torch.tensor(len(parts[1].send))]
        )
    return found


def test_a_second_transfer_brings_what_is_new_and_joins_the_first():
    found = in_processes(4, collect_twice)
    for seed in range(4):
        before, first = placements(seed)
        new = (first | placements(seed + 50)[1]) & ~first & ~before
        for joined, at_once, _ in (row[seed] for row in found):
            assert torch.equal(joined, at_once)
        assert sum(int(row[seed][2]) for row in found) == int(new.sum()) > 0


def test_owners_must_keep_what_they_own():
    before = homogeneous(4, 2)
    with pytest.raises(ValueError, match=r"before, of shape .* must lie within after"):
        Transfer.between(before, ~before, 0)


def make_model():
    torch.manual_seed(1)
    config = MixturaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_experts=EXPERTS,
        shared_expert_intermediate_size=8,
        router_aux_loss_coef=0.5,
        attn_implementation="eager",
    )
    config._experts_implementation = "eager"
    model = MixturaForCausalLM(config)
    with torch.no_grad():  # uneven: the first experts are wanted by most tokens
        for layer in model.model.layers:
            layer.mlp.gate.weight[:2] *= 8
    return model.double()


def train(model, part=slice(None), mesh=None, every=0):
    model.train()
    optimizer, shared = torch.optim.AdamW(model.parameters(), lr=0.01), SharedBatch()
    found = {"losses": [], "copies": [], "moved": 0}
    for step in range(STEPS):
        ids = torch.randint(1, 40, (PARTS[-1], LENGTH), generator=torch.Generator().manual_seed(step))[part]
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, shared_batch=shared, use_cache=False).loss
        loss.backward()
        if mesh is not None:
            reduce_gradients(model, mesh)
            clip_gradients(model, mesh, 0.5)
            found["copies"].append([int((x.placement & ~x.owners).sum()) for x in sharded_layers(model)])
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if step == 3:
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found["gradients"] = gradients if mesh is None else whole(model, gradients)
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(float(shared.sum(loss)) / shared.size)
        if every and (step + 1) % every == 0:
            found["moved"] += int(reshard(model, optimizer))
    found["state"] = model.state_dict() if mesh is None else gather_experts(model)
    return found


def whole(model, gradients):
    spread = dict(parallel_experts(model))
    found = {}
    for name, gradient in gradients.items():
        path, _, last = name.rpartition(".local_experts.")
        module = spread.get(path)
        found[single_name(name)] = module.whole(last, gradient) if module and last in module.stacked else gradient
    return found


CASES = [
    {"overlap": 0, "capacity": 1},
    {"overlap": 2, "capacity": 1},
    {"overlap": 2, "capacity": 2, "rematerialize": True},
    {"overlap": 2, "capacity": 2},
    {"overlap": EXPERTS, "capacity": 2, "rematerialize": True, "calibrate": FAST},
    {"overlap": EXPERTS, "capacity": 2, "calibrate": FAST},
]


def train_everywhere(rank, world):
    results = []
    bounds = PARTS if world == 4 else [PARTS[0], PARTS[2], PARTS[4]]
    first, last = list(pairwise(bounds))[rank]
    for case in CASES:
        mesh = make_mesh(world, node=2)
        if "calibrate" in case:
            case = case | {"calibrate": replace(FAST, nodes=world // 2)}
        model = shard_experts(make_model(), mesh, **case)
        results.append(train(model, slice(first, last), mesh, RESHARD))
    return results


@pytest.fixture(scope="module")
def alone():
    return train(make_model())


@pytest.mark.parametrize("world", [4, 2])
def test_a_training_with_copies_and_new_owners_is_the_training_in_one_process(world, alone):
    found = in_processes(world, train_everywhere, world)
    for at, case in enumerate(CASES):
        for rank in range(world):
            got = found[rank][at]
            if case["overlap"]:
                assert all(sum(copies) > 0 for copies in got["copies"][1:]), "copies were made in every step"
            assert got["moved"] or case["overlap"] == EXPERTS, "experts changed owners"
            assert got["gradients"].keys() == alone["gradients"].keys()
            for name, gradient in alone["gradients"].items():
                torch.testing.assert_close(
                    got["gradients"][name], gradient, rtol=1e-9, atol=1e-10, msg=f"{case} {name}"
                )
            torch.testing.assert_close(torch.tensor(got["losses"]), torch.tensor(alone["losses"]), rtol=1e-9, atol=0)
            for name, tensor in alone["state"].items():
                torch.testing.assert_close(got["state"][name], tensor, rtol=1e-9, atol=1e-9, msg=f"{case} {name}")
    for freed, kept in ((2, 3), (4, 5)):  # fetched again or kept: the same to the bit
        for name, tensor in found[0][kept]["state"].items():
            assert torch.equal(found[0][freed]["state"][name], tensor), name


def alive(shapes):
    """Bytes of each storage that a tensor of stacked experts looks at."""
    gc.collect()
    found = [
        t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dim() == 3 and tuple(t.shape[1:]) in shapes
    ]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.untyped_storage().nbytes()}


def held(rank, rematerialize):
    """Bytes of own weights, and of other stacks of experts that are alive after the forward pass."""
    model = shard_experts(
        make_model(), make_mesh(4, node=2), overlap=2, capacity=2, rematerialize=rematerialize
    ).train()
    parameters = [p for layer in sharded_layers(model) for p in layer.local_experts.parameters()]
    ids = torch.randint(1, 40, (2, LENGTH), generator=torch.Generator().manual_seed(rank))
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    shapes = {tuple(p.shape[1:]) for p in parameters}
    before = alive(shapes)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    after = alive(shapes)
    loss.backward()
    return {
        "own": sum(p.numel() * p.element_size() for p in parameters),
        "extra": sum(after.values()) - sum(before.values()),
        "copies": sum(int((x.placement & ~x.owners)[:, rank].sum()) for x in sharded_layers(model)),
    }


def held_both_ways(rank):
    return [held(rank, rematerialize) for rematerialize in (False, True)]


def test_every_process_owns_as_much_and_freed_copies_are_gone():
    found = in_processes(4, held_both_ways)
    experts = make_model().model.layers[0].mlp.experts
    each = sum(p[0].numel() * p.element_size() for p in experts.parameters())
    for rank in range(4):
        kept, freed = found[rank]
        assert kept["own"] == freed["own"] == 2 * each * EXPERTS // 4
        assert kept["extra"] == kept["copies"] * each <= 2 * 2 * each
        assert freed["copies"] == kept["copies"]
        assert freed["extra"] == 0
    assert sum(kept["copies"] for kept, _ in found) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overlap": -1, "capacity": 1}, "overlap must be >= 0, got -1"),
        ({"overlap": 1, "capacity": -1}, "capacity must be >= 0, got -1"),
        ({"overlap": 1, "capacity": 1, "calibrate": FAST}, "calibrate must be a cluster of 1 devices, got 4"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        shard_experts(make_model(), make_mesh(1), **arguments)


def test_a_mesh_that_shares_experts_in_another_way_is_refused():
    with pytest.raises(ValueError, match="need a mesh of experts alone, expert=4"):
        shard_experts(make_model(), make_mesh(4, expert=2), overlap=1, capacity=1)
    with pytest.raises(ValueError, match="8 experts do not divide over 3 processes"):
        shard_experts(make_model(), make_mesh(3), overlap=1, capacity=1)


def test_one_process_needs_no_group(alone):
    model = shard_experts(make_model(), make_mesh(1), overlap=2, capacity=1)
    got = train(model, mesh=make_mesh(1), every=RESHARD)
    torch.testing.assert_close(torch.tensor(got["losses"]), torch.tensor(alone["losses"]), rtol=1e-9, atol=0)
