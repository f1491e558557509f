"""What a training does differently where its parameters lie in several processes; here, in one.

`training.fit` asks its team wherever the answer depends on that. A team of several processes is a subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["Alone", "first_not_finite"]


class Alone:
    """One process, which holds all parameters."""

    leads = True  # whether this process writes checkpoints and shows progress
    stream = 0  # number of the stream of chance that it draws from; other rows want another

    def name(self, name: str) -> str:
        """Name of a parameter in a checkpoint, which is that of one process."""
        return name

    def mean(self, loss: Tensor) -> Tensor:
        """The loss of the whole batch, the same in every process, without gradient."""
        return loss.detach()

    def first(self, place: int) -> int:
        """The smallest of the numbers that all processes give."""
        return place

    def reduce(self, model: nn.Module) -> None:
        """Make of what this process computed the gradients of the whole batch's loss."""

    def clip(self, model: nn.Module, trained: Mapping[str, nn.Parameter], limit: float) -> Tensor:
        """Scale the gradients to a global norm of at most ``limit``; the norm before."""
        return nn.utils.clip_grad_norm_(trained.values(), limit)

    def groups(self, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """Parameters that an optimizer may update in one call."""
        return [parameters]

    def whole(self, name: str, parameter: nn.Parameter, tensor: Tensor) -> Tensor:
        """All of a tensor shaped like a parameter (its weights, a moment), out of the processes' parts."""
        return tensor

    def part(self, name: str, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """This process's part of such a tensor."""
        return whole

    def settle(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """What is put in order after the optimizer's step number ``step``."""

    def explained(self, error: RuntimeError, kept: str) -> RuntimeError | None:
        """An error that says more than this one, where the team knows what it means."""
        return None


def first_not_finite(model: nn.Module, run: Callable[[], object], team: Alone) -> str | None:
    """Path of the first module that answers with NaN or infinity, in the first process, by the order of modules, where one does.

    Args:
        model: its modules are watched.
        run: a forward pass.
        team: asked which is the first over processes.
    """
    paths = [path for path, _ in model.named_modules()]
    found: list[int] = []  # in the order in which modules answer, those inside before those around them

    def watch(place: int) -> Callable[[nn.Module, object, object], None]:
        def look(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not bool(output.isfinite().all()):
                found.append(place)

        return look

    hooks = [module.register_forward_hook(watch(i)) for i, module in enumerate(model.modules())]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    place = team.first(found[0] if found else len(paths))
    return team.name(paths[place]) if place < len(paths) else None
