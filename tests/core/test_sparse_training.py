"""Masks that stay and masks that move: one move against NumPy, and what must hold after many."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mixtura.core.sparse_layers import SparseConv2d, SparseLinear, draw_mask, mask_parameter, masked_parameters
from mixtura.core.sparse_training import MaskConfig, MaskOptimizer, drop_share, moved_mask
from mixtura.core.training import TrainConfig, fit

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.5),
}


def network(seed: int = 0, active: int = 40) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(SparseLinear(8, 16), nn.Tanh(), SparseLinear(16, 8), nn.Tanh(), nn.Linear(8, 2))
    for i in (0, 2):
        net[i].set_mask(draw_mask(net[i].weight.shape, active, generator=torch.Generator().manual_seed(seed)))
    return net


def loss_of(net: nn.Module, step: int, rows: int = 32) -> torch.Tensor:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(step))
    return (net(x) - x[:, :2].sin()).pow(2).mean()


def train(net: nn.Module, made: MaskOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        made.zero_grad()
        loss_of(net, step).backward()
        made.step()


def one_move(weight: np.ndarray, mask: np.ndarray, gradient: np.ndarray, share: float) -> tuple[set[int], set[int]]:
    """RigL's drop and growth, by lists: positions dropped and positions grown."""
    active = [i for i in range(weight.size) if mask.flat[i]]
    by_size = sorted(active, key=lambda i: abs(weight.flat[i]))
    dropped = set(by_size[: int(share * len(active))])
    still = set(active) - dropped
    free = [i for i in range(weight.size) if i not in still]
    by_slope = sorted(free, key=lambda i: -abs(gradient.flat[i]))
    return dropped, set(by_slope[: len(dropped)])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_move_drops_and_grows_what_a_list_of_positions_says(name: str):
    net = network()
    made = MaskOptimizer(net, OPTIMIZERS[name](net.parameters()), MaskConfig(every=5, drop=0.4), total_steps=40)
    train(net, made, 0, 5)
    made.zero_grad()
    loss_of(net, 5).backward()
    gradients = {i: net[i].weight.grad.clone().numpy() for i in (0, 2)}
    masks = {i: net[i].mask.clone().numpy() for i in (0, 2)}
    # The optimizer's step comes first, on a copy of everything.
    twin = network()
    inner = OPTIMIZERS[name](twin.parameters())
    inner.load_state_dict(copy.deepcopy(made.optimizer.state_dict()))  # else both step one state
    twin.load_state_dict(net.state_dict())
    for p, q in zip(twin.parameters(), net.parameters(), strict=True):
        p.grad = q.grad.clone()
    for i in (0, 2):
        twin[i].weight.grad *= twin[i].mask
    inner.step()
    made.step()
    share = 0.2 * (1 + np.cos(np.pi * 5 / 30))
    for i in (0, 2):
        after = twin[i].weight.detach().numpy() * masks[i]
        dropped, grown = one_move(after, masks[i], gradients[i], share)
        assert len(dropped) == int(share * 40) > 0
        want = masks[i].copy().ravel()
        want[list(dropped)] = False
        want[list(grown)] = True
        np.testing.assert_array_equal(net[i].mask.numpy().ravel(), want)
        weight = net[i].weight.detach().numpy().ravel()
        assert not weight[list(grown)].any() and not weight[~want].any()
        kept = want.copy()
        kept[list(grown)] = False
        np.testing.assert_array_equal(weight[kept], after.ravel()[kept])
        for value in made.optimizer.state[net[i].weight].values():
            if torch.is_tensor(value) and value.shape == net[i].weight.shape:
                assert not value.numpy().ravel()[list(grown)].any()


