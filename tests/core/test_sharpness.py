"""Sharpness-aware gradients against closed forms on quadratics; weights come back to the bit."""

import pytest
import torch
from torch import nn

from mixtura.core.sharpness import raised
from mixtura.core.training import TrainConfig, fit


class Quadratic(nn.Module):
    """loss = (a . w^2 + b . v^2) / 2 with a matrix w and a vector v."""

    def __init__(self, w, v):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(v))
        self.unused = nn.Parameter(torch.ones(2, 2))

    def loss(self, step):
        return ((torch.tensor(A) * self.w**2).sum() + (torch.tensor(B) * self.v**2).sum()) / 2


A, B = [[1.0, 4.0]], [2.0]
RHO, ETA, LR = 0.05, 0.01, 0.1


def test_a_step_of_descent_is_that_of_the_closed_form_on_a_quadratic():
    model = Quadratic([[3.0, -0.5]], [1.0])
    config = TrainConfig(steps=1, lr=LR, warmup=0, weight_decay=0, clip=0, optimizer="sgd", betas=(0.0, 0.9), rho=RHO)
    history = fit(model, model.loss, config)
    # By hand: gradients 3, -2 and 2; T = 3.01, 0.51 and 1 (a vector); T g = 9.03, -1.02, 2.
    norm = (9.03**2 + 1.02**2 + 2.0**2) ** 0.5
    w = [3.0 + RHO * 3.01**2 * 3 / norm, -0.5 - RHO * 0.51**2 * 2 / norm]
    v = 1.0 + RHO * 2 / norm
    want = torch.tensor([[3.0 - LR * 1.0 * w[0], -0.5 - LR * 4.0 * w[1]]])
    torch.testing.assert_close(model.w.detach(), want, rtol=1e-6, atol=0)  # float32
    torch.testing.assert_close(model.v.detach(), torch.tensor([1.0 - LR * 2.0 * v]), rtol=1e-6, atol=0)
    assert history.losses == [pytest.approx((9 + 4 * 0.25 + 2) / 2)]  # at the weights, not at the raised point
    assert model.unused.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_scaling_one_layer_up_and_the_next_down_raises_the_loss_alike():
    def gain(scale):
        first, second = nn.Parameter(torch.tensor([[2.0 * scale]])), nn.Parameter(torch.tensor([[3.0 / scale]]))

        def loss():
            return (first * second - 1).square().sum()

        gradients = torch.autograd.grad(loss(), [first, second])
        with raised({"a": first, "b": second}, gradients, 0.1, eta=0.0):
            return float(loss().detach())

    assert gain(1.0) > 25 and gain(100.0) == pytest.approx(gain(1.0), rel=1e-5)


def test_weights_come_back_to_the_bit_also_after_an_error_and_no_gradient_moves_nothing():
    w = nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    before = w.detach().clone()
    with pytest.raises(KeyboardInterrupt), raised({"w": w}, [torch.ones(5, 3)], 0.3):
        assert not torch.equal(w, before)
        raise KeyboardInterrupt
    assert torch.equal(w, before)
    for gradient in (None, torch.zeros(5, 3)):
        with raised({"w": w}, [gradient], 0.3):
            assert torch.equal(w, before)


def test_both_passes_of_a_step_see_the_same_draw_and_radius_zero_is_plain_training():
    draws = []

    def run(rho):
        model = Quadratic([[3.0, -0.5]], [1.0])

        def loss_at(step):
            draws.append(torch.rand(()).item())
            return model.loss(step) * draws[-1]

        fit(model, loss_at, TrainConfig(steps=2, optimizer="sgd", rho=rho))
        return model.w.detach()

    plain, sharp = run(0.0), run(0.05)
    assert draws[0] == draws[2] == draws[3] and draws[1] == draws[4] == draws[5] and draws[0] != draws[1]
    assert not torch.equal(plain, sharp)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match="rho must be >= 0"):
        TrainConfig(steps=1, rho=-1.0)
    model = Quadratic([[3.0, -0.5]], [1.0])
    fit(model, model.loss, TrainConfig(steps=2, checkpoint_every=1), out=tmp_path)
    with pytest.raises(ValueError, match=r"holds a run with rho=None, this one has 0\.05"):
        fit(model, model.loss, TrainConfig(steps=2, checkpoint_every=1, rho=0.05), out=tmp_path)
