"""The wide sparse layer against its equation, its dense twin and finite differences."""

import pytest
import torch
from torch.nn import functional as F

from mixtura.lm.wide_sparse import WideSparseMoE, as_wide_mlp


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def small(dtype=torch.float64, **changes):
    options = {"d": 5, "hidden": 6, "experts": 4, "top_k": 2, "bias": True} | changes
    layer = WideSparseMoE(**options, generator=seeded()).to(dtype)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.endswith("_bias"):
                p.copy_(torch.randn(p.shape, generator=seeded(3)))
    return layer


@pytest.mark.parametrize("gate", ["sparsity", "linear"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_layer_is_its_equation_token_by_token(gate, activation):
    layer = small(gate=gate, activation=activation)
    x = torch.randn(3, 4, 5, generator=seeded(1), dtype=torch.float64)
    act, experts = {"relu": F.relu, "gelu": F.gelu}[activation], layer.experts
    rows = []
    for u in x.reshape(-1, 5):
        z = [experts.up_proj[e] @ u + experts.up_proj_bias[e] for e in range(4)]
        if gate == "linear":
            scores = layer.gate.weight @ u
        else:
            columns = torch.cat([experts.up_proj, experts.up_proj_bias[..., None]], -1)
            one = torch.cat([u, torch.ones(1, dtype=u.dtype)])
            mean = columns.mean(1) @ one
            var = columns.var(1, correction=0) @ one**2
            scores = -torch.erf(mean / (2 * (var + 1e-6)).sqrt())
        chosen = sorted(range(4), key=lambda e: -scores[e].item())[:2]
        w = scores[chosen].softmax(0)
        outs = [experts.down_proj[e] @ act(z[e]) + experts.down_proj_bias[e] for e in chosen]
        rows.append(w[0] * outs[0] + w[1] * outs[1])
    torch.testing.assert_close(layer(x), torch.stack(rows).view(x.shape), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", ["sparsity", "linear"])
def test_the_dense_twin_with_its_masked_units_is_the_layer(gate):
    layer = small(gate=gate)
    x = torch.randn(50, 5, generator=seeded(1), dtype=torch.float64)
    mlp, out = as_wide_mlp(layer), layer.mix(x)
    z = layer.wide(x)
    w = torch.zeros(50, 4, dtype=torch.float64).scatter(1, out.routing.indices, out.routing.weights)
    torch.testing.assert_close(z, F.relu(x @ mlp.up.T + mlp.up_bias) * w.repeat_interleave(6, 1))
    torch.testing.assert_close(z @ mlp.down.T + w @ mlp.down_bias, out.hidden)
    blocks = z.view(50, 4, 6)
    unchosen = torch.ones(50, 4, dtype=torch.bool).scatter(1, out.routing.indices, False)
    assert (blocks[unchosen] == 0).all()
    inner = [F.relu(F.linear(x, layer.experts.up_proj[e], layer.experts.up_proj_bias[e])) > 0 for e in range(4)]
    fired = torch.stack([part.sum(-1) for part in inner], -1)
    assert torch.equal((z > 0).sum(-1), fired.gather(1, out.routing.indices).sum(-1))
    assert torch.equal(layer.wide(x, sparse=True).to_dense(), z)


def test_gradients_of_output_and_balance_reach_the_experts_through_the_gate():
    layer = small(backend="loop")
    x = torch.randn(6, 5, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    assert not any(name.startswith("gate") for name in names)

    def call(x, *parameters):
        from torch.func import functional_call

        out = functional_call(Mixed(layer), dict(zip((f"layer.{n}" for n in names), parameters, strict=True)), (x,))
        return out.hidden, out.aux_loss

    assert torch.autograd.gradcheck(call, (x, *(p.detach().requires_grad_() for p in layer.parameters())))
    # The balance loss has no other way to the weights than the scores.
    layer.mix(x).aux_loss.backward()
    assert layer.experts.up_proj.grad.abs().max() > 0


class Mixed(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer.mix(x)


def test_chosen_experts_fire_less_than_the_others():
    layer = WideSparseMoE(32, 64, generator=seeded())
    with torch.no_grad():
        layer.experts.up_proj += torch.randn(8, 1, 32, generator=seeded(1)) * 0.05
    x = torch.randn(500, 32, generator=seeded(2))
    fired = (torch.einsum("td,ehd->teh", x, layer.experts.up_proj) > 0).float().mean(-1)
    assert fired.gather(1, layer.mix(x).routing.indices).mean() < 0.9 * fired.mean()


def test_the_layer_survives_saving_to_the_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    layer, x = small(torch.float32), torch.randn(4, 5)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = WideSparseMoE(5, 6, 4, 2, bias=True)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small(top_k=5), "top_k must be between 1 and experts=4, got 5"),
        (lambda: small(gate="magic"), r"gate must be one of \['linear', 'sparsity'\], got 'magic'"),
        (lambda: small(balance=-1.0), "balance must be >= 0"),
        (lambda: small(backend="magic"), "backend must be one of"),
        (lambda: small(statistics="half"), "statistics must be one of"),
        (lambda: as_wide_mlp(torch.nn.Linear(2, 2)), "Linear has no stacked up_proj and down_proj"),
        (
            lambda: small()(torch.full((2, 5), torch.nan, dtype=torch.float64)),
            r"scores of experts \[0, 1, 2, 3\] are NaN",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
