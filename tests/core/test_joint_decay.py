"""Decay of a product by its factors: against autograd of the explicit product, finite differences, and an optimizer by hand."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixtura.core.isoflop import IsoFlop, convert
from mixtura.core.joint_decay import factor_pairs, product_gradients
from mixtura.core.sparse_layers import Between, DopedSparse, FactorizedSparse
from mixtura.core.sparse_training import MaskConfig, MaskOptimizer

NOTHING = Between(norm="none", activation="none")
WD, LR = 0.2, 0.05


def network(member: str, convolution: bool = False, between: Between = NOTHING) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)]
    x = torch.zeros(1, 12)
    if convolution:
        layers = [nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1), nn.Flatten(), nn.Linear(45, 3)]
        x = torch.zeros(1, 2, 3, 3)
    made = convert(
        nn.Sequential(*layers),
        IsoFlop(member, 0.5, between=between),
        example_input=x,
        generator=torch.Generator().manual_seed(0),
        fresh=True,
    )
    return made.double()


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    shape = (8, 2, 3, 3) if isinstance(net[0], nn.Conv2d) else (8, 12)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(step)).double()
    return F.mse_loss(net(x), x.flatten(1)[:, :3].sin())


def product(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The matrix of V U, one column for each place of the kernel and input."""
    return torch.einsum("or,ri->oi", v.reshape(len(v), -1), u.reshape(len(u), -1))


@pytest.mark.parametrize(
    ("rank", "inputs", "outputs"), [(2, 9, 7), (30, 6, 5)]
)  # small matrices, and the product itself
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_gradients_are_those_of_the_explicit_product(rank: int, inputs: int, outputs: int, kernel: tuple[int, ...]):
    torch.manual_seed(1)
    u = torch.randn(rank, inputs, *kernel, dtype=torch.float64, requires_grad=True)
    v = torch.randn(outputs, rank, *(1 for _ in kernel), dtype=torch.float64, requires_grad=True)
    (product(u, v).pow(2).sum() / 2).backward()
    found = product_gradients(u, v)
    for tensor, gradient in zip((u, v), found, strict=True):
        torch.testing.assert_close(gradient, tensor.grad)
    # And by finite differences of the norm, one entry of each.
    for tensor, gradient in zip((u, v), found, strict=True):
        with torch.no_grad():
            norms = []
            for sign in (1, -1):
                tensor.view(-1)[3] += sign * 1e-5
                norms.append(float(product(u, v).pow(2).sum() / 2))
                tensor.view(-1)[3] -= sign * 1e-5
        assert (norms[0] - norms[1]) / 2e-5 == pytest.approx(float(gradient.view(-1)[3]), rel=1e-6)


def test_the_cheaper_of_both_ways_gives_the_other_one_and_keeps_the_type():
    u, v = torch.randn(4, 64).bfloat16(), torch.randn(64, 4).bfloat16()
    of_u, of_v = product_gradients(u, v)
    assert of_u.dtype == of_v.dtype == torch.bfloat16
    torch.testing.assert_close(of_u, (v.float().T @ (v.float() @ u.float())).bfloat16())


OPTIMIZERS = {
    "sgd": lambda p, wd: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True, weight_decay=wd),
    "adam": lambda p, wd: torch.optim.Adam(p, lr=LR, weight_decay=wd),
    "adamw": lambda p, wd: torch.optim.AdamW(p, lr=LR, weight_decay=wd),
    "rmsprop": lambda p, wd: torch.optim.RMSprop(p, lr=LR, weight_decay=wd),
    "maximize": lambda p, wd: torch.optim.SGD(p, lr=LR, weight_decay=wd, maximize=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("member", "convolution"), [("doped", False), ("factorized", True)])
