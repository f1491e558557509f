"""Fit a density whose normalising constant nobody knows, and see which digits look strange to it."""

import numpy as np
import torch

from mixtura.data.digits import digits
from mixtura.density import EnergyDensity, ood_score
from mixtura.density.noise_laws import MixtureNoise

images, labels = digits()
flat = images.reshape(len(images), -1)
# Sixteen principal components of the digits 0 to 4: the constant pixels at the border have no density.
known, strange = flat[labels < 5], flat[labels >= 5]
centre = known.mean(0)
axes = np.linalg.svd(known - centre, full_matrices=False)[2][:16]
train, held_out, others = (part @ axes.T for part in (known[:600] - centre, known[600:] - centre, strange - centre))

law = MixtureNoise.fit(torch.from_numpy(train), n_components=10, scale=1.2)
model = EnergyDensity(noise=law, max_iter=300, lr=3e-3, width=64, depth=2).fit(train)
print(f"log Z = {model.log_partition_:.3f} +- {model.log_partition_se_:.3f}, {model.ess_:.0%} of the noise counts")
limit = np.quantile(ood_score(model, held_out), 0.95)
print(f"of the digits 5 to 9, {np.mean(ood_score(model, others) > limit):.0%} are stranger than 95% of the known ones")
