"""Wines of three cultivars, of which two are half labelled: the third is found, and so is that there is just one more."""

import numpy as np

from mixtura.data.samples import sample
from mixtura.density import CategoryDiscovery, discovery_accuracy

wines = sample("wine")
X = (wines.X - wines.X.mean(0)) / wines.X.std(0)
told = (wines.y < 2) & (np.arange(len(X)) % 2 == 0)
y = np.where(told, wines.y, -1)

model = CategoryDiscovery(pca=5).fit(X, y)
score = discovery_accuracy(wines.y[~told], model.labels_[~told], known=[0, 1])
print(f"{told.sum()} of {len(X)} wines labelled with 2 cultivars; found {model.n_novel_} more")
print(
    f"right: {score.all:.1%} of the unlabelled wines, {score.old:.1%} of known cultivars, {score.new:.1%} of the new one"
)
for number, step in enumerate(model.history_, 1):
    moves = ", ".join(f"{move.kind} {move.clusters}" for move in step.moves) or "nothing moved"
    print(f"  round {number}: {step.n_clusters} classes, {moves}")