@pytest.mark.parametrize("method", ["rigl", "set", "static"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_fifty_steps_the_count_is_the_same_and_inactive_weights_and_state_are_zero(name: str, method: str):
    net = network()
    before = {n: found.mask.clone() for n, found in masked_parameters(net).items()}
    made = MaskOptimizer(net, OPTIMIZERS[name](net.parameters()), MaskConfig(method=method, every=4), total_steps=50)
    train(net, made, 0, 50)
    for n, found in masked_parameters(net).items():
        assert found.active == 40
        assert not found.parameter[~found.mask].any()
        for value in made.optimizer.state[found.parameter].values():
            if torch.is_tensor(value) and value.shape == found.mask.shape:
                assert not value[~found.mask].any()
        assert torch.equal(found.mask, before[n]) == (method == "static")
    assert (made.explored > 80 / 256) == (method != "static")


def test_masks_stop_moving_at_their_end_and_start_after_the_first_interval():
    net = network()
    made = MaskOptimizer(
        net, OPTIMIZERS["sgd"](net.parameters()), MaskConfig(every=5, end=0.5, drop=0.9), total_steps=40
    )
    moved = []
    for step in range(40):
        before = net[0].mask.clone()
        train(net, made, step, step + 1)
        if not torch.equal(before, net[0].mask):
            moved.append(step)
    assert moved == [5, 10, 15]
    assert drop_share(0, 20) == 0.3 and drop_share(20, 20) == 0 and drop_share(25, 20) == 0


def test_an_optimizer_never_sees_the_gradient_of_an_inactive_weight():
    net = network()
    inner = OPTIMIZERS["sgd"](net.parameters())
    seen = []
    step = inner.step

    def spy() -> None:
        seen.append(max(float(net[i].weight.grad[~net[i].mask].abs().max()) for i in (0, 2)))
        step()

    inner.step = spy
    made = MaskOptimizer(net, inner, MaskConfig(every=3), total_steps=20)
    train(net, made, 0, 20)
    assert len(seen) == 20 and not any(seen)
    # Not because there is none:
    loss_of(net, 0).backward()
    assert float(net[0].weight.grad[~net[0].mask].abs().max()) > 0


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_resumed_run_ends_in_the_same_bits(method: str):
    def made_for(net: nn.Module) -> MaskOptimizer:
        return MaskOptimizer(
            net, OPTIMIZERS["adamw"](net.parameters()), MaskConfig(method=method, every=3), total_steps=30
        )

    whole = network()
    unbroken = made_for(whole)
    train(whole, unbroken, 0, 30)
    first = network()
    broken = made_for(first)
    train(first, broken, 0, 13)
    state, weights = broken.state_dict(), {k: v.clone() for k, v in first.state_dict().items()}
    second = network(seed=9)
    second.load_state_dict(weights)
    resumed = made_for(second)
    resumed.load_state_dict(state)
    train(second, resumed, 13, 30)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in whole.state_dict().items())
    assert resumed.explored == unbroken.explored


def test_the_common_loop_keeps_a_sparse_model_sparse_and_resumes_its_masks(tmp_path: Path):
    static = network()
    before = static[0].mask.clone()
    fit(static, lambda step: loss_of(static, step), TrainConfig(steps=12))
    assert torch.equal(static[0].mask, before) and not static[0].weight[~before].any()

    config, masks = TrainConfig(steps=24, checkpoint_every=5), MaskConfig(every=2)
    whole = network()
    fit(whole, lambda step: loss_of(whole, step), config, masks=masks)
    assert not torch.equal(whole[0].mask, before)
    broken = network()

    def interrupted(step: int) -> torch.Tensor:
        if step == 13:
            raise KeyboardInterrupt
        return loss_of(broken, step)

    with pytest.raises(KeyboardInterrupt):
        fit(broken, interrupted, config, masks=masks, out=tmp_path / "state")
    resumed = network(seed=4)
    history = fit(resumed, lambda step: loss_of(resumed, step), config, masks=masks, out=tmp_path / "state")
    assert history.resumed_at == 10
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in whole.state_dict().items() if "weight" in k)
    with pytest.raises(ValueError, match="every=2, this one has 3"):
        fit(network(), lambda step: loss_of(resumed, step), config, masks=MaskConfig(every=3), out=tmp_path / "state")
    with pytest.raises(ValueError, match="Linear has no masked weight"):
        fit(nn.Linear(8, 2), lambda step: loss_of(resumed, step), config, masks=masks)


