"""From a table to clusters: how many there are, what a few labels change, and what to ask a fitted mixture."""

import numpy as np
from sklearn.datasets import load_iris

from mixtura.density import GaussianMixture, select_components

X, species = load_iris(return_X_y=True)

model, curve = select_components(X, range(1, 9), random_state=0)
for n, bic in zip(curve.n_components, curve.bic, strict=True):
    print(f"{n} clusters: BIC {bic:.0f}" + ("  <- lowest" if n == curve.best else ""))

known = np.random.default_rng(0).random(len(X)) < 0.1
semi = GaussianMixture(3, random_state=0).fit(X, np.where(known, species, -1))
right = (semi.predict_class(X) == species)[~known].mean()
print(f"\nwith {known.sum()} labelled flowers, {right:.1%} of the others get their species")

petals = semi.gaussians_.condition([0, 1], [5.8, 2.7]).moments()[0]
print(f"a flower with sepals of 5.8 x 2.7 cm has petals of about {petals[0]:.1f} x {petals[1]:.1f} cm")

odd = semi.score_samples(X).argsort()[:3]
print(f"the least probable flowers are rows {odd.tolist()}")
semi.save("flowers-model")
