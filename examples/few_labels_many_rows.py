"""Forty labels and many rows without one: when a latent of all rows helps, when it does not, and how to know.

python examples/few_labels_many_rows.py
"""

import numpy as np

from mixtura.data.digits import digits
from mixtura.density import FactorModel, GaussianMixture, PretrainedClassifier, pretraining_report
from mixtura.density.pretraining_theory import FactorTruth

images, digit = digits()
X = images.reshape(len(images), -1)
order = np.random.default_rng(0).permutation(len(X))
few, many, test = order[:80], order[80:1300], order[1300:]

latent = GaussianMixture(60, covariance="spherical", tol=1e-2, random_state=0)
model = PretrainedClassifier(latent).fit(X[few], digit[few], X[many])
print(f"{model.n_} labels, {model.m_} rows: {model.score(X[test], digit[test]):.1%} of unseen digits right")
print(pretraining_report(X[many], X[few], digit[few], latent=latent))

# The theory's own data: y depends on the factors of x, or on its noise.
for violated in (False, True):
    rng = np.random.default_rng(0)
    truth = FactorTruth.draw(rng, violated=violated)
    rows, y = truth.sample(160, rng)
    report = pretraining_report(truth.sample(10_000, rng)[0], rows, y, latent=FactorModel(5))
    print(f"\ny from the {'noise' if violated else 'factors'} of x\n{report}")
