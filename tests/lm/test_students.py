"""Students and their staged loss: against sums by hand, the plain training, and a count of the teacher's calls."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mixtura.core.training import TrainConfig, fit
from mixtura.lm import distill
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.students import StagedDistillation, student_of

SHAPE = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
}
PYRAMID = {
    "num_experts": [0, 2, 0, 2, 0, 3],
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "shared_expert_intermediate_size": 24,
    "shared_combine": "coefficient",
    "router_z_loss_coef": 0.0,
}
TOKENS = torch.randint(0, 31, (2, 7), generator=torch.Generator().manual_seed(0))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def teacher(**parts):
    torch.manual_seed(0)
    return MixturaForCausalLM(MixturaConfig(**SHAPE | PYRAMID | parts, initializer_range=0.3))


def batches(step):
    return torch.randint(0, 31, (2, 9), generator=seeded(step))


def by_hand(student, told, labels, beta, tau):
    """Cross entropy and divergence, one position and one word at a time."""
    total = divergence = 0.0
    rows = [(s, t, int(y)) for s, t, y in zip(student, told, labels, strict=True) if y != -100]
    for s, t, y in rows:
        total -= s.softmax(-1)[y].log().item()
        p, q = (t / tau).softmax(-1), (s / tau).softmax(-1)
        divergence += sum(p[v].item() * (p[v].log() - q[v].log()).item() for v in range(len(p)))
    return (total + beta * tau**2 * divergence) / len(rows)


@pytest.mark.parametrize(("beta", "tau"), [(1.0, 1.0), (0.5, 2.0)])
def test_the_loss_is_the_sum_by_hand_and_padding_counts_in_no_part(beta, tau):
    student, told = torch.randn(2, 5, 7, generator=seeded()), 2 * torch.randn(2, 5, 7, generator=seeded(1))
    labels = torch.randint(0, 7, (2, 5), generator=seeded(2))
    labels[0, 3:] = -100
    got = StagedDistillation(beta=beta, tau=tau)(student, told, labels, aux=0.25, progress=0.1)
    want = by_hand(student.flatten(0, 1), told.flatten(0, 1), labels.flatten(), beta, tau)
    assert got.item() == pytest.approx(want + 0.25, rel=1e-5)


def test_the_imitation_is_zero_at_the_teacher_and_grows_with_the_vocabulary_not_divided_by_it():
    loss, labels = StagedDistillation(), torch.zeros(1, 3, dtype=torch.long)
    logits = torch.randn(1, 3, 50, generator=seeded())
    assert torch.equal(loss(logits, logits, labels), F.cross_entropy(logits[0], labels[0]))
    sure = torch.full((1, 3, 50), -20.0)
    sure[..., 0] = 20.0
    # A teacher that is sure against a student that knows nothing: log V, not log V / V.
    flat = torch.zeros(1, 3, 50)
    assert loss(flat, sure, labels).item() == pytest.approx(2 * torch.tensor(50.0).log().item(), rel=1e-4)


def test_the_gradient_is_that_of_the_two_softmaxes():
    student = torch.randn(4, 6, generator=seeded(), dtype=torch.float64, requires_grad=True)
    told, labels = torch.randn(4, 6, generator=seeded(1), dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    StagedDistillation(tau=2.0)(student, told, labels).backward()
    q, p = (student.detach() / 2).softmax(-1), (told / 2).softmax(-1)
    want = (student.detach().softmax(-1) - F.one_hot(labels, 6) + 2 * (q - p)) / 4
    torch.testing.assert_close(student.grad, want, rtol=1e-5, atol=1e-6)  # the loss is computed in float32


class Counting(torch.nn.Module):
    """A teacher that counts its calls and remembers the mode of each."""

    def __init__(self, model):
        super().__init__()
        self.model, self.modes = model, []
        self.config = model.config

    def forward(self, **kwargs):
        assert not torch.is_grad_enabled()
        self.modes.append(self.training)
        return self.model(**kwargs)


@pytest.mark.parametrize(("stop", "calls"), [(0.0, 0), (0.5, 5), (0.7, 7), (1.0, 10)])
def test_the_teacher_is_asked_until_the_stop_in_evaluation_mode_and_not_any_more(stop, calls):
    told = Counting(teacher())
    told.train()
    student = student_of(told.model, keep_layers=3, generator=seeded())
    report = distill(told, student, batches, steps=10, schedule=StagedDistillation(stop=stop))
    assert len(told.modes) == report.teacher_calls == calls and not any(told.modes)
    assert told.training  # as it was


def plain(student, steps):
    def loss_at(step):
        ids = batches(step)
        out = student(input_ids=ids, use_cache=False, output_router_logits=True)
        return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + out.aux_loss

    fit(student, loss_at, TrainConfig(steps=steps, lr=3e-4))
    return student


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"stop": 0.0}])
def test_without_imitation_it_is_the_plain_training(options):
    told = teacher()
    runs = [student_of(told, keep_layers=3, generator=seeded()) for _ in range(2)]
    distill(told, runs[0], batches, steps=6, schedule=StagedDistillation(**options))
    plain(runs[1], 6)
    for (name, p), q in zip(runs[0].named_parameters(), runs[1].parameters(), strict=True):
        assert torch.equal(p, q), name
    taught = student_of(told, keep_layers=3, generator=seeded())
    distill(told, taught, batches, steps=6)
    assert not torch.equal(taught.lm_head.weight, runs[1].lm_head.weight)


def test_a_run_that_is_cut_and_resumed_behind_the_stop_ends_with_the_same_weights(tmp_path):
    told, states = teacher(capacity_factor=1.0, min_capacity=1), []
    for cut in (False, True):
        student = student_of(told, keep_layers=3, generator=seeded())
        out = tmp_path / str(cut)

        def read(step, cut=cut):
            if cut and step == 8:
                raise KeyboardInterrupt
            return batches(step)

        options = {"steps": 10, "out": out, "checkpoint_every": 3, "describe": {"rows": 2}}
        if cut:
            with pytest.raises(KeyboardInterrupt):
                distill(told, student, read, **options)
            student = student_of(told, keep_layers=3, generator=seeded(9))
        report = distill(told, student, batches, **options)
        states.append(student.state_dict())
    assert report.resumed_at == 6 and report.teacher_calls == 1 and len(report.losses) == 10
    for name, t in states[0].items():
        assert torch.equal(t, states[1][name]), name
    with pytest.raises(ValueError, match=r"holds a run with stop=0\.7, this one has 0\.5"):
        distill(told, student, batches, schedule=StagedDistillation(stop=0.5), **options)


def test_a_student_loses_the_early_entries_of_the_pyramid():
    student = student_of(teacher(), keep_layers=4)
    assert student.config.num_experts == [0, 2, 0, 3] and student.training
    explicit = student_of(teacher(), keep_layers=[1, 5])
    assert explicit.config.num_experts == [2, 3] and explicit.config.dense_layers == []


def test_the_papers_student_has_the_papers_list():
    from mixtura.lm.pyramid import paper_config
    from mixtura.lm.students import kept_layers, student_config

    big = paper_config("350m-pr-32-64")
    small = student_config(big, kept_layers(big, 21))
    assert small.num_experts == paper_config("350m-pr-32-64-student").num_experts


def test_a_random_student_shares_nothing_with_the_teacher_and_a_copied_one_its_layers():
    told = teacher()
    drawn, again = (student_of(told, keep_layers=[0, 1, 5], generator=seeded(3)) for _ in range(2))
    copied = student_of(told, keep_layers=[0, 1, 5], init="teacher")
    assert torch.equal(drawn.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(drawn.lm_head.weight, told.lm_head.weight)
    assert torch.equal(copied.lm_head.weight, told.lm_head.weight)
    for mine, own in zip(copied.model.layers, [told.model.layers[i] for i in (0, 1, 5)], strict=True):
        for (name, p), q in zip(mine.named_parameters(), own.parameters(), strict=True):
            assert torch.equal(p, q), name


def test_students_of_other_families(tmp_path):
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {n: SHAPE[n] for n in names}
    torch.manual_seed(0)
    for told in (
        LlamaForCausalLM(LlamaConfig(**shape)),
        MixtralForCausalLM(MixtralConfig(**shape, num_key_value_heads=2, num_local_experts=3)),
    ):
        student = student_of(told, keep_layers=2, init="teacher")
        assert type(student) is type(told) and len(student.model.layers) == 2
        distill(told, student, batches, steps=2)
        student.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded.eval()(TOKENS).logits, student.eval()(TOKENS).logits)


def poisoned():
    student = student_of(teacher(), keep_layers=3)
    with torch.no_grad():
        student.model.layers[1].mlp.gate.weight[0, 0] = torch.nan
    return student


def other_words():
    return MixturaForCausalLM(MixturaConfig(**SHAPE | PYRAMID | {"vocab_size": 32}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StagedDistillation(stop=1.5), "stop is a share .* got 1.5"),
        (lambda: StagedDistillation(beta=-1), "beta must be >= 0, got -1"),
        (lambda: StagedDistillation(tau=0), "tau must be > 0, got 0"),
        (
            lambda: StagedDistillation()(torch.zeros(1, 2), None, torch.zeros(1).long()),
            "teacher_logits are needed before",
        ),
        (
            lambda: StagedDistillation()(torch.zeros(1, 2), torch.zeros(1, 3), torch.zeros(1).long()),
            r"the student's shape \(1, 2\), got \(1, 3\)",
        ),
        (lambda: student_of(teacher(), keep_layers=6), "between 1 and 5 .the teacher has 6 layers., got 6"),
        (lambda: student_of(teacher(), keep_layers=[2, 1]), "ascending, each in 0..5, got"),
        (lambda: student_of(teacher(), keep_layers=2, init="zeros"), "init must be one of"),
        (lambda: distill(teacher(), other_words(), batches, steps=1), "must share one vocabulary, got 31 and 32"),
        (
            lambda: distill(teacher(), poisoned(), batches, steps=1),
            "router logits of model.layers.1.mlp are not finite",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_student_in_sixteen_bits_is_refused():
    with pytest.raises(TypeError, match=r"must be in float32 to be trained, got torch\.bfloat16"):
        distill(teacher(), copy.deepcopy(teacher()).to(torch.bfloat16), batches, steps=1)