def test_stacked_experts_keep_their_number_each():
    net = nn.Module()
    torch.manual_seed(0)
    net.stack = nn.Parameter(torch.randn(3, 4, 8))
    mask_parameter(net, "stack")
    for e in range(3):
        net.mask_stack[e] = draw_mask((4, 8), 10 + e)
    made = MaskOptimizer(net, torch.optim.SGD(net.parameters(), lr=0.1), MaskConfig(every=1, drop=0.5), total_steps=20)
    before = net.mask_stack.clone()
    for step in range(10):
        made.zero_grad()
        torch.manual_seed(step)
        (net.stack * torch.randn(3, 4, 8)).sum().backward()
        made.step()
    assert net.mask_stack.sum((1, 2)).tolist() == [10, 11, 12]
    assert not torch.equal(before, net.mask_stack) and not net.stack[~net.mask_stack].any()


def grouped(seed: int = 0) -> nn.Sequential:
    """A convolution and a linear layer with two of four inputs active, and one matrix for each of two experts."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Unflatten(1, (8, 1, 1)), SparseConv2d(8, 8, 3, padding=1), nn.Flatten(), SparseLinear(8, 12))
    net.stack = nn.Parameter(torch.randn(2, 3, 8))
    mask_parameter(net, "stack")
    for name, found in masked_parameters(net).items():
        shape, axis = found.mask.shape, 1 if "weight" in name else 2
        generator = torch.Generator().manual_seed(seed)
        found.mask.copy_(draw_mask(shape, shape.numel() // 2, n_m=(2, 4), axis=axis, generator=generator))
    return net


def grouped_loss(net: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    y = nn.Sequential(*list(net.children())[:4])(x)
    return (y - x.repeat(1, 2)[:, :12].sin()).pow(2).mean() + ((net.stack @ x.T).tanh() - 0.3).pow(2).mean()


@pytest.mark.parametrize("method", ["rigl", "set", "static"])
def test_groups_of_four_keep_their_two_while_they_move_and_a_resumed_run_ends_in_the_same_bits(method: str):
    config = MaskConfig(method=method, every=2, drop=0.6, n_m=(2, 4))

    def run(net: nn.Module, made: MaskOptimizer, first: int, last: int) -> None:
        for step in range(first, last):
            made.zero_grad()
            grouped_loss(net, step).backward()
            made.step()
            for name, found in made.masked.items():
                columns = found.mask.transpose(0, 1 if "weight" in name else 2)
                for i in (0, 4):
                    assert bool((columns[i : i + 4].sum(0) == 2).all())
                assert not found.parameter[~found.mask].any()

    def made_for(net: nn.Module) -> MaskOptimizer:
        return MaskOptimizer(net, OPTIMIZERS["adamw"](net.parameters()), config, total_steps=24)

    whole = grouped()
    before = {n: found.mask.clone() for n, found in masked_parameters(whole).items()}
    unbroken = made_for(whole)
    run(whole, unbroken, 0, 24)
    assert all(torch.equal(before[n], f.mask) == (method == "static") for n, f in unbroken.masked.items())
    broken = grouped()
    half = made_for(broken)
    run(broken, half, 0, 11)
    again = grouped(seed=3)
    again.load_state_dict(broken.state_dict())
    resumed = made_for(again)
    resumed.load_state_dict(half.state_dict())
    run(again, resumed, 11, 24)
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in whole.state_dict().items())


def test_a_group_grows_as_many_as_it_dropped():
    weight = torch.tensor([[1.0, 5.0, 0.0, 0.0, 0.1, 0.2, 0.0, 0.0]])
    mask = weight != 0
    score = torch.tensor([[0.0, 0.0, 9.0, 8.0, 1.0, 2.0, 3.0, 4.0]])
    new, grown = moved_mask(weight, mask, score, 0.5, n_m=(2, 4))
    assert grown.nonzero()[:, 1].tolist() == [6, 7]  # both smallest lie in the second group
    assert new.nonzero()[:, 1].tolist() == [0, 1, 6, 7]
    across = (t.view(2, 4).T[..., None] for t in (weight, mask, score))  # groups down the first axis
    new, _ = moved_mask(*across, 0.5, n_m=(2, 4), axis=0)
    assert new[..., 0].T.flatten().nonzero()[:, 0].tolist() == [0, 1, 6, 7]
    _, anywhere = moved_mask(weight, mask, score, 0.5)
    assert anywhere.nonzero()[:, 1].tolist() == [2, 3]


def test_a_weight_just_dropped_may_grow_again_from_zero():
    net = SparseLinear(4, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.01, 1.0, 0.0, 0.0]]))
    net.set_mask(net.weight != 0)
    made = MaskOptimizer(
        net, torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9), MaskConfig(every=1, drop=0.9), total_steps=9
    )
    for _ in range(2):
        made.zero_grad()
        net(torch.tensor([[5.0, 1.0, 0.1, 0.1]])).sum().backward()
        made.step()
    assert net.mask.tolist() == [[True, True, False, False]]
    assert net.weight[0, 0] == 0 and made.optimizer.state[net.weight]["momentum_buffer"][0, 0] == 0


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    net = network(seed=rank)  # rank 1 begins with masks of its own, and takes those of rank 0
    if rank:
        net.load_state_dict({k: v if "mask" in k else network(0).state_dict()[k] for k, v in net.state_dict().items()})
    wrapped = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    made = MaskOptimizer(net, OPTIMIZERS["sgd"](net.parameters()), MaskConfig(every=3), total_steps=20)
    for step in range(20):
        made.zero_grad()
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))[rank * 16 : rank * 16 + 16]
        (wrapped(x) - x[:, :2].sin()).pow(2).mean().backward()
        made.step()
    torch.save(dict(net.state_dict()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="gloo over a file needs POSIX")
def test_two_processes_are_one_with_a_batch_twice_as_large(tmp_path: Path):
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    net = network()
    train(net, MaskOptimizer(net, OPTIMIZERS["sgd"](net.parameters()), MaskConfig(every=3), total_steps=20), 0, 20)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for key, value in net.state_dict().items():
        assert torch.equal(parts[0][key], parts[1][key]), key
        # Means of two halves and of the whole differ by rounding, 1e-7 a step.
        torch.testing.assert_close(parts[0][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "snip"}, "method must be one of"),
        ({"drop": 1.0}, r"drop must be in \[0, 1\)"),
        ({"end": 0.0}, r"end in \(0, 1\]"),
        ({"every": 0}, "every must be at least 1"),
        ({"n_m": (5, 4)}, "0 < N <= M"),
    ],
)
def test_settings_of_moving_masks_are_checked(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**options)


def test_what_cannot_be_trained_sparsely_is_named():
    net = network()
    sgd = OPTIMIZERS["sgd"](net.parameters())
    with pytest.raises(ValueError, match="every=100 must be below total_steps=100"):
        MaskOptimizer(net, sgd, MaskConfig(), total_steps=100)
    with pytest.raises(ValueError, match=r"the mask of 0\.weight does not have 2 active of every 4"):
        MaskOptimizer(net, sgd, MaskConfig(n_m=(2, 4), every=1), total_steps=100)
    with pytest.raises(ValueError, match=r"n_m=\(2, 5\): 5 does not divide the 8 inputs of 0\.weight"):
        MaskOptimizer(net, sgd, MaskConfig(n_m=(2, 5), every=1), total_steps=100)
    plain = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="Linear has no masked weight"):
        MaskOptimizer(plain, torch.optim.SGD(plain.parameters()), MaskConfig(), total_steps=1000)
    factored = MaskOptimizer(net, torch.optim.Adafactor(net.parameters()), MaskConfig(every=5), total_steps=100)
    with pytest.raises(ValueError, match=r"Adafactor keeps row_var of another shape than its parameter 0\.weight"):
        train(net, factored, 0, 1)

    class Restless(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                net[0].weight.add_(0.1)

    restless = MaskOptimizer(net, Restless(net.parameters(), lr=0.1), MaskConfig(every=5), total_steps=100)
    with pytest.raises(ValueError, match=r"Restless moved weights of 0\.weight that had neither gradient nor state"):
        train(net, restless, 0, 1)
    made = MaskOptimizer(net, sgd, MaskConfig(every=5), total_steps=100)
    state = made.state_dict()
    state["masks"]["3.weight"] = state["masks"].pop("2.weight")
    with pytest.raises(ValueError, match=r"another model: 2\.weight is in one of the two only"):
        made.load_state_dict(state)
