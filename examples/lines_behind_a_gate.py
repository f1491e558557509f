"""Several lines instead of one curve: which rows follow which, and how sure one can be of the gate's temperature.

python examples/lines_behind_a_gate.py
"""

import numpy as np
import torch

from mixtura.data.samples import sample
from mixtura.density import GatedRegression, MixingMeasure, activation_independence
from mixtura.density.gated_law import GateRule
from mixtura.density.rates import Truth

cars = sample("autompg")
X, mpg = cars.X[:, [cars.columns.index("weight")]] / 1000, cars.y  # thousands of pounds

for name, gate in {
    "one line": {"n_experts": 1},
    "two lines, soft": {},
    "two lines, a border": {"gate": "top-k", "top_k": 1, "top_k_bias": True},
}.items():
    model = GatedRegression(**{"n_experts": 2, **gate}).fit(X, mpg)
    lines = "; ".join(f"{a[0]:+.1f} mpg a thousand pounds" for a in model.coef_)
    print(f"{name:20} {model.log_likelihood_:.3f} nats a car: {lines}")
print("regions:", [(round(low, 2), round(high, 2), active) for low, high, active in model.regions_])

# A temperature that is learned beside linear slopes cannot be known; behind tanh it can. Here it is 0.6.
for gate, rule in {"linear": GateRule("temperature"), "tanh": GateRule("activation")}.items():
    atoms = MixingMeasure.of([1.65, 1.0], [[3.0], [0.0]], 0.6, [[2.0], [-1.5]], [1.0, -1.0], [0.25, 0.36])
    drawn, y = (v[0].numpy() for v in Truth(atoms, rule).sample(8000, [torch.Generator().manual_seed(0)]))
    model = GatedRegression(2, gate=rule.kind, origin="zero").fit(drawn, y)
    error = model.standard_errors_["temperature"]
    known = "nobody can tell" if np.isnan(error) else f"give or take {error:.2f}"
    print(f"{gate:12} temperature {model.temperature_:.2f}, {known}")
print({name: f"{activation_independence(name):.1e}" for name in ("tanh", "sigmoid", "gelu", "relu")})
