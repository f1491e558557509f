"""Masks of parameters that FSDP2 cuts in rows: the same masks as in one process, over two and four."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from process_group import in_processes
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mixtura.core.isoflop import IsoFlop, convert
from mixtura.core.mask_moves import moved_mask, smallest
from mixtura.core.masks import Rows, draw_mask, local, mask_parameter, masked_parameters, rows_of
from mixtura.core.sparse_layers import Between, SparseConv2d, SparseLinear
from mixtura.core.sparse_training import MaskConfig, MaskOptimizer

STEPS = 21
MORE = ("single precision", "set")  # with two processes only


class Stack(nn.Module):
    """Three matrices (3, 8, 8), masked one by one; each sees all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8) / 4)
        mask_parameter(self, "weight")
        for e in range(3):
            self.mask_weight[e] = draw_mask((8, 8), 20 + e, generator=torch.Generator().manual_seed(e))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->beo", x, self.weight).tanh().sum(1)


def linear() -> nn.Sequential:
    """Of 16 rows four processes have 4 each, of 6 rows the last has none."""
    net = nn.Sequential(SparseLinear(8, 16), nn.Tanh(), SparseLinear(16, 6), nn.Tanh(), nn.Linear(6, 2))
    for i in (0, 2):
        net[i].set_mask(draw_mask(net[i].weight.shape, 40, generator=torch.Generator().manual_seed(i)))
    return net


def factors() -> nn.Module:
    """Doped and factorized layers, whose products decay."""
    plain = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 2))
    made: nn.Module = plain
    for member, skip in (("doped", "2"), ("factorized", "0")):
        transform = IsoFlop(
            member, 0.5, skip=(skip, "*.u", "*.v", "*.sparse"), between=Between(norm="none", activation="none")
        )
        made = convert(
            made, transform, example_input=torch.zeros(1, 8), generator=torch.Generator().manual_seed(1), fresh=True
        )
    return made


def groups() -> nn.Sequential:
    """A convolution and a linear layer with two of four inputs active."""
    net = nn.Sequential(
        nn.Unflatten(1, (8, 1, 1)),
        SparseConv2d(8, 8, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        SparseLinear(8, 6),
        nn.Linear(6, 2),
    )
    for i in (1, 4):
        shape = net[i].weight.shape
        net[i].set_mask(
            draw_mask(shape, shape.numel() // 2, n_m=(2, 4), axis=1, generator=torch.Generator().manual_seed(i))
        )
    return net


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.3)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "rigl": (linear, sgd, {}),
    "single precision": (lambda: linear().float(), sgd, {}),
    "set": (linear, adamw, {"method": "set"}),
    "groups": (groups, sgd, {"n_m": (2, 4)}),
    "stacked": (lambda: nn.Sequential(Stack(), nn.Linear(8, 2)), sgd, {}),
    "joint": (factors, adamw, {"joint_decay": True}),
}


def begun(name: str, sharded: bool, seed: int = 0) -> tuple[nn.Module, MaskOptimizer]:
    build, optimizer, options = CASES[name]
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # so that sums in another order do not change which weight is smaller
    net = build()
    torch.set_default_dtype(before)
    if sharded:
        if dist.get_rank():
            for found in masked_parameters(net).values():
                found.mask.copy_(found.mask.flip(0))  # those of process 0 count
        if name == "set":
            fully_shard(net[0])
        fully_shard(net)
    config = MaskConfig(every=4, drop=0.5, **options)
    return net, MaskOptimizer(net, optimizer(net.parameters()), config, total_steps=STEPS + 6)


def train(net: nn.Module, made: MaskOptimizer, first: int, last: int, part: slice = slice(None)) -> None:
    kind = next(net.parameters()).dtype
    for step in range(first, last):
        made.zero_grad()
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).to(kind)[part]
        F.mse_loss(net(x), x[:, :2].sin()).backward()
        made.step()


def whole(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in tensors.items()}


def everywhere(rank: int) -> dict[str, Any]:
    """All cases, and a run that was broken off and went on from its state."""
    part = slice(rank, None, dist.get_world_size())
    found: dict[str, Any] = {}
    for name in CASES if dist.get_world_size() == 2 else [n for n in CASES if n not in MORE]:
        net, made = begun(name, sharded=True)
        train(net, made, 0, STEPS, part)
        for n, one in made.masked.items():
            rows = rows_of(n, one.parameter)
            assert isinstance(one.mask, DTensor) and len(local(one.mask)) == rows.count
            for value in made.optimizer.state[one.parameter].values():
                if isinstance(value, DTensor):
                    assert not local(value)[~local(one.mask)].any()
            assert not local(one.parameter)[~local(one.mask)].any()
            assert one.active == int(one.mask.full_tensor().sum())
        found[name] = {
            "state": whole(dict(net.state_dict())),
            "masks": whole({n: one.mask for n, one in made.masked.items()}),
            "explored": made.explored,
        }
    if dist.get_world_size() > 2:
        return found
    net, made = begun("set", sharded=True)
    train(net, made, 0, 11, part)
    state, weights = made.state_dict(), {n: t.clone() for n, t in net.state_dict().items()}
    plain = {**state, "masks": whole(state["masks"]), "union": whole(state["union"])}
    for kind, given in (("cut", state), ("whole", plain)):
        again, resumed = begun("set", sharded=True, seed=7)
        again.load_state_dict(weights)
        resumed.load_state_dict(copy.deepcopy(given))  # an optimizer goes on with the tensors it is given
        train(again, resumed, 11, STEPS, part)
        found[f"resumed {kind}"] = {"state": whole(dict(again.state_dict())), "explored": resumed.explored}
    state = whole(dict(net.state_dict()))
    gathered = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    assert gathered.keys() == state.keys() and all(torch.equal(t, state[n]) for n, t in gathered.items())
    return found


