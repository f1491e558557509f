"""Weight decay of two factors that acts on their product: the gradient of wd / 2 ||V U||² in place of wd U and wd V.

What a layer V (U x) does is in its product; decay of each factor instead pulls on the product's nuclear norm, and more the
larger the rank. The two gradients are V'V U and V UU', which cost 2 R² (I + O) multiply-adds from the small matrices V'V and
UU', or 3 R I O from the product itself; the cheaper way is taken.

Shapes: U (R, I) or a convolution (R, I, k, k), whose inputs count its kernel; V (O, R) or (O, R, 1, 1).
Source: Khodak et al. 2021 (2105.01029), sec. 3.3 (Frobenius decay); the authors of Sparse-IFT (2303.11525) take it in their
code for doped layers' V U and for factorized layers with nothing between the factors, and so do we.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixtura.core.masks import PREFIX, local, rows_of
from mixtura.core.sparse_layers import DopedSparse, FactorizedSparse

__all__ = ["JointDecay", "factor_pairs", "product_gradients"]

KNOWN = tuple(
    getattr(torch.optim, name) for name in ("SGD", "Adam", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta")
)


def product_gradients(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ||V U||² / 2 with respect to U and V.

    Args:
        u: shape (R, I) or (R, I, k, k).
        v: shape (O, R) or (O, R, 1, 1).
    Returns:
        Two tensors of the shapes and types of ``u`` and ``v``, computed in float32 at least.
    Example:
        >>> product_gradients(torch.tensor([[2.0]]), torch.tensor([[3.0]]))  # of 18 = (3 * 2)² / 2
        (tensor([[18.]]), tensor([[12.]]))
    """
    u_RI, v_OR = (t.detach().flatten(1) for t in (u, v))
    if u_RI.dtype != torch.float64:
        u_RI, v_OR = u_RI.float(), v_OR.float()
    (rank, inputs), outputs = u_RI.shape, len(v_OR)
    if 2 * rank * (inputs + outputs) < 3 * inputs * outputs:
        of_u, of_v = (v_OR.T @ v_OR) @ u_RI, v_OR @ (u_RI @ u_RI.T)
    else:
        w_OI = v_OR @ u_RI
        of_u, of_v = v_OR.T @ w_OI, w_OI @ u_RI.T
    return of_u.view(u.shape).to(u.dtype), of_v.view(v.shape).to(v.dtype)


def factor_pairs(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """The layers U and V of all doped and factorized layers of a model, by the path of the layer.

    Raises:
        ValueError: a factorized layer with a norm or an activation between the factors, which have no product then.
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, FactorizedSparse) and (module.between.norm, module.between.activation) != (
            "none",
            "none",
        ):
            raise ValueError(
                f"joint_decay acts on the product of two factors, and {path or type(module).__name__} has "
                f"norm={module.between.norm!r} and activation={module.between.activation!r} between them; convert with "
                "Between(norm='none', activation='none') or leave joint_decay out"
            )
        if isinstance(module, (DopedSparse, FactorizedSparse)) and module.u is not None and module.v is not None:
            found[path] = (module.u, module.v)
    return found


class JointDecay:
    """Turns an optimizer's weight decay of factors into decay of their products.

    The rate is that of the factors' parameter group, at every step, and goes the way it goes in that optimizer: into the
    gradient, or past it (AdamW).

    Args:
        model: has doped layers, or factorized ones with nothing between the factors; all factors are trained.
        optimizer: SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad or Adadelta of torch.
    Raises:
        ValueError: no such layer, a factor that is not trained, factors of one layer with different decay, no decay at all, or
            another optimizer, of which it is not known how it decays.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, KNOWN):
            raise ValueError(
                f"joint_decay knows how torch's {', '.join(k.__name__ for k in KNOWN)} and AdamW decay, and not how "
                f"{type(optimizer).__name__} does; take one of them"
            )
        self.pairs = factor_pairs(model)
        if not self.pairs:
            raise ValueError(f"{type(model).__name__} has no doped or factorized layer that joint_decay could act on")
        self._group = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for path, pair in self.pairs.items():
            groups = [self._group.get(id(layer.weight)) for layer in pair]
            if groups[0] is None or groups[1] is None:
                raise ValueError(
                    f"joint_decay needs both factors of {path} in the optimizer; train both or leave it out"
                )
            if groups[0]["weight_decay"] != groups[1]["weight_decay"]:
                raise ValueError(
                    f"the factors of {path} have weight_decay {groups[0]['weight_decay']:g} and "
                    f"{groups[1]['weight_decay']:g}; joint_decay needs one for both"
                )
        if not any(self._group[id(u.weight)]["weight_decay"] for u, _ in self.pairs.values()):
            raise ValueError("joint_decay has no effect, since the factors' weight_decay is 0; give it a value")

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Around the optimizer's step: what it decays too much is added before, or where it decays past the gradient, after."""
        after: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for pair in self.pairs.values():
                for layer, change in zip(pair, _changes(*pair), strict=True):
                    weight: nn.Parameter = layer.weight  # type: ignore[assignment]
                    if weight.grad is None:
                        continue  # the optimizer leaves it alone, too
                    group = self._group[id(weight)]
                    if group.get("decoupled_weight_decay"):
                        after.append((local(weight), change * (-group["lr"] * group["weight_decay"])))
                    else:
                        sign = -1 if group.get("maximize") else 1
                        local(weight.grad).add_(change, alpha=sign * group["weight_decay"])
        yield
        with torch.no_grad():
            for own, change in after:
                own.add_(change)


def _changes(u: nn.Module, v: nn.Module) -> list[Tensor]:
    """The product's gradient minus the factor, which the optimizer decays by, for this process's rows of U and V."""
    weights: list[Tensor] = [u.weight, v.weight]  # type: ignore[list-item]
    # Where the factors lie in several processes all of them are gathered, as the forward pass does.
    whole = [w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights]
    found = []
    for layer, weight, gradient in zip((u, v), weights, product_gradients(*whole), strict=True):
        change = rows_of("a factor", weight).of(gradient) - local(weight)
        mask = layer._buffers.get(f"{PREFIX}weight")
        found.append(change if mask is None else change * local(mask))
    return found
