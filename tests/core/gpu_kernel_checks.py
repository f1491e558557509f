"""What test_gpu_dispatch.py runs in a process of its own: on a GPU, or where Triton's interpreter stands in for one."""

import pytest
import torch
from expert_passes import by_backend, everything
from torch import Tensor

from mixtura.core import gpu_dispatch
from mixtura.core.dispatch import ExpertStack, dispatch, gated
from mixtura.core.gates import limit_capacity, top_k

DEVICE = "cpu" if gpu_dispatch.INTERPRETED else "cuda"

# Sums of up to 80 products in float32 (2^-24) in another order. The 16-bit ones round up to three times along the way, and
# the interpreter cuts bfloat16 off where a GPU rounds: 2^-7 and 2^-10 a time, doubled for what comes together.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}


def random_case(n_tokens, width, hidden, n_experts, k, *, has_gate=True, bias=True, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = 2 * hidden if has_gate else hidden

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(DEVICE, dtype).requires_grad_()

    return {
        "x": draw(n_tokens, width),
        "up": draw(n_experts, rows, width, scale=width**-0.5),
        "down": draw(n_experts, width, hidden, scale=hidden**-0.5),
        "weights": draw(n_tokens, k),
        "up_bias": draw(n_experts, rows) if bias else None,
        "down_bias": draw(n_experts, width) if bias else None,
        "indices": torch.randint(0, n_experts + 1, (n_tokens, k), generator=g).to(DEVICE),
    }


def in_float64(case: dict) -> dict:
    return {n: t if t is None or n == "indices" else t.detach().double().requires_grad_() for n, t in case.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].shape == want[name].shape
        if want[name].numel():
            error = float((got[name].double() - want[name]).abs().max() / (want[name].abs().max() + 1e-12))
            assert error < tolerance, f"{name}: {error}"  # NaN is not below either


def assert_like_the_loop(case: dict) -> dict[str, Tensor]:
    got = everything(case, lambda c: by_backend(c, "triton"))
    want = everything(in_float64(case), lambda c: by_backend(c, "loop"))
    assert_same(got, want, TOLERANCE[case["x"].dtype])
    return got


# Sides that no tile divides, one and several tiles of rows, columns and depth, experts without rows, sentinels.
@pytest.mark.parametrize("shape", [(0, 3, 2, 4, 2), (1, 3, 2, 9, 3), (7, 33, 5, 4, 2), (24, 70, 40, 3, 2)])
def test_outputs_and_every_gradient_are_the_loops(shape):
    assert_like_the_loop(random_case(*shape))


def test_experts_without_gate_and_bias_are_the_loops():
    assert_like_the_loop(random_case(9, 20, 17, 5, 2, has_gate=False, bias=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_agree_up_to_their_rounding(dtype):
    got = assert_like_the_loop(random_case(24, 72, 36, 3, 2, dtype=dtype))
    assert all(t.dtype == dtype for t in got.values())


def test_one_expert_takes_every_token_and_the_others_get_a_gradient_of_exactly_zero():
    case = random_case(70, 20, 9, 6, 1) | {"indices": torch.full((70, 1), 2, device=DEVICE)}
    got = assert_like_the_loop(case)
    for name in ("up", "down", "up_bias", "down_bias"):
        grad = got[f"{name}.grad"]
        assert grad[[0, 1, 3, 4, 5]].abs().max() == 0 and grad[2].abs().max() > 0


@pytest.mark.parametrize("transposed", [False, True])
def test_a_last_step_with_parameters_gets_its_gradients_in_either_layout(transposed):
    case = random_case(6, 19, 18, 3, 2, bias=False)
    case["scale"] = torch.linspace(-1, 2, 19, device=DEVICE).requires_grad_()

    def forward(case: dict, backend: str) -> Tensor:
        stack = ExpertStack(
            up=case["up"].mT.contiguous() if transposed else case["up"],
            down=case["down"].mT.contiguous() if transposed else case["down"],
            inner=gated(torch.tanh),
            finish=lambda y: y * case["scale"] / (y.square().mean(-1, keepdim=True) + 1).sqrt(),
            transposed=transposed,
            parameters=(case["scale"],),
        )
        return dispatch(case["x"], stack, case["indices"], case["weights"], backend=backend)

    want = everything(in_float64(case), lambda c: forward(c, "loop"))
    assert_same(everything(case, lambda c: forward(c, "triton")), want, TOLERANCE[torch.float32])


def test_any_strides_will_do():
    case = random_case(6, 20, 18, 3, 2)
    plain = by_backend(case, "triton")
    strided = {n: t if t is None else t.detach().repeat_interleave(2, -1)[..., ::2] for n, t in case.items()}
    assert not strided["x"].is_contiguous()
    assert torch.equal(by_backend(strided, "triton"), plain)
    # One expert's weights for all of them, without a copy; y.sum() sends back a gradient without memory of its own.
    shared = case | {n: case[n].detach()[:1].expand(case[n].shape).requires_grad_() for n in ("up", "down")}
    grads = [torch.autograd.grad(by_backend(shared, b).sum(), [shared["up"], shared["x"]]) for b in ("triton", "loop")]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_sentinel_adds_nothing_even_where_weights_are_not_finite():
    case = random_case(5, 20, 17, 3, 2)
    case["indices"][0] = 3
    with torch.no_grad():
        case["weights"][0] = float("inf")
        case["x"][0] = float("nan")
    got = everything(case, lambda c: by_backend(c, "triton"))
    assert got["y"][0].abs().max() == 0
    assert got["x.grad"][0].abs().max() == 0 and got["weights.grad"][0].abs().max() == 0
    assert all(t.isfinite().all() for t in got.values())


def test_a_last_step_that_has_no_value_at_zero_does_not_reach_the_tokens_of_a_sentinel():
    case = random_case(6, 19, 18, 3, 2, bias=False)
    case["indices"][1, 0] = 3

    def forward(case: dict, backend: str) -> Tensor:
        stack = ExpertStack(
            up=case["up"], down=case["down"], inner=gated(torch.tanh), finish=lambda y: y / y.norm(dim=-1, keepdim=True)
        )
        return dispatch(case["x"], stack, case["indices"], case["weights"], backend=backend)

    want = everything(in_float64(case), lambda c: forward(c, "loop"))
    assert_same(everything(case, lambda c: forward(c, "triton")), want, TOLERANCE[torch.float32])


def test_tokens_over_capacity_are_left_out_and_those_that_stay_are_counted():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 4, generator=g) + torch.tensor([2.0, 0, 0, -9.0])
    routing = limit_capacity(top_k(logits.to(DEVICE), 2), 10)
    assert routing.dropped > 0
    kept = torch.bincount(routing.indices.flatten(), minlength=5)
    assert kept[:4].max() == 10 and kept[3] == 0
    order, places, offsets = gpu_dispatch.sort_pairs(routing.indices, 4)
    assert torch.equal(offsets.diff(), kept)
    assert torch.equal(order[places.flatten()], torch.arange(60, device=DEVICE))  # each pair is in its place
    assert routing.indices.flatten()[order].diff().min() == 0
    case = random_case(30, 20, 17, 4, 2)
    case |= {"indices": routing.indices, "weights": routing.weights.detach().requires_grad_()}
    assert_like_the_loop(case)


def test_autocast_computes_in_its_dtype_and_returns_the_dtype_of_x_and_of_each_weight():
    case = random_case(8, 40, 20, 3, 2)
    exact = everything(in_float64(case), lambda c: by_backend(c, "loop"))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = everything(case, lambda c: by_backend(c, "triton"))
    assert all(t.dtype == torch.float32 for t in got.values())
    assert_same(got, exact, TOLERANCE[torch.bfloat16])
    assert (got["y"] - exact["y"]).abs().max() > 1e-4


def test_forward_and_backward_are_one_graph_that_never_asks_for_a_value():
    # A count that travels to the host breaks the graph, and fullgraph does not allow that.
    case = random_case(5, 20, 17, 3, 2)
    forward = torch.compile(lambda c: by_backend(c, "triton"), backend="aot_eager", fullgraph=True)
    want = everything(case, lambda c: by_backend(c, "triton"))
    assert_same(everything(case, forward), want, 1e-6)


@pytest.mark.parametrize("name", ["x", "up", "weights"])
def test_a_second_derivative_is_refused(name):
    case = random_case(3, 20, 17, 2, 1, bias=False)
    (grad,) = torch.autograd.grad(by_backend(case, "triton").square().sum(), case[name], create_graph=True)
    with pytest.raises(RuntimeError, match="'triton' has no second derivative; backend='loop' has"):
        grad.sum().backward()


@pytest.mark.skipif(DEVICE == "cuda", reason="the assertion would end every later test on the device")
@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_out_of_range_is_stopped_before_any_kernel_reads_by_it(index):
    case = random_case(5, 20, 17, 3, 2)
    case["indices"][2, 1] = index
    with pytest.raises(RuntimeError, match=r"indices must be in \[0, 3\], where 3 skips the pair"):
        by_backend(case, "triton")
