"""What the claim chooses on, and what it measures."""

import numpy as np
import pytest
import torch
from torch import nn

from mixtura.claims.outlier_exposure import SCALES, Task, confidence_gap, digits_task, inner_task


def rows(images: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in images}


@pytest.fixture(scope="module")
def task() -> Task:
    return digits_task(SCALES["smoke"], 1)


def test_settings_are_chosen_on_known_classes_and_on_rows_to_train_on_alone(task: Task):
    inner = inner_task(task, (2, 5), 0)
    seen = rows(inner.x) | rows(inner.x_test) | rows(inner.fine)
    assert seen == rows(task.x)
    assert not seen & (rows(task.fine) | rows(task.x_test))
    assert rows(inner.fine) == rows(task.x[np.isin(task.y, (2, 5))])
    assert inner.n_classes == 5 and set(inner.y) == set(range(5))
    assert not rows(inner.x) & rows(inner.x_test)


def test_known_rows_test_rows_and_held_out_ones_are_disjoint_and_outliers_are_of_another_source(task: Task):
    assert task.n_classes == 7 and len(task.x) > len(task.x_test) > 0
    parts = [rows(task.x), rows(task.x_test), rows(task.fine), rows(task.outliers), rows(task.coarse)]
    assert sum(map(len, parts)) == len(set().union(*parts))


class Knows(nn.Module):
    """Confidence that is the mean pixel's share, bent by a power."""

    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = x.mean((1, 2, 3)).clamp(0, 1) ** self.power
        first, rest = share + (1 - share) / 3, (1 - share) / 3
        return torch.stack([first, rest, rest], 1).clamp(min=1e-9).log()


@pytest.mark.parametrize("op", ["mixup", "cutmix"])
def test_the_gap_is_nothing_where_confidence_is_the_share_and_else_the_distance(op):
    ones, zeros = np.ones((40, 1, 10, 10), np.float32), np.zeros((40, 1, 10, 10), np.float32)
    gap, means = confidence_gap(Knows(1), ones, zeros, 3, op, 0)
    assert gap < 1e-5 and len(means) == 11
    if op == "mixup":
        shares = np.arange(11) / 10
        want = np.abs((shares**3 - shares) * 2 / 3).mean()
        assert abs(confidence_gap(Knows(3), ones, zeros, 3, op, 0)[0] - want) < 1e-5
