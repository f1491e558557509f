"""Language models of experts over several processes: meshes, exchanges of rows, experts that live apart.

mesh = parse_layout("expert=2,data=2", world=dist.get_world_size())
parallelize_experts(model, mesh)            # the same model in every process before, a part of it after
loss = language_loss(model, rows, shared=SharedBatch())
loss.backward()
reduce_gradients(model, mesh)
"""

from typing import TYPE_CHECKING

from mixtura._lazy import lazy_names

if TYPE_CHECKING:
    from mixtura.lm.parallel.exchange import Cost, Exchanged, exchange_cost
    from mixtura.lm.parallel.experts import ParallelExperts, gather_experts, parallelize_experts
    from mixtura.lm.parallel.forms import apply_plan
    from mixtura.lm.parallel.gradients import clip_gradients, reduce_gradients
    from mixtura.lm.parallel.mesh import ExpertMesh, make_mesh, parse_layout

__all__ = [
    "Cost",
    "Exchanged",
    "ExpertMesh",
    "ParallelExperts",
    "apply_plan",
    "clip_gradients",
    "exchange_cost",
    "gather_experts",
    "make_mesh",
    "parallelize_experts",
    "parse_layout",
    "reduce_gradients",
]

__getattr__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("Cost", "Exchanged", "exchange_cost"), "mixtura.lm.parallel.exchange"),
        **dict.fromkeys(("ParallelExperts", "gather_experts", "parallelize_experts"), "mixtura.lm.parallel.experts"),
        "apply_plan": "mixtura.lm.parallel.forms",
        **dict.fromkeys(("clip_gradients", "reduce_gradients"), "mixtura.lm.parallel.gradients"),
        **dict.fromkeys(("ExpertMesh", "make_mesh", "parse_layout"), "mixtura.lm.parallel.mesh"),
    },
)
