"""neural-tangents 0.6.5 under a current jax, which has lost a few names that its package file imports.

Only its analytic layers and its predictions are needed, and those work as they are once the package file is stepped over.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

__all__ = ["kernel_function", "load"]


def load(name: str) -> Any:
    """A module of ``neural_tangents._src``, in float64.

    Raises:
        ModuleNotFoundError: jax or neural-tangents is not installed (``pip install 'mixtura[bench]'``).
    """
    import jax
    import jax.core

    jax.config.update("jax_enable_x64", True)
    if "neural_tangents" not in sys.modules:
        spec = importlib.util.find_spec("neural_tangents")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("neural-tangents is not installed", name="neural_tangents")
        package = types.ModuleType("neural_tangents")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["neural_tangents"] = package
    if not hasattr(jax.core, "eval_context"):
        jax.core.eval_context = jax.ensure_compile_time_eval
    return importlib.import_module(f"neural_tangents._src.{name}")


def kernel_function(architecture: str, depth: int, activation: str, weight: float, bias: float, readout: float) -> Any:
    """neural-tangents' kernel of one of mixtura's architectures, built from its own layers.

    Args:
        architecture, depth, activation: as in ``WideNetworkKernel``.
        weight, bias, readout: variances.
    """
    linear, elementwise = load("stax.linear"), load("stax.elementwise")
    combinators, branching = load("stax.combinators"), load("stax.branching")
    scales = {"W_std": weight**0.5, "b_std": bias**0.5}
    serial, parallel = combinators.serial, combinators.parallel

    def act() -> Any:
        return elementwise.Relu() if activation == "relu" else elementwise.Erf()

    def dense() -> Any:
        return linear.Dense(512, **scales)

    def conv(stride: int = 1) -> Any:
        return linear.Conv(1, (3, 3), (stride, stride), "SAME", **scales)

    def summed(main: Any, shortcut: Any) -> Any:
        return serial(branching.FanOut(2), parallel(main, shortcut), branching.FanInSum())

    layers: list[Any] = []
    if architecture == "mlp":
        layers += [layer for _ in range(depth) for layer in (dense(), act())]
    elif architecture == "resnet":
        layers += [dense(), *(summed(serial(act(), dense()), linear.Identity()) for _ in range(depth)), act()]
    elif architecture == "cnn":
        layers += [layer for _ in range(depth) for layer in (conv(), act())] + [linear.Flatten()]
    else:
        layers.append(conv())
        for stride in (1, 2, 2, 2):
            layers.append(summed(serial(act(), conv(stride), act(), conv()), conv(stride)))
            layers += [summed(serial(act(), conv(), act(), conv()), linear.Identity()) for _ in range(depth - 1)]
        layers.append(linear.Flatten())
    return serial(*layers, linear.Dense(1, W_std=readout**0.5))[2]
