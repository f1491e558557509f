"""What learning from mixtures with outliers costs: its step, its peers, its metrics, and folders ten times as large.

A step of MixOE (drawn, mixed, two passes, backward) against the bare passes over as many images, and against outlier exposure
over as many images (B + B) and as usual (B + 2B). Outlier exposure is first shown to equal pytorch-ood's. Metrics are shown to
equal scikit-learn's. Bars: 1.05 of the bare passes, 1.1 of outlier exposure over as many images; memory of a folder ten times
as large within 1.1. CPU time, one thread. The peer: pip install --no-deps pytorch-ood

    python benchmarks/outlier_exposure.py           # writes docs/benchmarks/outlier_exposure.json
    python benchmarks/outlier_exposure.py --short   # two rounds, to try it; writes nothing
"""

import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _side_by_side import Ratio, alternate, ratio, versions, write_record
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import nn

from mixtura.core.measure import Meter, resident_memory
from mixtura.data.images import batches, image_folder
from mixtura.robust.ood import ood_metrics
from mixtura.robust.outlier_exposure import MixtureOutlierExposure, OutlierExposure
from mixtura.robust.outlier_networks import dense_network, image_network

K, B = 10, 32
BAR_BARE, BAR_OE, BAR_MEMORY = 1.05, 1.1, 1.1
NOTES = (
    "What MixOE adds to its passes is about twenty small operations and the mixing, one pass over the batch: nothing beside a "
    "convolutional network, a good part of a step of a small dense one. pytorch-ood's losses are timed on ready logits, as "
    "they are called; ours are given the same logits by a model that returns them."
)