def test_a_step_decays_the_product_of_what_is_active_and_nothing_else_of_the_factors(
    name: str, member: str, convolution: bool
):
    """Against the penalty in the loss, with the factors in a group without decay; or past the gradient where AdamW does it."""
    net = network(member, convolution)
    made = MaskOptimizer(
        net,
        OPTIMIZERS[name](net.parameters(), WD),
        MaskConfig(method="static", joint_decay=True),
        total_steps=20,
    )
    twin = copy.deepcopy(net)
    factors = [layer.weight for pair in factor_pairs(twin).values() for layer in pair]
    rest = [p for p in twin.parameters() if not any(p is f for f in factors)]
    by_hand = OPTIMIZERS[name]([{"params": rest}, {"params": factors, "weight_decay": 0.0}], WD)
    for step in range(4):
        made.zero_grad()
        loss_of(net, step).backward()
        made.step()

        by_hand.zero_grad()
        norms = torch.zeros(())
        for u, v in factor_pairs(twin).values():
            norms = norms + product(*(w.weight * getattr(w, "mask", 1) for w in (u, v))).pow(2).sum() / 2
        decay = torch.autograd.grad(WD * norms, factors)
        loss_of(twin, step).backward()
        if name != "adamw":
            for p, gradient in zip(factors, decay, strict=True):
                p.grad += -gradient if name == "maximize" else gradient
        masks = {id(m.weight): m.mask for m in twin.modules() if hasattr(type(m), "set_mask")}
        for p in (*rest, *factors):
            p.grad *= masks.get(id(p), 1)
        by_hand.step()
        with torch.no_grad():
            for p, gradient in zip(factors, decay, strict=True):
                p -= LR * gradient * masks.get(id(p), 1) if name == "adamw" else 0
    for (n, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=n)
    for found in made.masked.values():
        assert not found.parameter[~found.mask].any()


def test_masks_move_as_ever_and_what_is_inactive_stays_at_zero():
    net = network("factorized")
    made = MaskOptimizer(
        net, OPTIMIZERS["adamw"](net.parameters(), WD), MaskConfig(every=3, joint_decay=True), total_steps=40
    )
    before = {n: found.mask.clone() for n, found in made.masked.items()}
    for step in range(30):
        made.zero_grad()
        loss_of(net, step).backward()
        made.step()
    for n, found in made.masked.items():
        assert not torch.equal(found.mask, before[n]) and found.active == int(before[n].sum())
        assert not found.parameter[~found.mask].any()
        for value in made.optimizer.state[found.parameter].values():
            assert value.numel() == 1 or not value[~found.mask].any()


def test_strong_decay_takes_the_product_to_nothing_where_no_data_hold_it():
    net = network("doped")
    doped = net[0]
    assert isinstance(doped, DopedSparse)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5)
    made = MaskOptimizer(net, optimizer, MaskConfig(method="static", joint_decay=True), total_steps=300)
    sizes = []
    for _ in range(300):
        made.zero_grad()
        (0.0 * net(torch.ones(1, 12).double()).sum()).backward()
        made.step()
        sizes.append(float(product(doped.u.weight, doped.v.weight).detach().norm()))
    assert sizes[-1] < 0.05 * sizes[0] and all(b <= a for a, b in itertools.pairwise(sizes))


def test_where_joint_decay_cannot_act_it_says_why():
    def made(net: nn.Module, optimizer: Any) -> MaskOptimizer:
        return MaskOptimizer(net, optimizer, MaskConfig(method="static", joint_decay=True), total_steps=9)

    net = network("factorized", between=Between())
    with pytest.raises(ValueError, match=r"0 has norm='batch' and activation='relu' between them"):
        made(net, torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1))
    net = network("parallel", between=Between())
    with pytest.raises(ValueError, match="Sequential has no doped or factorized layer"):
        made(net, torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1))
    net = network("doped")
    with pytest.raises(ValueError, match="the factors' weight_decay is 0"):
        made(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="needs both factors of 0 in the optimizer"):
        made(net, torch.optim.SGD([net[0].sparse.weight, net[0].u.weight], lr=0.1, weight_decay=0.1))
    groups = [{"params": [net[0].u.weight]}, {"params": [net[0].v.weight, net[0].sparse.weight], "weight_decay": 0.3}]
    with pytest.raises(ValueError, match=r"the factors of 0 have weight_decay 0.1 and 0.3"):
        made(net, torch.optim.SGD(groups, lr=0.1, weight_decay=0.1))
    with pytest.raises(ValueError, match="not how Adafactor does"):
        made(net, torch.optim.Adafactor(net.parameters(), weight_decay=0.1))


def test_pairs_are_found_by_the_path_of_their_layer():
    net = network("factorized", convolution=True)
    assert isinstance(net[1], FactorizedSparse)
    assert list(factor_pairs(net)) == ["1"] and factor_pairs(net)["1"] == (net[1].u, net[1].v)
