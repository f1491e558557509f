"""The queue holds the last keys in order, the follower follows its closed form, and the loss is what NumPy computes."""

import numpy as np
import pytest
import torch
from torch import nn

from mixtura.core.contrast import KeyQueue, follow, queue_contrast


@pytest.mark.parametrize(("size", "batch"), [(12, 4), (10, 4), (3, 4), (7, 1)])
def test_it_holds_the_last_keys_in_their_order(size, batch):
    queue = KeyQueue(size, 2)
    keys = torch.arange(60, dtype=torch.float32)[:, None].expand(-1, 2)
    for step in range(60 // batch):
        queue.push(keys[step * batch : (step + 1) * batch])
        seen = (step + 1) * batch
        assert len(queue) == min(size, seen)
        assert torch.equal(queue.ordered(), keys[max(0, seen - size) : seen])
        assert sorted(queue.held()[:, 0].tolist()) == sorted(queue.ordered()[:, 0].tolist())


def test_the_follower_is_m_to_the_t_of_its_start():
    slow, fast = nn.Linear(3, 2), nn.Linear(3, 2)
    first = slow.weight.detach().clone()
    for _ in range(7):
        follow(slow, fast, 0.9)
    torch.testing.assert_close(slow.weight, 0.9**7 * first + (1 - 0.9**7) * fast.weight.detach(), rtol=1e-6, atol=1e-7)


def test_the_loss_equals_numpy_and_its_gradient_reaches_the_queries_alone():
    rng = np.random.default_rng(0)
    q, k, n = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 4), (3, 4), (5, 4)))
    queries = torch.from_numpy(q).requires_grad_()
    loss = queue_contrast(queries, torch.from_numpy(k), torch.from_numpy(n), 0.5)
    logits = np.concatenate([(q * k).sum(1, keepdims=True), q @ n.T], 1).astype(np.float64) / 0.5
    want = np.mean(np.log(np.exp(logits).sum(1)) - logits[:, 0])
    assert abs(loss.item() - want) < 1e-5 * abs(want)
    loss.backward()
    assert queries.grad.abs().sum() > 0


def test_smoothing_spreads_the_target():
    q, n = torch.eye(2), torch.zeros(1, 2)
    plain, even = queue_contrast(q, q, n, 1.0), queue_contrast(q, q, n, 1.0, label_smoothing=0.5)
    assert abs((even - plain).item() - 0.25) < 1e-6  # a quarter of the target on a logit that is 1 lower


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KeyQueue(0, 3), "size and width must be at least 1, got 0 and 3"),
        (lambda: KeyQueue(2, 3).push(torch.ones(1, 2)), r"keys must have shape \(B, 3\), got \(1, 2\)"),
        (lambda: queue_contrast(torch.ones(2, 3), torch.ones(1, 3), torch.ones(1, 3)), "queries and keys must share"),
        (lambda: queue_contrast(torch.ones(1, 3), torch.ones(1, 3), torch.ones(0, 3)), "negatives must have shape"),
        (lambda: queue_contrast(*[torch.ones(1, 3)] * 3, temperature=0), "temperature must be > 0, got 0"),
        (lambda: follow(nn.Linear(1, 1), nn.Linear(1, 1), 1.5), "momentum must be between 0 and 1, got 1.5"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