@pytest.mark.parametrize("world", [2, 4])
def test_masks_that_are_cut_move_as_in_one_process(world: int):
    found = in_processes(world, everywhere)
    for name in CASES if world == 2 else [n for n in CASES if n not in MORE]:
        net, made = begun(name, sharded=False)
        first = {n: one.mask.clone() for n, one in made.masked.items()}
        train(net, made, 0, STEPS)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if name == "single precision" else {"rtol": 1e-9, "atol": 1e-10}
        for part in found:
            for n, one in made.masked.items():
                assert torch.equal(part[name]["masks"][n], one.mask), (name, n)
                assert not torch.equal(first[n], one.mask)
            for n, tensor in net.state_dict().items():
                torch.testing.assert_close(part[name]["state"][n], tensor, **tolerance)
            assert part[name]["explored"] == made.explored
    for part in found if world == 2 else []:
        for kind in ("resumed cut", "resumed whole"):
            assert all(torch.equal(t, part["set"]["state"][n]) for n, t in part[kind]["state"].items())
            assert part[kind]["explored"] == part["set"]["explored"]


def few_values(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, its mask and a score to grow by, shape (9, 8), with many equal values; the last has a NaN."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-2, 3, (9, 8), generator=generator).float() / 4
    if seed == 5:
        weight[2, 3] = torch.nan
    mask = torch.rand(9, 8, generator=generator) < 0.6
    score = torch.randint(0, 3, (9, 8), generator=generator).double()
    return weight, mask, score


def ties(rank: int) -> list[torch.Tensor]:
    """Choices among few values, many of them equal, and moves of a mask, over the processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for seed in range(6):
        weight, mask, score = few_values(seed)
        cut = [distribute_tensor(t, mesh, [Shard(0)]) for t in (weight, mask.byte(), score)]
        rows = rows_of("weight", cut[0])
        own = [t.to_local() for t in cut]
        new, grown = moved_mask(own[0], own[1].bool(), own[2], 0.4, rows=rows)
        for moved in (new, grown):
            found.append(DTensor.from_local(moved.byte(), mesh, [Shard(0)], shape=(9, 8), stride=(8, 1)).full_tensor())
        keys = (own[0] * 4).nan_to_num().int().flatten()
        parts = [smallest(keys, n, rows).byte().view(-1, 8) for n in (0, 1, 30, 72)]
        found += [DTensor.from_local(p, mesh, [Shard(0)], shape=(9, 8), stride=(8, 1)).full_tensor() for p in parts]
    return found


def test_of_equal_weights_the_first_go_in_however_many_processes():
    found = in_processes(4, ties)
    want = []
    for seed in range(6):
        weight, mask, score = few_values(seed)
        # By lists of positions, sorted by size and then by place.
        size = [x if x == x else 1e9 for x in weight.abs().flatten().tolist()]
        active = [i for i in range(72) if mask.flatten()[i]]
        gone = set(sorted(active, key=lambda i: (size[i], i))[: int(0.4 * len(active))])
        free = [i for i in range(72) if i not in active or i in gone]
        come = sorted(free, key=lambda i: (-score.flatten()[i].item(), i))[: len(gone)]
        new = torch.tensor([(i in active and i not in gone) or i in come for i in range(72)])
        want += [new, torch.tensor([i in come for i in range(72)])]
        keys = (weight * 4).nan_to_num().int().flatten().tolist()
        order = sorted(range(72), key=lambda i: (keys[i], i))
        want += [torch.tensor([i in order[:n] for i in range(72)]) for n in (0, 1, 30, 72)]
        alone = moved_mask(weight, mask, score, 0.4)
        assert torch.equal(alone[0].flatten(), new) and int(alone[0].sum()) == len(active)
    for part in found:
        for got, wanted in zip(part, want, strict=True):
            assert torch.equal(got.bool().flatten(), wanted)


def other_cuts(rank: int) -> list[str]:
    """What a parameter that is cut by columns, or over two axes, is answered."""
    said = []
    layer = SparseLinear(8, 8)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "rows"))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh["rows"], [Shard(1)]))
    try:
        MaskOptimizer(layer, sgd(layer.parameters()), MaskConfig(every=1), total_steps=9)
    except TypeError as error:
        said.append(str(error))
    with torch.device("meta"):
        empty = nn.Sequential(SparseLinear(8, 8))
    fully_shard(empty)
    try:
        MaskOptimizer(empty, sgd(empty.parameters()), MaskConfig(every=1), total_steps=9)
    except TypeError as error:
        said.append(str(error))
    # Copies of the rows: replicated over one axis, cut over the other.
    torch.manual_seed(0)
    net = linear()
    fully_shard(net, mesh=mesh)
    made = MaskOptimizer(net, sgd(net.parameters()), MaskConfig(every=4), total_steps=STEPS)
    train(net, made, 0, 5, slice(rank, None, 4))
    rows = rows_of("0.weight", net[0].weight)
    said.append(f"{rows.first} {rows.count} {len(rows.copies)} {int(net[0].mask.full_tensor().sum())}")
    return said


def test_only_rows_over_one_axis_are_taken_and_copies_of_them_agree():
    for rank, (refused, empty, copied) in enumerate(in_processes(4, other_cuts)):
        assert "weight is cut as (Shard(dim=1),)" in refused and "as fully_shard does" in refused
        assert "0.weight is on meta, and its processes exchange over cpu" in empty
        assert copied == f"{8 * (rank % 2)} 8 1 40"


def test_a_plain_parameter_has_all_its_rows():
    assert rows_of("x", torch.zeros(5, 2)) == Rows(0, 5)
