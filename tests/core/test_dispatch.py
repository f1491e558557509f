import itertools

import pytest
import torch
import torch.nn.functional as F
from expert_passes import by_backend, everything
from torch import Tensor

from mixtura.core.dispatch import ExpertStack, dispatch, experts_forward, gated, why_not

ON_CPU = ["grouped", "loop"]  # test_gpu_dispatch.py has the third
TIGHT = {"rtol": 1e-10, "atol": 1e-12}  # float64: a few hundred additions in another order


def random_case(n_tokens, width, hidden, n_experts, k, *, has_gate=True, bias=False, sentinels=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = 2 * hidden if has_gate else hidden

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    high = n_experts + 1 if sentinels else n_experts
    return {
        "x": draw(n_tokens, width),
        "up": draw(n_experts, rows, width),
        "down": draw(n_experts, width, hidden),
        "weights": draw(n_tokens, k),
        "up_bias": draw(n_experts, rows) if bias else None,
        "down_bias": draw(n_experts, width) if bias else None,
        "indices": torch.randint(0, high, (n_tokens, k), generator=g),
    }


def by_hand(case: dict) -> Tensor:
    """Double comprehension over tokens and chosen experts; vectors only."""

    def expert(e: int, x: Tensor) -> Tensor:
        u = case["up"][e] @ x + (0 if case["up_bias"] is None else case["up_bias"][e])
        h = case["down"].shape[2]
        inner = F.silu(u[:h]) * u[h:] if len(u) == 2 * h else F.silu(u)
        return case["down"][e] @ inner + (0 if case["down_bias"] is None else case["down_bias"][e])

    n_experts, zero = len(case["up"]), torch.zeros_like(case["x"][0]) if len(case["x"]) else None
    tokens = [
        sum((w * expert(e, x) for e, w in zip(es, ws, strict=True) if e < n_experts), zero)
        for x, es, ws in zip(case["x"], case["indices"].tolist(), case["weights"], strict=True)
    ]
    return torch.stack(tokens) if tokens else case["x"] * 1.0


SHAPES = [(7, 5, 3, 4, 2), (1, 3, 2, 5, 5), (0, 3, 2, 4, 2), (13, 8, 1, 3, 1), (40, 6, 8, 2, 2), (9, 1, 7, 16, 3)]


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(("has_gate", "bias", "sentinels"), list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_match_a_comprehension_over_tokens_in_output_and_every_gradient(
    backend, shape, has_gate, bias, sentinels
):
    case = random_case(*shape, has_gate=has_gate, bias=bias, sentinels=sentinels)
    want = everything(case, by_hand)
    got = everything(case, lambda c: by_backend(c, backend))
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **TIGHT, msg=lambda m, name=name: f"{name}: {m}")


def test_the_grouped_gradients_agree_with_finite_differences():
    case = random_case(4, 3, 2, 3, 2, bias=True, sentinels=True, seed=3)
    names = ["x", "up", "down", "up_bias", "down_bias", "weights"]
    assert torch.autograd.gradcheck(
        lambda *leaves: by_backend(case | dict(zip(names, leaves, strict=True)), "grouped"),
        [case[name] for name in names],
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_a_last_step_with_parameters_gets_its_gradients_in_either_layout(transposed):
    case = random_case(6, 4, 3, 3, 2, sentinels=True)
    scale, slope = torch.tensor([0.5, 2.0, -1.0, 3.0]).double(), torch.tensor(0.3).double()
    case["scale"], case["slope"] = scale.requires_grad_(), slope.requires_grad_()

    def forward(case: dict, backend: str) -> Tensor:
        stack = ExpertStack(
            up=case["up"].transpose(1, 2).contiguous() if transposed else case["up"],
            down=case["down"].transpose(1, 2).contiguous() if transposed else case["down"],
            inner=gated(lambda x: x.tanh() * case["slope"]),
            finish=lambda y: y * case["scale"] / (y.square().mean(-1, keepdim=True) + 1).sqrt(),
            transposed=transposed,
            parameters=(case["scale"], case["slope"]),
        )
        return dispatch(case["x"], stack, case["indices"], case["weights"], backend=backend)

    want = everything(case, lambda c: forward(c, "loop"))
    got = everything(case, lambda c: forward(c, "grouped"))
    assert want["slope.grad"] != 0
    for name in want:
        torch.testing.assert_close(got[name], want[name], **TIGHT, msg=lambda m, name=name: f"{name}: {m}")


# Rows of one expert decide which product runs: 1, 2, a few, many.
@pytest.mark.parametrize("n_tokens", [1, 2, 5, 40, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_every_product_agrees_with_float64_up_to_the_rounding_of_its_dtype(n_tokens, dtype, tolerance):
    case = random_case(n_tokens, 64, 32, 2, 1, bias=True, seed=n_tokens)
    case["up"], case["down"] = (case[n].detach().div(8).requires_grad_() for n in ("up", "down"))
    want = everything(case, lambda c: by_backend(c, "loop"))
    low = {n: t if t is None or n == "indices" else t.detach().to(dtype).requires_grad_() for n, t in case.items()}
    got = everything(low, lambda c: by_backend(c, "grouped"))
    for name in want:
        scale = want[name].abs().max() + 1e-12
        error = float((got[name].double() - want[name]).abs().max() / scale)
        assert error < tolerance, f"{name}: {error}"


def test_the_order_of_tokens_and_of_choices_does_not_matter():
    case = random_case(9, 5, 3, 4, 3)
    tokens, places = torch.randperm(9), torch.randperm(3)
    shuffled = case | {
        "x": case["x"][tokens],
        "indices": case["indices"][tokens][:, places],
        "weights": case["weights"][tokens][:, places],
    }
    torch.testing.assert_close(by_backend(shuffled, "grouped"), by_backend(case, "grouped")[tokens], **TIGHT)


def test_the_names_of_experts_do_not_matter():
    case = random_case(9, 5, 3, 4, 2)
    new_name = torch.randperm(4)
    old_name = new_name.argsort()
    renamed = case | {"up": case["up"][old_name], "down": case["down"][old_name], "indices": new_name[case["indices"]]}
    torch.testing.assert_close(by_backend(renamed, "grouped"), by_backend(case, "grouped"), **TIGHT)


@pytest.mark.parametrize("backend", ON_CPU)
def test_one_expert_with_weight_one_is_a_feed_forward_layer(backend):
    case = random_case(6, 4, 3, 1, 1) | {"weights": torch.ones(6, 1).double()}
    gate, up = (case["x"] @ case["up"][0].T).chunk(2, -1)
    torch.testing.assert_close(by_backend(case, backend), (F.silu(gate) * up) @ case["down"][0].T, **TIGHT)


@pytest.mark.parametrize("backend", ON_CPU)
def test_a_sentinel_adds_nothing_even_where_weights_are_not_finite(backend):
    case = random_case(5, 4, 3, 3, 2)
    case["indices"][0] = 3
    with torch.no_grad():
        case["weights"][0] = float("inf")
        case["x"][0] = float("nan")
    y = by_backend(case, backend)
    assert y[0].abs().max() == 0 and y[1:].isfinite().all()
    grads = torch.autograd.grad(y.sum(), [case["x"], case["weights"], case["up"]])
    assert grads[0][0].abs().max() == 0 and grads[1][0].abs().max() == 0 and grads[2].isfinite().all()


def test_experts_that_no_token_visits_get_a_gradient_of_exactly_zero():
    case = random_case(5, 4, 3, 6, 1) | {"indices": torch.full((5, 1), 2)}
    grad_up, grad_down = torch.autograd.grad(by_backend(case, "grouped").sum(), [case["up"], case["down"]])
    unvisited = [0, 1, 3, 4, 5]
    assert grad_up[unvisited].abs().max() == 0 and grad_down[unvisited].abs().max() == 0
    assert grad_up[2].abs().max() > 0


def test_autocast_computes_in_its_dtype_and_returns_the_dtype_of_x():
    case = {n: t if t is None or n == "indices" else t.float() for n, t in random_case(8, 16, 8, 3, 2).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = by_backend(case, "grouped"), by_backend(case, "loop")
    assert got.dtype == torch.float32
    exact = by_backend(case, "loop")
    # Both round to 8 bits three times along the way; neither may be further from the truth than that.
    for y in (got, want):
        assert (y - exact).abs().max() < 0.03 * exact.abs().max()
    assert not torch.equal(got, exact)


def test_inference_keeps_nothing_and_gives_the_same_bits():
    case = random_case(8, 16, 8, 3, 2)
    with torch.inference_mode():
        y = by_backend(case, "grouped")
    assert not y.requires_grad and torch.equal(y, by_backend(case, "grouped").detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.full((5, 2), 4)}, r"indices must be in \[0, 3\], where 3 skips the pair, got 4 to 4"),
        ({"indices": torch.full((5, 2), -1)}, r"got -1 to -1"),
        ({"indices": torch.zeros(4, 2, dtype=torch.long)}, r"must both have shape \(T=5, K\), got \(4, 2\)"),
        ({"x": torch.zeros(5, 3).double()}, r"x must have shape \(T, D=4\), got \(5, 3\)"),
        ({"down": torch.zeros(2, 4, 3).double()}, r"must agree in experts and width"),
        ({"down": torch.zeros(3, 4, 5).double()}, r"gate_up must be \(E, 2H, D\) or \(E, H, D\)"),
        ({"up_bias": torch.zeros(6).double()}, r"up_bias must have shape \(E=3, rows\), got \(6,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        by_backend(random_case(5, 4, 3, 3, 2) | change, "grouped")


def test_unknown_words_list_the_known_ones():
    case = random_case(2, 4, 3, 3, 1)
    with pytest.raises(ValueError, match=r"backend must be one of \['grouped', 'loop', 'triton'\], got 'fast'"):
        by_backend(case, "fast")
    with pytest.raises(ValueError, match=r"activation must be one of \['gelu', .*got 'swish'"):
        experts_forward(case["x"], case["up"], case["down"], case["indices"], case["weights"], activation="swish")
    assert why_not("loop", case["x"]) is None
    assert "floating point" in why_not("loop", torch.zeros(1, 1, dtype=torch.long))
