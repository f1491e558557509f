"""Rows over processes: to their experts and back, bit for bit, under every plan; bytes, peers and gradients."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from process_group import in_processes

from mixtura.lm.parallel import exchange_cost, make_mesh
from mixtura.lm.parallel.exchange import exchange

D, E = 3, 8
MESHES = [
    ({"expert": 4}, "direct"),
    ({"expert": 2}, "direct"),
    ({"expert": 1}, "direct"),
    ({"expert": 2, "slices": 2}, "direct"),
    ({"expert": 1, "slices": 4}, "direct"),
    ({"expert": 2, "tensor": 2}, "coordinated"),
    ({"expert": 1, "tensor": 4}, "coordinated"),
    ({"expert": 2, "tensor": 2}, "direct"),
    ({"expert": 4, "node": 2}, "hierarchical"),
    ({"expert": 4, "node": 1}, "hierarchical"),
    ({"expert": 2, "tensor": 2, "node": 2}, "hierarchical"),
    ({"expert": 2, "slices": 2, "node": 2}, "hierarchical"),
]


def rows_of(rank, seed, even=False):
    """Rows that name where they are from, what expert they go to and their number; some ranks have none, some experts, too."""
    g = torch.Generator().manual_seed(100 * seed + rank)
    counts = torch.full((E,), 3) if even else torch.randint(0, 5, (E,), generator=g)
    if not even:
        counts[5] = 0  # an expert without rows
        counts *= rank != 2  # a process without rows
    experts = torch.arange(E).repeat_interleave(counts)
    rows = torch.stack([torch.full_like(experts, rank), experts, torch.arange(len(experts))], 1).double()
    return rows, counts


@contextlib.contextmanager
def counted():
    """Peers and bytes of every all-to-all of rows."""
    seen, original = [], dist.all_to_all_single

    def counting(output, input, *args, group=None, **kwargs):
        if input.is_floating_point():
            seen.append((dist.get_world_size(group), input.numel() * input.element_size()))
        return original(output, input, *args, group=group, **kwargs)

    dist.all_to_all_single = counting
    try:
        yield seen
    finally:
        dist.all_to_all_single = original


def exchange_everywhere(rank):
    found = {}
    for i, (degrees, plan) in enumerate(MESHES):
        mesh = make_mesh(4, **degrees)
        data = rank // mesh.tensor  # tensor ranks hold the same rows
        rows, counts = rows_of(data, seed=i)
        rows.requires_grad_()
        sent = exchange(rows, counts, mesh, plan=plan)
        # A process's slices sum to the whole, so that each adds its share of the identity.
        back = sent.undo(sent.rows / mesh.slices)
        g = torch.Generator().manual_seed(1000 + data)
        slope = torch.randn(back.shape, generator=g, dtype=torch.float64)
        (grad,) = torch.autograd.grad(back, rows, slope)
        found[str(i)] = {
            "back": bool(torch.equal(back, rows.detach())),
            "grad": bool(torch.allclose(grad, slope, rtol=1e-15, atol=0)),
            "rows": sent.rows.detach(),
            "counts": sent.counts,
        }
    return found


def test_rows_reach_their_experts_and_come_back_bit_for_bit_under_every_plan():
    found = in_processes(4, exchange_everywhere)
    for i, (degrees, plan) in enumerate(MESHES):
        mesh = make_mesh(4, **degrees)
        n_local = E // mesh.owners
        for rank in range(4):
            here = found[rank][str(i)]
            assert here["back"], (degrees, plan, rank)
            assert here["grad"], (degrees, plan, rank)
            at = mesh.coordinates(rank)
            senders = [
                other
                for other in range(4)
                if mesh.coordinates(other).expert_data == at.expert_data
                and (plan != "coordinated" or mesh.coordinates(other).tensor == at.tensor)
            ]
            sent = torch.cat([rows_of(other // mesh.tensor, seed=i)[0] for other in senders])
            mine = sent[(sent[:, 1] // n_local) == mesh.owner(rank)]
            assert sorted(mine.tolist()) == sorted(here["rows"].tolist()), (degrees, plan, rank)
            experts = (here["rows"][:, 1] - mesh.owner(rank) * n_local).long()
            assert torch.equal(experts, torch.arange(n_local).repeat_interleave(here["counts"])), "sorted by expert"


def count_everywhere(rank):
    found = []
    for degrees, plan in MESHES:
        mesh = make_mesh(4, **degrees)
        if mesh.slices > 1:
            continue
        rows, counts = rows_of(rank // mesh.tensor, seed=0, even=True)
        with counted() as there:
            sent = exchange(rows, counts, mesh, plan=plan)
        with counted() as back:
            sent.undo(sent.rows)
        for direction, seen in (("there", there), ("back", back)):
            cost = exchange_cost(len(rows), 1, D, rows.dtype, mesh, plan, direction=direction)
            got = sum(peers for peers, _ in seen), sum(size for _, size in seen)
            # Where a step has one member nothing is called; the formula counts it as one peer and its rows as sent.
            found.append([plan, *mesh.shape, mesh.node, direction, cost.peers, cost.bytes_sent, *got])
    return found


def test_peers_and_bytes_are_those_of_the_formula():
    for found in in_processes(4, count_everywhere):
        whole = 8.0 * 24 * D
        for plan, copies, expert, _, tensor, node, direction, peers, sent, got_peers, got_bytes in found:
            alone = expert * tensor == 1 or (plan == "coordinated" and expert == 1) or node == 1
            if not alone:
                assert (peers, sent) == (got_peers, got_bytes), (plan, copies, expert, tensor, direction)
            if plan == "coordinated" and expert == 2:
                assert (peers, sent) == ((2, whole / 2) if direction == "there" else (4, whole / 2 + whole))
            if plan == "hierarchical" and node == 2:
                assert (peers, sent) == (4, 2 * whole)


def test_the_paper_s_example_of_the_coordinated_plan():
    mesh = make_mesh(128, tensor=8)
    direct = exchange_cost(64, 2, 1024, torch.bfloat16, mesh, "direct", latency=1.0)
    ours = exchange_cost(64, 2, 1024, torch.bfloat16, mesh, "coordinated", latency=1.0)
    assert (direct.seconds, ours.seconds) == (128, 16)
    assert ours.bytes_sent == direct.bytes_sent / 8 == 64 * 2 * 1024 * 2 / 8


def disagree(rank):
    rows, counts = torch.zeros(2 + rank, D), torch.tensor([2 + rank, 0])
    try:
        exchange(rows, counts, make_mesh(2, tensor=2), plan="coordinated")
    except RuntimeError as error:
        return str(error)
    return ""


def test_tensor_ranks_with_other_rows_are_an_error_on_all_of_them():
    assert all("tensor ranks must hold the same rows" in said for said in in_processes(2, disagree))


def test_one_process_needs_no_process_group():
    rows, counts = rows_of(0, seed=0)
    sent = exchange(rows, counts, make_mesh(1))
    assert torch.equal(sent.rows, rows) and torch.equal(sent.counts, counts) and torch.equal(sent.undo(sent.rows), rows)


def test_bad_arguments_of_an_exchange_are_named():
    rows, counts = torch.zeros(3, D), torch.tensor([1, 2])
    with pytest.raises(
        ValueError, match=r"plan must be one of \['direct', 'coordinated', 'hierarchical'\], got 'tree'"
    ):
        exchange(rows, counts, make_mesh(1), plan="tree")
    with pytest.raises(ValueError, match=r"must sum to the 3 rows, got shape \(2,\), sum 4"):
        exchange(rows, counts + torch.tensor([0, 1]), make_mesh(1))
    with pytest.raises(ValueError, match=r"2 experts do not divide among 4 owners; take mesh.for_experts\(2\)"):
        exchange(rows, counts, make_mesh(4))
