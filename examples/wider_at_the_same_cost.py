"""A wider network at the same cost: sparse, with masks that move, against the dense one, on scikit-learn's digits.

Both take the same multiply-adds and the same training. Seconds on one core.

    python examples/wider_at_the_same_cost.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from mixtura.core.flops import count_flops
from mixtura.core.isoflop import IsoFlop, widen
from mixtura.core.sparse_training import MaskConfig, MaskOptimizer
from mixtura.data.digits import digits

STEPS = 800

images, kinds = digits()
x, y = torch.tensor(images, dtype=torch.float32).flatten(1), torch.tensor(kinds)
train, test = slice(0, 1200), slice(1200, None)


def network(width: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def trained(model: nn.Module, *, masks: bool) -> float:
    """Test accuracy in percent after the one recipe."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    stepping = MaskOptimizer(model, optimizer, MaskConfig(every=20), total_steps=STEPS) if masks else optimizer
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(1200, (64,), generator=draw)
        stepping.zero_grad()
        F.cross_entropy(model(x[train][rows]), y[train][rows]).backward()
        stepping.step()
    return 100 * float((model(x[test]).argmax(1) == y[test]).float().mean())


for seed in range(3):
    torch.manual_seed(seed)
    dense = network(8)
    generator = torch.Generator().manual_seed(seed)
    sparse = widen(network, IsoFlop("wide", 0.75), width=8, example_input=x[:1], generator=generator)
    costs = [round(count_flops(model, x[:1]).total) for model in (dense, sparse)]
    print(
        f"seed {seed}: {costs[0]} multiply-adds dense, {trained(dense, masks=False):.1f} % right; "
        f"{costs[1]} sparse, {trained(sparse, masks=True):.1f} %"
    )
