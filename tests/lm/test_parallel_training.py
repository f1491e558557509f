"""`train` over processes: the same run as in one, resumed under other layouts, and ends that everyone hears of."""

import os
import re
import shutil
import signal
import time

import pytest
import torch
from parallel_models import FREE, even_model, loss_of
from process_group import in_processes
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from mixtura.core.shared_batch import SharedBatch
from mixtura.core.training import NonFiniteLoss, TrainConfig, fit
from mixtura.lm.parallel import make_mesh
from mixtura.lm.parallel.training import ExpertParallel, LostProcess
from mixtura.lm.training import language_loss, train

ROWS, LENGTH = 6, 5  # six rows over four processes: 2, 2, 1, 1
CONFIG = TrainConfig(steps=20, lr=0.01, clip=0.05, checkpoint_every=10)
SHORT = TrainConfig(steps=9, lr=0.01, clip=0.05, checkpoint_every=3)


def rows_at(step):
    return torch.randint(1, 40, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def run(name, team=None, out=None, stop=None, spoil=None, config=CONFIG):
    """Losses and the whole model's weights after a training, in float64."""
    model = FREE[name]()

    def loss_at(step):
        rows = rows_at(step)
        if spoil is not None:
            spoil(step)
        part = rows if team is None else team.rows(rows)
        return loss_of(model, part, SharedBatch() if team is None else team.shared)

    if team is not None:
        team.prepare(model)
    history = fit(model, loss_at, config, out=out, stop=stop, team=team)
    state = model.state_dict() if team is None else team.state(model)
    return {"losses": history.losses, "resumed": history.resumed_at, "state": state}


LAYOUTS = [
    ("even", {"expert": 2}, None, "E+D+Z"),
    ("pyramid", {"expert": 4, "node": 2}, "hierarchical", "E+D"),
]
OTHER = ("even", {"expert": 1, "tensor": 2}, None, "E+D+Z+M")  # goes on with what the first began


def everywhere(rank, folder):
    found = []
    for i, (name, degrees, plan, form) in enumerate(LAYOUTS):
        team = ExpertParallel(make_mesh(4, **degrees), plan=plan, form=form)
        found.append(run(name, team, folder / f"one-to-four-{i}"))
    name, degrees, plan, form = LAYOUTS[0]
    run(name, ExpertParallel(make_mesh(4, **degrees), plan=plan, form=form), folder / "begun", stop=10)
    name, degrees, plan, form = OTHER
    team = ExpertParallel(make_mesh(4, **degrees), plan=plan, form=form)
    if rank == 0:
        shutil.copytree(folder / "begun", folder / "between")
    team.wait()
    found.append(run(name, team, folder / "between"))
    return found


def test_a_run_of_20_steps_goes_on_from_one_process_to_four_between_layouts_and_back(tmp_path):
    want = {name: run(name) for name in ("even", "pyramid")}
    for i, (name, *_) in enumerate(LAYOUTS):
        run(name, out=tmp_path / f"one-to-four-{i}", stop=10)
    found = in_processes(4, everywhere, tmp_path)
    for case, *results in zip([*LAYOUTS, OTHER], *found, strict=True):
        whole = want[case[0]]
        for rank, got in enumerate(results):
            assert got["resumed"] == 10, case
            torch.testing.assert_close(got["losses"], whole["losses"], rtol=1e-9, atol=1e-9)
            assert (got["state"] == {}) == (rank > 0), "only the first process gathers"
        same_state(results[0]["state"], whole["state"], case)
    again = run("even", out=tmp_path / "begun")
    assert again["resumed"] == 10
    same_state(again["state"], want["even"]["state"], "alone")


CHAINS = {  # one process begins, four go on, and then others, or one again
    "translator": [({"expert": 2}, "E+D+Z"), ({"expert": 4}, "E+D")],
    "sparse": [({"expert": 2}, "E+D+Z"), ({"expert": 1, "tensor": 2}, "E+D+Z+M")],
}


def chained(rank, folder):
    found = {}
    for name, ((degrees, form), (other, other_form)) in CHAINS.items():
        run(name, ExpertParallel(make_mesh(4, **degrees), form=form), folder / name, stop=6, config=SHORT)
        team = ExpertParallel(make_mesh(4, **other), form=other_form)
        if rank == 0:
            shutil.copytree(folder / name, folder / f"{name}-between")
        team.wait()
        found[name] = run(name, team, folder / f"{name}-between", config=SHORT)
    return found


def test_a_translator_and_a_model_whose_router_reads_experts_go_on_from_layout_to_layout(tmp_path):
    for name in CHAINS:
        run(name, out=tmp_path / name, stop=3, config=SHORT)
    found = in_processes(4, chained, tmp_path)
    for name in CHAINS:
        whole, again = run(name, config=SHORT), run(name, out=tmp_path / name, config=SHORT)
        assert [rank[name]["resumed"] for rank in found] == [6] * 4 and again["resumed"] == 6
        for got in (*(rank[name] for rank in found), again):
            torch.testing.assert_close(
                got["losses"], whole["losses"], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )
        same_state(found[0][name]["state"], whole["state"], name)
        same_state(again["state"], whole["state"], f"{name}, alone again")


def draws(team=None):
    model, drawn = torch.nn.Linear(2, 1), []

    def loss_at(step):
        drawn.append(torch.rand(3))
        return model(torch.ones(1, 2)).sum()

    fit(model, loss_at, TrainConfig(steps=2, lr=0.01), team=team)
    return torch.stack(drawn)


def draws_everywhere(rank):
    return draws(ExpertParallel(make_mesh(4, tensor=2)))


def test_processes_draw_alike_only_where_they_hold_the_same_rows():
    first, beside, other, last = in_processes(4, draws_everywhere)
    assert torch.equal(first, draws()) and torch.equal(first, beside) and torch.equal(other, last)
    assert not (first == other).any() and not (first[0] == first[1]).any()


def same_state(got, want, what):
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{key}, {what}: {m}")


class Numbers:
    """A tokenizer of texts that are numbers."""

    eos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


TEXTS = [" ".join(str(i * i % 59 + 1) for i in range(start, start + 400)) for start in range(3)]
PARTS = ("all", "experts", "router")


def tied():
    torch.manual_seed(0)
    config = tiny_config("mixtral")
    config.tie_word_embeddings = True
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager").float()


def learned(trainable, team=None):
    model = tied()
    history = train(
        model, Numbers(), TEXTS, steps=3, batch_size=5, length=8, lr=1e-2, trainable=trainable, balance=0.5, team=team
    )
    return history.losses, model.state_dict() if team is None else team.state(model)


def learned_everywhere(rank):
    return [learned(trainable, ExpertParallel(make_mesh(2, expert=2))) for trainable in PARTS]


def test_a_part_of_a_transformers_family_learns_over_processes_as_it_does_in_one(monkeypatch):
    monkeypatch.setattr("mixtura.lm.training.bfloat16_over_float32", lambda: 1.0)  # no autocast: float32 shall agree
    found = in_processes(2, learned_everywhere)
    start = tied().state_dict()
    assert torch.equal(start["lm_head.weight"], start["model.embed_tokens.weight"])
    for at, trainable in enumerate(PARTS):
        losses, state = learned(trainable)
        torch.testing.assert_close(found[1][at][0], losses, rtol=1e-5, atol=1e-5)
        got = found[0][at][1]
        assert got.keys() == state.keys()
        for name, tensor in state.items():
            # Adam divides by the size of a gradient: one that is rounding alone may turn about, and moves the rate at most.
            near = (got[name] - tensor).abs() < 1e-4
            assert near.float().mean() > 0.995, f"{name}, {trainable}"
            moves = trainable == "all" or ".gate." in name or (trainable == "experts" and "experts" in name)
            assert torch.equal(got[name], start[name]) != moves, f"{name}, {trainable}"


def disagreeing(rank):
    team = ExpertParallel(make_mesh(2))
    team.agree("the data", torch.zeros(3), torch.ones(2, dtype=torch.bfloat16))
    said = []
    for tensor in (torch.tensor([[1, 2], [3, 4 + rank]]), torch.tensor(0.5 * rank)):
        with pytest.raises(
            ValueError, match="processes disagree on the data: process 1 has other than process 0"
        ) as error:
            team.agree("the data", tensor)
        said.append(str(error.value))
    return said


def test_processes_with_other_data_are_told_so_all_of_them():
    first, second = in_processes(2, disagreeing)
    assert first == second and len(first) == 2


def test_a_batch_that_does_not_reach_every_process_is_refused():
    team = ExpertParallel(make_mesh(1))
    assert len(team.rows(torch.zeros(3, 2))) == 3
    with pytest.raises(ValueError, match="a batch of 0 rows does not reach 1 processes; give at least 1 rows"):
        team.rows(torch.zeros(0, 2))


def spoiled(rank, folder):
    team = ExpertParallel(make_mesh(2))
    model = even_model()
    experts = model.model.layers[1].mlp.experts

    def loss_at(step):
        if step == 3:  # in the experts that lie in process 1
            with torch.no_grad():
                experts.down_proj[2:].fill_(torch.nan) if team is None else spread().fill_(torch.nan)
        return language_loss(model, team.rows(rows_at(step)), shared=team.shared)

    def spread():
        local = model.model.layers[1].mlp.experts.local_experts.down_proj
        return local if rank == 1 else local[:0]

    team.prepare(model)
    config = TrainConfig(steps=5, lr=0.01, checkpoint_every=2)
    with pytest.raises(NonFiniteLoss) as error:
        fit(model, loss_at, config, out=folder / "state", team=team)
    return str(error.value)


def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_names_step_layer_and_checkpoint(tmp_path):
    for said in in_processes(2, spoiled, tmp_path):
        assert re.search(r"the loss became nan at step 3; .* it shows first in model\.layers\.1\.mlp", said), said
        assert re.search(r"the last good checkpoint, in .*state, is of 2 steps", said), said


def dying(rank, folder):
    team = ExpertParallel(make_mesh(4, expert=2))

    def die(step):
        if step == 13 and rank == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        run("even", team, folder / "state", spoil=die)
    except LostProcess as error:
        (folder / f"{rank}.txt").write_text(str(error))
        os._exit(0)


def test_a_process_killed_in_mid_run_ends_the_others_with_words_and_the_last_checkpoint_resumes(tmp_path):
    start = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        in_processes(4, dying, tmp_path)
    assert time.monotonic() - start < 60
    said = [file.read_text() for file in tmp_path.glob("*.txt")]
    assert len(said) == 3, said
    for words in said:
        assert re.match(
            r"process \d lost another process of the training at step 13; the last good checkpoint, in .*state, is of 10 steps;"
            r" the same command goes on from the last checkpoint \(",
            words,
        ), words
    again = run("even", out=tmp_path / "state")
    assert again["resumed"] == 10
    same_state(again["state"], run("even")["state"], "after the loss of a process")
