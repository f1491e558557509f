"""What cutting an attention value would cost, against derivatives and real cuts."""

import pytest
import torch
from process_group import in_processes
from torch.nn import functional as F

from mixtura.lm.attention import span_profile
from mixtura.lm.attention.span_profile import AnswerSample, answer_samples, influence_blocks, profile_spans

N, C = 24, 8


class Layer:
    """One layer of attention, 2 query heads on one key/value head, under a smooth loss; float64."""

    def __init__(self, seed: int, scale: float = C**-0.5):
        torch.manual_seed(seed)
        self.q, self.k, self.v = (torch.randn(n, N, C, dtype=torch.float64) for n in (2, 1, 1))
        self.w, self.scale = torch.randn(2, N, C, dtype=torch.float64), scale
        hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
        self.scores = (self.q @ self.k.mT * scale).masked_fill(hidden, -torch.inf)
        self.attention = self.scores.softmax(-1)

    def loss(self, attention: torch.Tensor) -> torch.Tensor:
        return (self.w * torch.tanh(attention @ self.v)).sum()

    def influence(self, n: int, block: int, pool: str = "block") -> torch.Tensor:
        out = (self.attention @ self.v).requires_grad_()
        (self.w * torch.tanh(out)).sum().backward()
        return influence_blocks(self.q, self.k, self.v, out.detach(), out.grad, n, block, scale=self.scale, pool=pool)


def test_the_influence_is_the_derivative_along_a_shrinking_value():
    layer = Layer(0)
    found = layer.influence(N, 1)
    for h, i, j in ((0, 1, 0), (0, 10, 3), (1, 23, 23), (1, 17, 0)):
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        one = torch.zeros(2, N, N, dtype=torch.float64)
        one[h, i, j] = 1
        shrunk = layer.scores.exp() * (1 - t * one)
        (slope,) = torch.autograd.grad(layer.loss(shrunk / shrunk.sum(-1, keepdim=True)), t)
        want = slope / (1 - layer.attention[h, i, j])
        torch.testing.assert_close(found[h, i, j], want.abs(), rtol=1e-6, atol=1e-12)


def test_small_values_that_are_really_cut_change_the_loss_as_foretold():
    layer = Layer(1, scale=4 * C**-0.5)
    found, before = layer.influence(N, 1), layer.loss(layer.attention)
    small = ((layer.attention < 1e-3) & (layer.attention > 1e-5)).nonzero()
    assert len(small) > 20
    for h, i, j in small[:20].tolist():
        cut = layer.scores.clone()
        cut[h, i, j] = -torch.inf
        change = abs(float(layer.loss(cut.softmax(-1)) - before))
        assert change == pytest.approx(float(found[h, i, j]), rel=0.02, abs=1e-12)


@pytest.mark.parametrize("pool", ["block", "value"])
def test_blocks_are_pooled_and_strips_change_nothing(pool, monkeypatch):
    values, signs = Layer(2).influence(N, 1, pool="value"), {}
    want = values.view(2, 4, 6, 4, 6).sum((2, 4))
    for strip in (512, 6, 12):
        monkeypatch.setattr(span_profile, "STRIP", strip)
        blocks = Layer(2).influence(5, 6, pool=pool)
        signs[strip] = blocks
        if pool == "value":
            torch.testing.assert_close(blocks[:, :4, :4], want)
        else:
            assert (blocks[:, :4, :4] <= want + 1e-12).all() and float(blocks.sum()) < 0.9 * float(want.sum())
        assert (blocks[:, 4] == 0).all() and (blocks[:, :, 4] == 0).all()
        torch.testing.assert_close(blocks, signs[512])


