"""Arithmetic written as text, read by a small reader that knows numbers, names and a few functions, and nothing else.

Python's own parser makes the tree, every node of it is checked against a short list, and the tree is walked by hand:
nothing is ever given to ``eval`` or ``exec``.
"""

import ast
import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

__all__ = ["FUNCTIONS", "Expression"]

CONSTANTS = {"pi": math.pi, "e": math.e}
FUNCTIONS: Mapping[str, Callable[[Any], Any]] = {
    name: getattr(np, name) for name in ("sin", "cos", "tan", "exp", "log", "sqrt", "abs", "sinh", "cosh", "tanh")
}
BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
UNARY: Mapping[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
# Far beyond any formula a person writes, far below what makes the parser run out of stack.
LONGEST, DEEPEST = 4000, 80


class Expression:
    """An arithmetic expression over named coordinates.

    Args:
        text: numbers, the names, ``pi``, ``e``, ``+ - * / **``, brackets, and the functions in ``FUNCTIONS``.
        names: coordinates that may occur.
    Raises:
        ValueError: anything else in the text; it is named, with what would do.
    Example:
        >>> float(Expression("2*sin(pi*x) + x**2", ["x"])(x=0.5))
        2.25
    """

    def __init__(self, text: str | float, names: Iterable[str]) -> None:
        self.text = str(text)
        self.names = tuple(names)
        if len(self.text) > LONGEST:
            raise ValueError(f"expression of {len(self.text)} characters is longer than {LONGEST}")
        try:
            tree = ast.parse(self.text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{self.text!r} is no arithmetic expression ({error})") from None
        self._check(tree.body, 0)
        self._tree = tree.body

    def __repr__(self) -> str:
        return f"Expression({self.text!r}, {list(self.names)})"

    def __call__(self, functions: Mapping[str, Callable[[Any], Any]] = FUNCTIONS, /, **values: Any) -> Any:
        """The value at coordinates given by name: arrays or numbers of one shape.

        Args:
            functions: replace NumPy's, for instance by those of mpmath.
        Raises:
            ValueError: a division by zero or a power that is not real, in plain numbers.
        """
        return self._value(self._tree, functions, values)

    def on(self, *coordinates: Any) -> np.ndarray:
        """Values on arrays of one shape, in the order of ``names``; float64, NaN or infinite where undefined."""
        arrays = [np.asarray(c, dtype=np.float64) for c in coordinates]
        with np.errstate(all="ignore"):
            found = self(**dict(zip(self.names, arrays, strict=True)))
        return np.broadcast_to(np.asarray(found, dtype=np.float64), np.broadcast_shapes(*(a.shape for a in arrays)))

    def _check(self, node: ast.AST, depth: int) -> None:
        if depth > DEEPEST:
            raise ValueError(f"expression is nested more than {DEEPEST} deep")
        if isinstance(node, ast.Constant) and _is_number(node.value):
            return
        if isinstance(node, ast.Name):
            if node.id not in self.names and node.id not in CONSTANTS:
                known = [*self.names, *CONSTANTS]
                raise ValueError(f"{node.id!r} in {self.text!r} is not known; known names are {known}")
            return
        if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
            self._check(node.left, depth + 1)
            self._check(node.right, depth + 1)
            return
        if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
            self._check(node.operand, depth + 1)
            return
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called not in FUNCTIONS:
                raise ValueError(f"{called!r} in {self.text!r} is no known function; known are {list(FUNCTIONS)}")
            if len(node.args) != 1 or node.keywords or isinstance(node.args[0], ast.Starred):
                raise ValueError(f"{called} in {self.text!r} takes one argument")
            self._check(node.args[0], depth + 1)
            return
        raise ValueError(
            f"{ast.unparse(node)!r} in {self.text!r} is not allowed: numbers, names, + - * / **, brackets and "
            f"{list(FUNCTIONS)} are"
        )

    def _value(self, node: ast.AST, functions: Mapping[str, Callable[[Any], Any]], values: Mapping[str, Any]) -> Any:
        if isinstance(node, ast.Constant):
            # As a float: 9**9**9 in integers would never end.
            assert isinstance(node.value, (int, float))
            return np.float64(node.value)
        if isinstance(node, ast.Name):
            return values[node.id] if node.id in self.names else np.float64(CONSTANTS[node.id])
        if isinstance(node, ast.BinOp):
            left, right = (self._value(side, functions, values) for side in (node.left, node.right))
            return BINARY[type(node.op)](left, right)
        if isinstance(node, ast.UnaryOp):
            return UNARY[type(node.op)](self._value(node.operand, functions, values))
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        return functions[node.func.id](self._value(node.args[0], functions, values))


def _is_number(value: object) -> bool:
    # Compared, not converted: an integer of 400 digits is no float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
