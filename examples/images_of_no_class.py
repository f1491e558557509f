"""Seven digits are known; letters are outliers to learn from; does that help with the other digits, and with photographs?"""

import numpy as np

from mixtura.data.digits import mnist_sample, patches
from mixtura.data.glyphs import glyphs
from mixtura.robust import OutlierExposedClassifier, holdout_split, ood_metrics

images, digit = mnist_sample()
images = np.round(images[:, None] * 255).astype(np.uint8)
known, held_out = holdout_split(digit, 7, split=0)
print(f"known: {known.tolist()}, held out: {held_out.tolist()}")

rng = np.random.default_rng(0)
ours = rng.permutation(np.flatnonzero(np.isin(digit, known)))[:1500]
train, test, unknown = ours[:700], ours[700:], np.flatnonzero(np.isin(digit, held_out))[::3]
photographs = np.round(patches(400, 28)[:, None] * 255).astype(np.uint8)
letters = np.round(glyphs(700, seed=1)[:, None] * 255).astype(np.uint8)

for objective in ("plain", "oe", "mixoe"):
    model = OutlierExposedClassifier(objective=objective, base_epochs=8, epochs=6, width=8)
    model.fit(images[train], digit[train], outliers=letters)
    right = (model.predict(images[test]) == digit[test]).mean()
    scores = [model.score_samples(rows) for rows in (images[test], images[unknown], photographs)]
    near, far = (ood_metrics(scores[0], others).auroc for others in scores[1:])
    print(f"{objective:6s} {right:.1%} right; AUROC of held-out digits {near:.3f}, of photographs {far:.3f}")
