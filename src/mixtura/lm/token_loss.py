"""Mean next-token loss, also of a batch that lies in several processes.

Shapes: B rows, L positions, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.core.shared_batch import SharedBatch

__all__ = ["IGNORED", "next_token_loss"]

IGNORED = -100  # label of a position where no loss is wanted


def next_token_loss(logits: Tensor, labels: Tensor, *, shared: SharedBatch | None = None) -> Tensor:
    """Mean over the wanted tokens of minus log probability, each predicted from those before it.

    Args:
        logits: shape (B, L, V).
        labels: token ids, shape (B, L); `IGNORED` where no loss is wanted. The first of a row is predicted by nothing.
        shared: processes that hold the other rows; the mean over processes of the loss is then that of all rows.
    Returns:
        Scalar in nats, float32 or wider; NaN where no token is wanted, and 0 where only this process has none.
    Example:
        >>> next_token_loss(torch.zeros(1, 3, 2), torch.tensor([[0, 1, -100]]))
        tensor(0.6931)
    """
    wide = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    targets = labels[:, 1:].to(logits.device)
    if shared is None:
        return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    total = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / shared.mean((targets != IGNORED).sum(), total)
