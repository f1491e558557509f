"""Fifteen rows of a real table: a wide network whose error bars follow the targets, beside one whose scale is fixed."""

import numpy as np
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mixtura.data.samples import sample
from mixtura.density import InverseGamma, ScaleMixtureRegressor

X, y = sample("wine").predicting("alcohol")
order = np.random.default_rng(0).permutation(len(y))
train, test = order[:15], order[15:]

for name, prior in {"one scale": "fixed", "scale mixture": InverseGamma(2, 2)}.items():
    model = make_pipeline(StandardScaler(), ScaleMixtureRegressor(scale_prior=prior)).fit(X[train], y[train])
    regressor, Z = model[-1], model[0].transform(X[test])
    low, high = regressor.predict_distribution(Z).interval(0.95)
    inside = ((low <= y[test]) & (y[test] <= high)).mean()
    print(f"{name}: {-regressor.score_samples(Z, y[test]).mean():.3f} nats a target, {inside:.0%} inside the 95 % band")
