"""How a gate turns logits into weights, found by asking it.

Families differ in the score function and in whether the chosen scores are made to sum to one, and their configs name
neither in one way. So the gate is shown random tokens, and its weights are compared with what each score function would
give. The answer belongs to the gate, never to the text in hand: one confident token looks renormalised under a gate
that does not renormalise.

Shapes: T tokens, D width, E experts, K experts a token visits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FUNCTIONS", "Scoring", "find_scoring", "router_logits"]

# "identity" serves gates that report probabilities in the place of logits (Gemma 4).
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda logits: F.softplus(logits).sqrt(),
    "identity": lambda logits: logits,
}
PROBE_TOKENS = 256
TOLERANCE = 0.02  # relative; weights in bfloat16 carry less than three digits


@dataclass(frozen=True)
class Scoring:
    """What a gate does to its logits.

    Attributes:
        function: name in :data:`FUNCTIONS`; where no function explains the weights, the one that explains the choice.
        choice: name in :data:`FUNCTIONS` of what a correction is added to: the scores (DeepSeek-V3) or the logits (Kolibri).
        renormalises: whether the chosen scores are made to sum to a constant; None where the weights are something else
            (sparse mixers, weights shared out with shared experts) or the gate could not be asked.
    """

    function: str = "softmax"
    choice: str = "softmax"
    renormalises: bool | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores of all experts, float32, shape (T, E)."""
        return FUNCTIONS[self.function](logits.float())

    def ranked(self, logits: Tensor, correction: Tensor) -> Tensor:
        """What the gate takes the largest of, float32, shape (T, E)."""
        return FUNCTIONS[self.choice](logits.float()) + correction


@torch.no_grad()
def find_scoring(
    parent: nn.Module, gate: nn.Module, experts: nn.Module, n_experts: int, correction: Tensor | None, scale: Any
) -> Scoring:
    """Ask a gate what it does.

    Args:
        parent, gate, experts: the modules of a mixture layer.
        n_experts: E.
        correction: what the gate adds to its scores when it chooses, shape (E,).
        scale: what it multiplies weights by afterwards: a number, or one for each expert, shape (E,).
    """
    usual = "softmax" if correction is None else "sigmoid"  # with corrections: DeepSeek-V3 (2412.19437), eq. 15-16
    found = _answer(parent, gate, experts, n_experts)
    if found is None:
        return Scoring(usual, usual)
    logits_TE, weights_TK, indices_TK = found
    weights_TK = weights_TK / torch.as_tensor(scale, device=logits_TE.device).float().expand(n_experts)[indices_TK]
    # The usual function first, so that it wins where nothing tells them apart.
    names = sorted(FUNCTIONS, key=lambda name: name != usual)
    misses = {name: _misses(FUNCTIONS[name](logits_TE), correction, indices_TK) for name in names}
    fits: dict[tuple[str, bool], float] = {}
    for name in names:
        chosen_TK = FUNCTIONS[name](logits_TE).gather(-1, indices_TK)
        fits[name, True] = _unevenness(weights_TK / (chosen_TK / chosen_TK.sum(-1, keepdim=True)))
        fits[name, False] = _unevenness(weights_TK / chosen_TK)
    least = min(fits.values())
    # Among those that explain the weights equally well (one expert a token, all weights 1) the choice decides.
    explained = [key for key, off in fits.items() if off < min(TOLERANCE, least + 1e-3)]
    function, renormalises = min(explained, key=lambda key: misses[key[0]]) if explained else (None, None)
    choice = min(names, key=lambda name: (misses[name], name != function))
    return Scoring(function or choice, choice, renormalises)


def _misses(scores: Tensor, correction: Tensor | None, indices: Tensor) -> float:
    """Share of chosen experts that are not among the best by these scores."""
    ranked = scores if correction is None else scores + correction.float()
    best = ranked.topk(indices.shape[-1], dim=-1).indices
    return (best[:, None, :] != indices[:, :, None]).all(-1).float().mean().item()


def router_logits(output: Any, n_experts: int) -> Tensor:
    """Router logits (T, E) in a gate's output: the first floating tensor that has a column for every expert."""
    for part in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(part, Tensor) and part.is_floating_point() and part.shape[-1] >= n_experts:
            return part.reshape(-1, part.shape[-1])[:, :n_experts]
    raise TypeError(f"the gate returned no tensor with a column for each of {n_experts} experts")


def _unevenness(ratio: Tensor) -> float:
    """How far ratios are from being one number; nine in ten tokens decide, since scores that underflow say nothing."""
    off = (ratio / ratio.median() - 1).abs().flatten()
    return off.nan_to_num(nan=torch.inf).quantile(0.9).item()


class _EnoughError(Exception):
    """Ends a forward pass once its routing is known."""


def _answer(
    parent: nn.Module, gate: nn.Module, experts: nn.Module, n_experts: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits (T, E), weights (T, K) and indices (T, K) for random tokens, or None where the gate cannot be asked."""
    matrix = next((p for p in gate.parameters() if p.dim() == 2), None)
    if next(gate.parameters(), None) is None:  # a gate without parameters reads the experts, (E, H, D)
        matrix = next((p for p in experts.parameters() if p.dim() == 3), None)
    if matrix is None:
        return None
    device = torch.device("cpu") if matrix.is_meta else matrix.device
    x_TD = torch.randn(PROBE_TOKENS, matrix.shape[-1], generator=torch.Generator().manual_seed(0))
    for ask in (_ask_gate, _ask_parent):
        try:
            with _at_rest(parent):
                for _ in range(2):
                    found = ask(parent, gate, experts, x_TD.to(device, matrix.dtype), n_experts)
                    # Logits that spread by about 1 tell the score functions apart best.
                    x_TD = x_TD / found[0].std(-1).mean().clamp(1e-3, 1e3).cpu()
        # Gates take what their families please: another argument, another rank, a device they move to by themselves.
        except Exception:
            continue
        return None if found[0].is_meta or found[1].is_meta else found
    return None


def _ask_gate(
    parent: nn.Module, gate: nn.Module, experts: nn.Module, x: Tensor, n_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    # `forward` and not a call: hooks of others shall not see these tokens.
    output = gate.forward(x)
    logits = router_logits(output, n_experts)
    indices = next(p for p in output if isinstance(p, Tensor) and not p.is_floating_point() and len(p) == len(x))
    weights = next(
        p for p in output[1:] if isinstance(p, Tensor) and p.is_floating_point() and p.shape == indices.shape
    )
    return logits.float(), weights.float(), indices.long()


def _ask_parent(
    parent: nn.Module, gate: nn.Module, experts: nn.Module, x: Tensor, n_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    seen: list[Tensor] = []

    def before_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, indices, weights = (*args, *kwargs.values())
        seen.extend((weights.float(), indices.long()))
        raise _EnoughError

    hooks = [
        gate.register_forward_hook(lambda module, inputs, out: seen.append(router_logits(out, n_experts).float())),
        experts.register_forward_pre_hook(before_experts, prepend=True, with_kwargs=True),
    ]
    try:
        parent.forward(x[None])
    except _EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    logits, weights, indices = seen
    return logits, weights, indices


@contextmanager
def _at_rest(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, so that gates add no noise and count no tokens."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode
