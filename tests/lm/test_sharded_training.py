"""`fit` with sharded experts: the run of one process, with new owners on the way, resumed from and by other layouts."""

import shutil

import pytest
import torch
from parallel_models import FREE, loss_of
from process_group import in_processes

from mixtura.core.shared_batch import SharedBatch
from mixtura.core.training import TrainConfig, fit
from mixtura.lm.parallel import make_mesh
from mixtura.lm.parallel.sharded_experts import sharded_layers
from mixtura.lm.parallel.sharded_training import Sharded
from mixtura.lm.parallel.training import ExpertParallel

CONFIG = TrainConfig(steps=16, lr=0.01, clip=0.05, checkpoint_every=8)


OTHERS = ("translator", "sparse")


def run(team=None, out=None, stop=None, name="even"):
    model = FREE[name](**{} if name == "even" else {"num_experts": 4})
    if name == "even":
        with torch.no_grad():  # most tokens want one expert
            model.model.layers[1].mlp.gate.weight[0] *= 8
    shared = SharedBatch() if team is None else team.shared
    owners, copies = set(), 0

    def loss_at(step):
        nonlocal copies
        rows = torch.randint(1, 40, (6, 5), generator=torch.Generator().manual_seed(step))
        loss = loss_of(model, rows if team is None else team.rows(rows), shared)
        for layer in sharded_layers(model):
            owners.add(str(layer.owners.tolist()))
            copies += int((layer.placement & ~layer.owners).sum())
        return loss

    if team is not None:
        team.prepare(model)
    history = fit(model, loss_at, CONFIG, out=out, stop=stop, team=team)
    state = model.state_dict() if team is None else team.state(model)
    return {"losses": history.losses, "state": state, "owners": len(owners), "copies": copies}


def everywhere(rank, folder):
    made = [
        run(Sharded(make_mesh(4, node=2), overlap=1, capacity=1, every=3)),
        run(
            Sharded(make_mesh(4, node=2), overlap=2, capacity=1, every=3, free=True, shard=False),
            folder / "begun",
            stop=8,
        ),
    ]
    team = ExpertParallel(make_mesh(4, expert=2))
    if rank == 0:
        shutil.copytree(folder / "begun", folder / "apart")
    team.wait()
    made.append(run(team, folder / "apart"))
    made.append(run(Sharded(make_mesh(4), every=2), folder / "alone"))  # measured: room, and what travels meanwhile
    made += [
        run(Sharded(make_mesh(4, node=2), overlap=1, capacity=1, every=3, free=True), name=name) for name in OTHERS
    ]
    return made


def test_sharded_training_is_that_of_one_process_and_layouts_may_change(tmp_path):
    wanted = [run()] * 4 + [run(name=name) for name in OTHERS]
    run(out=tmp_path / "alone", stop=8)
    found = in_processes(4, everywhere, tmp_path)
    for at, (want, *results) in enumerate(zip(wanted, *found, strict=True)):
        for got in results:
            torch.testing.assert_close(got["losses"], want["losses"][: len(got["losses"])], rtol=1e-9, atol=1e-9)
        if at == 1:
            continue  # half a run
        for key, tensor in want["state"].items():
            torch.testing.assert_close(results[0]["state"][key], tensor, rtol=1e-9, atol=1e-9, msg=f"{key}, {at}")
    whole, half, _, _, *others = found[0]
    assert whole["copies"] > 10 and half["copies"] > 4
    assert all(made["copies"] > 10 and made["owners"] > 1 for made in others)
    assert whole["owners"] > 1, "experts changed owners while it trained"
    again = run(out=tmp_path / "begun")
    for key, tensor in wanted[0]["state"].items():
        torch.testing.assert_close(again["state"][key], tensor, rtol=1e-9, atol=1e-9, msg=f"{key}, alone again")


def test_the_words_of_the_layout():
    team = Sharded.of("hecate, overlap=3,capacity=2,reshard=0,free=1", make_mesh(1))
    assert (team.overlap, team.capacity, team.every, team.free) == (3, 2, 0, True)
    assert Sharded.of("hecate", make_mesh(1)).overlap is None
    for words in ("hecate,copies=2", "hecate,capacity=x", "hecate,capacity=1,capacity=2"):
        with pytest.raises(ValueError, match="hecate takes overlap=N, capacity=N, reshard=N, free=N"):
            Sharded.of(words, make_mesh(1))
