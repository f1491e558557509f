"""Many small experts and a shared one against few large ones, at equal parameters and cost, on a made-up task."""

import torch

from mixtura.core.training import TrainConfig, fit
from mixtura.data.concept_mixture import ConceptMixture
from mixtura.lm.fine_grained import FineGrainedMoE, matched
from mixtura.lm.specialization import without_best

task = ConceptMixture()
x, y = task.batch(-1, 2048)  # never trained on
for name, split, shared in (("16 large experts", 1, 0), ("63 small and one shared", 4, 1)):
    shape = matched(64, 16, 2, split=split, shared=shared)
    layer = FineGrainedMoE(64, shape.hidden, shape.routed, shape.active, shape.shared, init_std=0.125)

    def loss_at(step: int, layer: FineGrainedMoE = layer) -> torch.Tensor:
        inputs, targets = task.batch(step, 256)
        out = layer.mix(inputs)
        return (out.hidden - targets).square().mean() + out.aux_loss

    fit(layer, loss_at, TrainConfig(steps=150, lr=1e-2, weight_decay=0.0), label=name)
    with torch.no_grad():
        routing = layer.gate(x)
        for banned in (0, shape.routed // 16):
            got = layer.mix(x, without_best(routing, banned, renormalise=False)).hidden
            error = float((got - y).square().mean() / y.var(0).mean())
            print(f"{name}, best {banned} banned: error over variance {error:.3f}")
