"""Five materials in a scene of which a tenth of the channels is spoiled: what squares make of it, and what norms do.

python examples/a_scene_with_spoiled_channels.py        # with earthlib installed, the materials are measured ones
"""

import numpy as np

from mixtura.data.spectra import library, made_up_library, synthesize_scene
from mixtura.data.texts import MissingData
from mixtura.vision import SpectralUnmixing
from mixtura.vision.unmixing import abundance_rmse, match_endmembers, sad

try:
    source = library("earthlib")
except MissingData as missing:
    print(missing)
    source = made_up_library()

scene = synthesize_scene(source, 5, 40, snr_db=20, outlier_channels=18, seed=3)
X, truth = scene.cube.reshape(-1, 180), scene.abundances.reshape(-1, 5)
good = ~scene.outliers
print(f"{source.source}: {', '.join(scene.names)}")

for name, options in (("squares, no sparsity (NMF)", {"robust": False, "lam": 0.0}), ("this method", {})):
    model = SpectralUnmixing(5, **options).fit(X)
    order = match_endmembers(model.endmembers_, scene.endmembers, bands=good)
    print(
        f"{name}: RMSE of shares {abundance_rmse(model.abundances_[:, order], truth):.3f}, "
        f"angle of spectra {sad(model.endmembers_, scene.endmembers, bands=good):.3f} rad"
    )

found = np.flatnonzero(model.channel_weight_ < 0.25 * np.median(model.channel_weight_))
print(f"channels that hardly count: {found.tolist()}; spoiled ones: {np.flatnonzero(scene.outliers).tolist()}")