def peer_loss() -> Any:
    """pytorch-ood's outlier exposure; the package imports torchvision, of which its losses use nothing, so a stand-in does."""

    class Meta(type):
        def __getattr__(cls, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return cls

    class Anything(metaclass=Meta):
        pass

    class Empty(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything

    for name in ("", ".models", ".models.resnet", ".transforms", ".transforms.functional"):
        sys.modules.setdefault(f"torchvision{name}", Empty(f"torchvision{name}"))
    from pytorch_ood.loss import OutlierExposureLoss

    return OutlierExposureLoss


def row_of(case: str, found: Ratio, bar: float | None = None) -> dict[str, Any]:
    row = {"case": case, "ratio": str(found), "bar": "" if bar is None else bar, "met": ""}
    if bar is not None:
        row["met"] = bool(found.median <= bar)
    print(row, flush=True)
    return row


def steps(
    name: str, model: nn.Module, shape: tuple[int, ...], mixes: tuple[str, ...], rounds: int
) -> list[dict[str, Any]]:
    """A step of MixOE beside the bare passes and beside outlier exposure."""
    x, z, y = torch.randn(B, *shape), torch.randn(2 * B, *shape), torch.randint(K, (B,))
    generator = torch.Generator().manual_seed(0)
    oe = OutlierExposure(K)

    def bare() -> None:
        model.zero_grad()
        (model(x).sum() + model(z[:B]).sum()).backward()

    def step(objective: nn.Module, outliers: torch.Tensor) -> None:
        model.zero_grad()
        objective(model, x, y, outliers, generator=generator).backward()

    rivals = {"bare": bare, "oe, as many": lambda: step(oe, z[:B]), "oe, twice": lambda: step(oe, z)}
    for mix in mixes:
        objective = MixtureOutlierExposure(K, mix)  # type: ignore[arg-type]
        rivals[mix] = lambda objective=objective: step(objective, z)
    times = alternate(rivals, rounds, 3, time.process_time)
    rows = []
    for mix in mixes:
        rows.append(row_of(f"{name}: {mix} over two bare passes", ratio(times, mix, "bare"), BAR_BARE))
        rows.append(row_of(f"{name}: {mix} over OE on as many images", ratio(times, mix, "oe, as many"), BAR_OE))
        rows.append(row_of(f"{name}: {mix} over OE with twice the outliers", ratio(times, mix, "oe, twice")))
    return rows


def against_pytorch_ood(rounds: int) -> dict[str, Any]:
    """Outlier exposure of both libraries on the same logits, forward and backward."""
    n, k = 512, 1000
    logits = torch.randn(3 * n, k, requires_grad=True)
    y = torch.randint(k, (n,))
    target = torch.cat([y, torch.full((2 * n,), -1)])
    # Theirs is the mean over all 3 n rows of CE + alpha OE, ours the mean over known ones plus beta the mean over outliers.
    theirs, ours = peer_loss()(alpha=0.5), OutlierExposure(k, 1.0)
    first, second = torch.zeros(n, 1), torch.zeros(2 * n, 1)

    def run_theirs() -> torch.Tensor:
        logits.grad = None
        loss = 3 * theirs(logits, target)
        loss.backward()
        return loss.detach()

    def run_ours() -> torch.Tensor:
        logits.grad = None
        loss = ours(lambda both: logits, first, y, second)
        loss.backward()
        return loss.detach()

    torch.testing.assert_close(run_ours(), run_theirs())
    grad = logits.grad.clone()  # type: ignore[union-attr]
    run_ours()
    torch.testing.assert_close(logits.grad, grad)
    times = alternate({"ours": run_ours, "pytorch-ood": run_theirs}, rounds, 3, time.process_time)
    return row_of(f"OE on {3 * n} x {k} logits over pytorch-ood's", ratio(times, "ours", "pytorch-ood"))


def metrics(rounds: int) -> dict[str, Any]:
    """All five figures of 400,000 scores, beside scikit-learn's."""
    rng = np.random.default_rng(0)
    ours, others = rng.normal(1, 1, 200_000), rng.normal(0, 1, 200_000)
    values, positive = np.concatenate([ours, others]), np.repeat([1, 0], 200_000)

    def sklearn() -> tuple[float, float, float, float]:
        _, tpr, thresholds = roc_curve(positive, values, drop_intermediate=False)
        threshold = thresholds[np.argmax(tpr >= 0.95)]
        precision = average_precision_score(positive, values), average_precision_score(1 - positive, -values)
        return roc_auc_score(positive, values), *precision, float((others < threshold).mean())

    found = ood_metrics(ours, others)
    np.testing.assert_allclose((found.auroc, found.aupr_in, found.aupr_out, found.tnr), sklearn(), atol=1e-12)
    times = alternate({"ours": lambda: ood_metrics(ours, others), "sklearn": sklearn}, rounds, 1, time.process_time)
    return row_of("metrics of 400,000 scores over scikit-learn's", ratio(times, "ours", "sklearn"))


def folders(n: int) -> list[dict[str, Any]]:
    """Memory and time of reading a folder of photographs' size, and of one ten times as large."""
    rng = np.random.default_rng(0)
    rows, peaks, seconds = [], [], []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        noise = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((800, 600)).save(root / "0.jpg", quality=85)
        one = (root / "0.jpg").read_bytes()
        for i in range(1, 10 * n):
            (root / f"{i}.jpg").write_bytes(one)
        folder = image_folder(root)
        for part in (folder.take(np.arange(n)), folder):
            before, start = resident_memory(), time.process_time()
            with Meter() as meter:
                total = sum(len(batch.rows) for batch in batches(part, 64))
            assert total == len(part)
            peaks.append(max(meter.peak_bytes, 1))
            seconds.append(time.process_time() - start)
            print(
                f"{total} images: {total / seconds[-1]:.0f} a second, {(meter.peak_bytes - before) / 1e6:.1f} MB more"
            )
    grown = peaks[1] / peaks[0]
    case = f"reading {10 * n} photographs (800 x 600) over {n}: peak memory of the process"
    rows.append(row_of(case, Ratio(grown, grown, grown), BAR_MEMORY))
    per_image = (seconds[1] / 10) / seconds[0]
    rows.append(
        row_of(f"the same: time an image ({10 * n / seconds[1]:.0f} a second)", Ratio(per_image, per_image, per_image))
    )
    return rows


def main() -> None:
    """Measure and write the record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    short = "--short" in sys.argv
    rounds = 2 if short else 21
    rows = steps("dense, 196-256-256-10", dense_network(196, K), (1, 14, 14), ("mixup", "cutmix"), rounds)
    rows += steps("convolutions, 3 x 64 x 64", image_network(3, K, width=16), (3, 64, 64), ("mixup", "cutmix"), rounds)
    rows += [against_pytorch_ood(rounds), metrics(rounds), *folders(20 if short else 200)]
    if short:
        return
    payload = {
        "title": "Learning from mixtures with outliers",
        "what": (
            f"CPU time over the rival's, {B} known images a step, one thread; median of {rounds} rounds with the lowest and the "
            "highest. Reading folders: one round."
        ),
        "rows": rows,
        "notes": NOTES,
        "peers": versions("pytorch-ood", "scikit-learn"),
    }
    write_record("outlier_exposure", payload)


if __name__ == "__main__":
    main()
