"""Two groups around one point, each wide where the other is flat: k-means and one shape for all fail, likelihood does not."""

import numpy as np
from sklearn.cluster import KMeans

from mixtura.density import AdjustedSDPClustering, kmeans_sdp

rng = np.random.default_rng(0)
truth = np.arange(200) % 2
widths = np.where(truth[:, None] == 0, [3.0, 3.0, 0.5, 0.5], [0.5, 0.5, 3.0, 3.0])
X = rng.normal(size=(200, 4)) * widths


def wrong(labels: np.ndarray) -> float:
    """Share of wrong labels, whichever group is called 0."""
    return min(np.mean(labels != truth), np.mean(labels == truth))


model = AdjustedSDPClustering(2, certify=True).fit(X)
print(f"k-means                {wrong(KMeans(2, n_init=10, random_state=0).fit_predict(X)):.1%} wrong")
print(f"its relaxation         {wrong(kmeans_sdp(X, 2)):.1%} wrong")
print(f"likelihood adjusted    {wrong(model.labels_):.1%} wrong, after {model.n_iter_} turns")
print(f"the last program's optimum is at most {max(model.gap_, 0):.3%} lower")
for step in model.history_:
    print(f"  objective {step.value:9.2f}   log likelihood {step.log_likelihood:9.2f}   {step.moved} labels moved")