def test_a_profile_sums_query_heads_and_leaves_the_model_as_it_was(tiny_dense):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_dense).train()
    torch.manual_seed(0)
    ids = torch.randint(0, 200, (40,))
    before = {name: p.clone() for name, p in model.named_parameters()}
    kind = model.config._attn_implementation
    found = profile_spans(model, [AnswerSample(ids, torch.arange(30, 40))], block=8)
    assert found[40].shape == (3, 2, 5, 5) and found[40].dtype == torch.float32
    assert (found[40] >= 0).all() and float(found[40].triu(1).sum()) == 0 and float(found[40].sum()) > 0
    assert model.training and model.config._attn_implementation == kind
    assert all(p.requires_grad and p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


def profile_of_rank(rank, path):
    """Three samples of two lengths: the second process has none of the longer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.arange(3, 123).view(3, 40)
    samples = [
        AnswerSample(ids[0], torch.arange(30, 40)),
        *(AnswerSample(row[:32], torch.arange(25, 32)) for row in ids[1:]),
    ]
    found = profile_spans(model, samples if rank is None else samples[:2] if rank == 0 else samples[2:], block=8)
    return {str(length): part for length, part in found.items()}


def test_processes_that_share_the_samples_all_get_the_profile_of_one(tiny_dense):
    want = profile_of_rank(None, tiny_dense)
    assert sorted(want) == ["32", "40"]
    for found in in_processes(2, profile_of_rank, tiny_dense):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("pool", ["block", "value"])
def test_a_profile_agrees_with_autograd_through_eager_attention(pool, tiny_dense):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_dense, attn_implementation="eager").double().eval()
    torch.manual_seed(0)
    ids = torch.randint(0, 200, (24,))
    kept = []

    def keep(module, args, output):
        output[1].retain_grad()
        kept.append(output[1])

    hooks = [layer.self_attn.register_forward_hook(keep) for layer in model.model.layers]
    logits = model(ids[None], use_cache=False).logits[0, 15:-1]
    F.cross_entropy(logits, ids[16:]).backward()
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation("sdpa")
    found = profile_spans(model, [AnswerSample(ids, torch.arange(16, 24))], block=4, pool=pool)[24]
    for layer, a in enumerate(kept):
        a, g = a.detach()[0], a.grad[0]
        e = (a / (1 - a).clamp(min=1e-6) * (g - (g * a).sum(-1, keepdim=True))).clone()
        e[:, 0] = 0
        e = e.abs() if pool == "value" else e
        want = e.view(4, 6, 4, 6, 4).sum((2, 4)).abs().view(2, 2, 6, 6).sum(1)
        torch.testing.assert_close(found[layer].double(), want, rtol=2e-5, atol=1e-9)


def test_the_model_answers_for_itself_and_only_its_answer_counts(tiny_dense):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_dense), AutoTokenizer.from_pretrained(tiny_dense)
    (sample,) = answer_samples(model, tokenizer, ["1 + 1 = 2"], ["3 + 4 ="], max_new_tokens=5, length=64)
    n = len(tokenizer("1 + 1 = 2\n\n3 + 4 =")["input_ids"])
    assert sample.answer.tolist() == list(range(n, len(sample.ids))) and sample.length == 64
    with torch.no_grad():
        logits = model(sample.ids[None]).logits[0]
    assert (logits[sample.answer - 1].argmax(-1) == sample.ids[sample.answer]).all()


def test_samples_that_cannot_be_profiled_say_why(tiny_dense, caplog):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_dense), AutoTokenizer.from_pretrained(tiny_dense)
    ids = torch.arange(20)
    with pytest.raises(ValueError, match='pool must be "block" or "value"'):
        profile_spans(model, [AnswerSample(ids, torch.tensor([19]))], pool="sum")
    with pytest.raises(ValueError, match="at least one sample"):
        profile_spans(model, [])
    for answer in ([], [0], [20]):
        with pytest.raises(ValueError, match="must lie between 1 and 19"):
            profile_spans(model, [AnswerSample(ids, torch.tensor(answer, dtype=torch.long))])
    with pytest.raises(ValueError, match="2 contexts and 1 questions"):
        answer_samples(model, tokenizer, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="leaves no room"):
        answer_samples(model, tokenizer, ["1 + 1 = 2"], ["3 + 4 ="], length=4)
    profile_spans(model, [AnswerSample(ids, torch.tensor([19]), length=20)], block=8)
    assert "length 20 is no multiple of the block" in caplog.text
