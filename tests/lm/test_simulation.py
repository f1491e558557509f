"""The cost model: flows against counted assignments, loads against their law, systems against what they must obey."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mixtura.lm.parallel.cluster import Cluster, ModelShape
from mixtura.lm.parallel.load_trace import LoadTrace, record_loads, synthesize_loads
from mixtura.lm.parallel.placement import assign_tokens, homogeneous
from mixtura.lm.parallel.simulate import simulate, tune
from mixtura.lm.parallel.systems import SYSTEMS
from mixtura.lm.parallel.traffic import flow, moved_chunks

CLUSTER = Cluster(nodes=2, devices_per_node=2, inter_bw=1e9, intra_bw=1e10, flops=1e12, memory=1e9)
SHAPE = ModelShape(width=64, hidden=128, experts=(8, 8, 8), top_k=2, sequence=128)


def test_flows_are_those_of_the_assignment():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        placement = homogeneous(8, 4) | (torch.rand(8, 4, generator=generator) < 0.3)
        each = 12 * torch.randint(0, 9, (8,), generator=generator)  # divides by any number of holders
        sent = assign_tokens(placement, each.expand(4, 8).contiguous(), CLUSTER.topology).sum(1)  # (source, holder)
        moved = flow(placement.numpy(), 4 * each.numpy(), CLUSTER)
        assert moved.computed == pytest.approx(sent.sum(0).numpy())
        node = torch.arange(4) // 2
        near = sent * (node[:, None] == node) * (1 - torch.eye(4, dtype=torch.long))
        assert moved.device == pytest.approx(torch.maximum(near.sum(0), near.sum(1)).numpy())
        far = torch.stack([torch.stack([sent[node == a][:, node == b].sum() for b in (0, 1)]) for a in (0, 1)])
        far.fill_diagonal_(0)
        assert moved.node == pytest.approx(torch.maximum(far.sum(0), far.sum(1)).numpy())


def test_an_expert_crosses_into_a_node_once():
    before = homogeneous(4, 4).numpy()
    after = before.copy()
    after[0] = True
    device, node = moved_chunks(before, after, CLUSTER)
    assert device.tolist() == [0, 1, 1, 1]
    assert node.tolist() == [1, 1]


def test_of_several_nodes_with_a_copy_one_sends():
    cluster = Cluster(nodes=3, devices_per_node=1, inter_bw=1e9, intra_bw=1e10, flops=1e12, memory=1e9)
    before, after = (np.array([row], dtype=bool) for row in ([1, 1, 0], [1, 1, 1]))
    assert moved_chunks(before, after, cluster)[1].tolist() == [1, 0, 1]


def test_a_fit_recovers_the_law_of_the_loads():
    for skew, drift in ((0.5, 0.03), (1.0, 0.1), (1.5, 0.3)):
        trace = synthesize_loads(200, 8, 64, 200_000, skew=skew, drift=drift, seed=1)
        found = trace.fit()
        assert found[0] == pytest.approx(skew, rel=0.15)
        assert found[1] == pytest.approx(drift, abs=0.03)
    even = synthesize_loads(20, 2, 64, 200_000, skew=0.0, seed=1)
    assert even.fit()[0] < 0.02


def test_tiling_keeps_shares_and_sums(tmp_path):
    trace = synthesize_loads(10, 2, 8, 1001, skew=1.0)
    tiled = trace.tiled(5, 4004)
    assert tiled.counts.shape == (10, 5, 8)
    assert (tiled.counts.sum(-1) == 4004).all()
    assert np.abs(tiled.counts[:, :2] - 4 * trace.counts).max() <= 1
    assert not (tiled.counts[:, 2] == tiled.counts[:, 0]).all()
    tiled.save(tmp_path / "t.safetensors")
    assert (LoadTrace.load(tmp_path / "t.safetensors").counts == tiled.counts).all()


def test_loads_are_recorded_from_a_model():
    from mixtura.lm.anatomy import recorded_routing
    from mixtura.lm.model import MixturaConfig, MixturaForCausalLM

    torch.manual_seed(0)
    model = MixturaForCausalLM(
        MixturaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_experts=4,
        )
    ).eval()
    batches = [torch.randint(0, 50, (2, 5)) for _ in range(3)]
    trace = record_loads(model, batches)
    assert trace.counts.shape == (3, 2, 4)
    with recorded_routing(model) as seen:
        model(input_ids=batches[2])
    for layer, routing in enumerate(seen.values()):
        assert [(routing.indices == e).sum() for e in range(4)] == trace.counts[2, layer].tolist()
    assert ModelShape.of(model.config).experts == (4, 4)


def test_even_loads_leave_nothing_to_gain():
    counts = np.full((4, 3, 8), 100)
    reports = {name: simulate(LoadTrace(counts), SHAPE, CLUSTER, name) for name in ("ep", "smart")}
    assert reports["smart"].seconds == pytest.approx(reports["ep"].seconds)
    assert reports["ep"].imbalance == pytest.approx(1)


def test_plain_expert_parallelism_by_hand():
    counts = np.zeros((1, 3, 8), dtype=int)
    counts[:, :, 0] = 800  # all rows at device 0: 600 of them from others, 400 of those over the node's border
    report = simulate(LoadTrace(counts), SHAPE, CLUSTER, "ep")
    row_bytes, row_flops = 2 * 64, 2 * 2 * 64 * 128
    exchange = max(200 * row_bytes / 1e10, 400 * row_bytes / 1e9)
    assert report.phases["exchange"] == pytest.approx(3 * 4 * exchange)
    assert report.phases["experts"] == pytest.approx(3 * 3 * 800 * row_flops / 1e12)
    assert report.seconds == pytest.approx(sum(report.phases.values()))
    assert report.per_layer.sum() == pytest.approx(report.seconds)


def test_what_a_router_that_reads_experts_is_told_takes_time():
    counts = np.full((1, 3, 8), 100)
    plain = simulate(LoadTrace(counts), SHAPE, CLUSTER, "ep").phases["exchange"]
    for statistics, numbers in (("diagonal", 2 * 65), ("full", 65 + 65**2)):
        shape = replace(SHAPE, router_statistics=statistics, biased=True)
        own = 4 * numbers * 8 / 4  # bytes of a device's two experts; it tells 1 device of its node, and 2 beyond
        once = max(own / 1e10, 2 * 2 * own / 1e9)
        told = simulate(LoadTrace(counts), shape, CLUSTER, "ep").phases["exchange"] - plain
        assert told == pytest.approx(3 * 2 * once), statistics
    fsdp = [simulate(LoadTrace(counts), shape, CLUSTER, "fsdp").seconds for shape in (SHAPE, shape)]
    assert fsdp[0] == fsdp[1], "all weights are everywhere"


def test_copies_help_where_loads_are_uneven_and_are_hidden_by_the_papers_rule():
    shape = ModelShape(width=256, hidden=512, experts=(16, 16), top_k=2, sequence=2048)
    cluster = Cluster(nodes=2, devices_per_node=4, inter_bw=1e10, intra_bw=1e11, flops=1e12, memory=1e9)
    trace = synthesize_loads(12, 2, 16, 16_384, skew=1.5, drift=0.0)
    plain = simulate(trace, shape, cluster, "ep", skip=2)
    ours = simulate(trace, shape, cluster, "hecate", skip=2)
    assert ours.seconds < 0.8 * plain.seconds
    assert ours.phases["copies"] == 0
    again = simulate(trace, shape, cluster, "hecate", skip=2, rematerialize=True)
    assert again.memory["copies"] < ours.memory["copies"]
    assert again.seconds >= ours.seconds
    assert simulate(trace, shape, cluster, "hecate", skip=2, overlap=0, reshard_every=0).seconds == pytest.approx(
        plain.seconds
    )


def test_no_system_sees_the_future():
    trace = synthesize_loads(6, 3, 8, 800, skew=1.5, drift=1.0)
    changed = trace.counts.copy()
    changed[5] = changed[5, :, ::-1]
    for name, system in SYSTEMS.items():
        if name == "faster":  # decides after the gate
            continue
        plans = []
        for counts in (trace.counts, changed):
            from mixtura.lm.parallel.simulate import _policy

            policy = _policy(trace, SHAPE, CLUSTER, name, {"interval": 1} if "interval" in system.knobs() else {})
            plans.append([policy.plan(t, load.astype(float)).placement.copy() for t, load in enumerate(counts)][-1])
        assert (plans[0] == plans[1]).all(), name


def test_tuning_takes_the_fastest_of_the_grid():
    trace = synthesize_loads(6, 3, 8, 800, skew=1.0)
    knobs = tune(trace, SHAPE, CLUSTER, "flex")
    seconds = [simulate(trace, SHAPE, CLUSTER, "flex", **other).seconds for other in SYSTEMS["flex"].grid()]
    assert simulate(trace, SHAPE, CLUSTER, "flex", **knobs).seconds == min(seconds)


def test_shapes_count_their_parameters():
    from transformers import MixtralConfig, OlmoeConfig

    from mixtura.lm.fine_grained import paper_config

    # 1.84 billion: the experts of 12 layers, with attention; the paper counts no token tables
    paper = ModelShape(width=768, hidden=1536, experts=(64,) * 12, top_k=2, sequence=2048)
    assert paper.routed_parameters + paper.other_parameters == pytest.approx(1.84e9, rel=0.02)
    assert ModelShape.of(paper_config("16b")).experts == (0,) + (64,) * 27
    olmoe = OlmoeConfig(intermediate_size=1024, num_hidden_layers=16, num_experts=64, num_experts_per_tok=8)
    for config, total in ((MixtralConfig(), 46.7e9), (olmoe, 6.92e9)):
        shape = ModelShape.of(config)
        assert shape.routed_parameters + shape.other_parameters == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoadTrace(np.array([[[1, -1]]])), "got -1 at iteration 0, layer 0, expert 1"),
        (lambda: LoadTrace(np.array([[[1, 1], [1, 2]]])), "2 in layer 0 and 3 in layer 1"),
        (lambda: LoadTrace(np.ones((2, 2), dtype=int)), r"shape \(T, L, E\)"),
        (lambda: Cluster.preset("C"), "cluster must be one of"),
        (lambda: Cluster.preset("A", 12), "multiple of it on cluster A, got 12"),
        (lambda: synthesize_loads(1, 1, 4, 8, skew=1, drift=2), "drift must be between 0 and 1, got 2"),
        (lambda: simulate(synthesize_loads(2, 3, 8, 8, skew=0), SHAPE, CLUSTER, "other"), "system must be one of"),
        (lambda: simulate(synthesize_loads(2, 3, 8, 8, skew=0), SHAPE, CLUSTER, "flex", slot=1), "takes the knobs"),
        (lambda: simulate(synthesize_loads(2, 2, 8, 8, skew=0), SHAPE, CLUSTER, "ep"), "trace has 2 layers of 8"),
        (lambda: simulate(synthesize_loads(2, 3, 8, 8, skew=0), SHAPE, CLUSTER, "ep", skip=2), "skip must be"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
