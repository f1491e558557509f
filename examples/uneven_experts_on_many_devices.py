"""What uneven experts cost on 32 devices, and how much of it copies made for one step win back. Modelled, in seconds."""

from mixtura.lm.parallel.cluster import Cluster, ModelShape
from mixtura.lm.parallel.load_trace import synthesize_loads
from mixtura.lm.parallel.mesh import make_mesh
from mixtura.lm.parallel.plan import memory
from mixtura.lm.parallel.simulate import simulate

shape = ModelShape(width=768, hidden=1536, experts=(64,) * 4, top_k=2, sequence=2048)
cluster = Cluster.preset("B")  # 4 nodes of 8 A100, 400 Gb/s between them
for skew in (0.5, 1.0, 1.5):
    trace = synthesize_loads(12, 4, 64, 8192 * shape.top_k * cluster.devices, skew=skew)
    plain, ours = (simulate(trace, shape, cluster, system, skip=4) for system in ("ep", "hecate"))
    print(
        f"busiest expert {trace.imbalance:4.1f} times the mean: {1e3 * plain.seconds:5.1f} ms a step, "
        f"with copies {1e3 * ours.seconds:5.1f} ms ({plain.seconds / ours.seconds:.2f} times as fast)"
    )
for form in ("E", "E+Z", "hecate"):
    need = memory(shape, make_mesh(32), form, capacity=8)
    print(
        f"{form:7} {need.device / 1e9:.2f} GB a device: "
        + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in need.parts.items())
    )
