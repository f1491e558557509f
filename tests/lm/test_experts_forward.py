"""Every experts class of the installed transformers is found by reading its modeling files, so that a new release is
covered without an edit here."""

import ast
import importlib
import inspect
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from mixtura.lm.experts_forward import NAME, expert_stack

N_EXPERTS, WIDTH, HIDDEN = 5, 16, 8


def decorated_classes() -> list[str]:
    """`family.Class` of every class under `use_experts_implementation`."""
    found = []
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text()
        if "use_experts_implementation" not in source:
            continue
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef):
                decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
                if any(isinstance(d, ast.Name) and d.id == "use_experts_implementation" for d in decorators):
                    found.append(f"{path.parent.name}.{path.stem}.{node.name}")
    return found


CLASSES = decorated_classes()


class TinyConfig:
    """Answers any size or constant that an experts class asks its config for, by the name it asks under."""

    def __init__(self, implementation: str) -> None:
        self._experts_implementation = implementation

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if "experts" in name:
            return N_EXPERTS
        if "latent" in name:
            return None
        if "intermediate" in name:
            return HIDDEN
        if "hidden_size" in name:
            return WIDTH
        if "act" in name:
            return "silu"
        for part, value in (("eps", 1e-6), ("alpha", 1.702), ("limit", 0.7), ("softcap", 0.7)):
            if part in name:
                return value
        raise AttributeError(f"TinyConfig does not know {name!r}: say here what an experts class means by it")


@cache
def experts_class(name: str) -> type[nn.Module]:
    family, module, cls = name.split(".")
    return getattr(importlib.import_module(f"transformers.models.{family}.{module}"), cls)


def build(name: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    cls, config = experts_class(name), TinyConfig("eager")
    wanted = list(inspect.signature(cls.__init__).parameters)[2:]
    # The wrapped __init__ shows (config, *args, **kwargs) or the class's own extra sizes.
    extra = {p: getattr(config, p) for p in wanted if p not in ("args", "kwargs")}
    experts = cls(config, **extra)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (p.shape[-1] ** -0.5 if p.dim() == 3 else 0.5))
    return experts.to(dtype)


def run(experts: nn.Module, implementation: str, x: Tensor, indices: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Output and every gradient by name."""
    experts.config._experts_implementation = implementation
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    experts.zero_grad()
    y = experts(x, indices, weights)
    scale = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    (y * scale).sum().backward()
    grads = {
        f"{n}.grad": torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in experts.named_parameters()
    }
    return {"y": y.detach(), "x.grad": x.grad, "weights.grad": weights.grad} | grads


def tokens(n_tokens: int, k: int, dtype: torch.dtype, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, WIDTH, generator=g).to(dtype)
    logits = torch.randn(n_tokens, N_EXPERTS, generator=g)
    weights, indices = logits.softmax(-1).topk(k)
    return x, indices, weights.to(dtype)


def test_transformers_has_families_to_serve():
    assert len(CLASSES) >= 50 and any("mixtral" in name for name in CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_float32_equals_eager_to_rounding_in_output_and_every_gradient(name):
    experts = build(name, torch.float32)
    case = tokens(23, 2, torch.float32)
    want, got = run(experts, "eager", *case), run(experts, NAME, *case)
    assert want["y"].abs().max() > 1e-3
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", CLASSES)
def test_bfloat16_is_as_near_to_float32_as_eager_is(name):
    case32 = tokens(23, 2, torch.float32)
    case16 = tuple(t.bfloat16() if t.is_floating_point() else t for t in case32)
    case32 = tuple(t.float() if t.is_floating_point() else t for t in case16)  # the same numbers
    low = build(name, torch.bfloat16)
    exact = build(name, torch.float32)
    exact.load_state_dict({n: t.float() for n, t in low.state_dict().items()})
    truth = run(exact, "eager", *case32)
    eager, ours = run(low, "eager", *case16), run(low, NAME, *case16)
    for key in truth:
        scale = truth[key].abs().max() + 1e-6
        error = {
            n: float((r[key].float() - truth[key]).abs().max() / scale) for n, r in (("eager", eager), ("ours", ours))
        }
        # A few roundings of 2^-9 each; where eager does worse than that, we may do a little worse, too.
        assert error["ours"] < max(0.02, 1.5 * error["eager"]), f"{key}: {error}"


@pytest.mark.parametrize("name", ["mixtral.modeling_mixtral.MixtralExperts", "aria.modeling_aria.AriaExperts"])
@pytest.mark.parametrize("n_tokens", [1, 0])
def test_one_token_and_none(name, n_tokens):
    experts, case = build(name, torch.float32), tokens(n_tokens, 3, torch.float32)
    want, got = run(experts, "eager", *case) if n_tokens else None, run(experts, NAME, *case)
    if want is None:
        assert got["y"].shape == (0, WIDTH) and all(float(g.abs().sum()) == 0 for k, g in got.items() if k != "y")
        return
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["mixtral.modeling_mixtral.MixtralExperts", "gpt_oss.modeling_gpt_oss.GptOssExperts"])
def test_an_index_equal_to_the_number_of_experts_is_skipped_before_any_product(name):
    experts, (x, indices, weights) = build(name, torch.float32), tokens(12, 2, torch.float32)
    there = indices.clone()
    there[:4, 0] = N_EXPERTS
    there[4] = N_EXPERTS
    elsewhere = there == N_EXPERTS
    want = run(experts, "eager", x, indices, weights.masked_fill(elsewhere, 0.0))
    experts._is_expert_parallel = True
    # A pair that lives elsewhere may carry any weight, and a token that lives elsewhere anything at all.
    x = x.index_fill(0, torch.tensor([4]), float("nan"))
    got = run(experts, NAME, x, there, weights.masked_fill(elsewhere, 7.0))
    assert got["y"][4].abs().max() == 0 and got["x.grad"][4].abs().max() == 0
    assert got["weights.grad"][elsewhere].abs().max() == 0
    for key in want:
        if key == "weights.grad":
            got[key], want[key] = got[key][~elsewhere], want[key][~elsewhere]
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_parameters_inside_the_activation_get_their_gradients():
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.3))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.slope * x)

    experts = build("mixtral.modeling_mixtral.MixtralExperts", torch.float32)
    experts.act_fn = Slope()
    case = tokens(9, 2, torch.float32)
    want, got = run(experts, "eager", *case), run(experts, NAME, *case)
    assert want["act_fn.slope.grad"] != 0
    torch.testing.assert_close(got["act_fn.slope.grad"], want["act_fn.slope.grad"], rtol=1e-4, atol=1e-5)


def test_autocast_agrees_with_eager():
    experts, case = build("mixtral.modeling_mixtral.MixtralExperts", torch.float32), tokens(23, 2, torch.float32)
    truth = run(experts, "eager", *case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(experts, NAME, *case)
    for key in truth:
        assert ours[key].dtype == torch.float32
        assert (ours[key] - truth[key]).abs().max() < 0.03 * truth[key].abs().max(), key


def test_the_config_word_works_in_a_whole_model_and_in_generate():
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        want, tail = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
        model.set_experts_implementation(NAME)
        got, ours = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(tail, ours)


def test_a_module_outside_the_interface_is_refused_by_name():
    with pytest.raises(TypeError, match="got Linear, which does not carry use_experts_implementation"):
        expert_stack(nn.Linear(2, 2))
