"""Language models made of experts: build, upcycle, train, distill, compress, generate, look inside, set side by side.

>>> from mixtura.lm import upcycle, train, distill, compress, generate, inspect, compare     # doctest: +SKIP

Seven verbs over the modules of this room; each says in its docstring where the work is done. Heavy imports wait until a
verb is called.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

# Loaded before the verbs of the same name are defined: Python binds a subpackage to its parent once, at its first
# import, so from here on `mixtura.lm.upcycle` is the verb and `from mixtura.lm.upcycle import ...` still finds the package.
import mixtura.lm.compress
import mixtura.lm.upcycle  # noqa: F401
from mixtura._lazy import lazy_names

if TYPE_CHECKING:
    from mixtura.core.training import History
    from mixtura.lm.anatomy import find_moe
    from mixtura.lm.comparison import Comparison
    from mixtura.lm.decode.self_contrast import self_contrast
    from mixtura.lm.inspection import RoutingReport
    from mixtura.lm.students import TrainReport

__all__ = ["compare", "compress", "distill", "find_moe", "generate", "inspect", "self_contrast", "train", "upcycle"]

Texts = Sequence[str] | Mapping[str, Sequence[str]]


def upcycle(model_or_models: Any, *, method: str = "copy", **options: Any) -> Any:
    """Turn one dense model, or several branches of one, into a mixture; see :func:`mixtura.lm.upcycle.api.upcycle`.

    Args:
        model_or_models: dense model, path or hub id; for the branch methods several, by name or in a list.
        method: ``"copy"``, ``"fine-grained"``, ``"interpretable"``, ``"pyramid"``, ``"branch-attend-mix"`` or
            ``"branch-train-mix"``.
        options: ``n_experts``, ``top_k``, ``seed`` and what the method takes.
    Returns:
        A native transformers family where one has the structure, else ``MixturaForCausalLM``.
    """
    from mixtura.lm.upcycle.api import upcycle as run

    return run(model_or_models, method=method, **options)  # type: ignore[arg-type]


def train(model: Any, tokenizer: Any, texts: Texts, **options: Any) -> "History":
    """Train a model on text in place, its gates balanced; see :func:`mixtura.lm.training.train`."""
    from mixtura.lm.training import train as run

    return run(model, tokenizer, texts, **options)


def distill(teacher: Any, student: Any, batches: Any, **options: Any) -> "TrainReport":
    """Train a student in place, taught for a part of its training; see :func:`mixtura.lm.students.distill`.

    Args:
        teacher, student: models of one vocabulary; :func:`mixtura.lm.students.student_of` makes a student.
        batches: step -> token ids, shape (B, L).
        options: ``steps``, ``schedule``, ``lr`` and so on.
    """
    from mixtura.lm.students import distill as run

    return run(teacher, student, batches, **options)


def compress(model: Any, tokenizer: Any, texts: Texts, *, method: str = "mc-moe", **options: Any) -> Any:
    """Compress a language model; see :func:`mixtura.lm.compress.api.compress`.

    Args:
        model, tokenizer: a language model and its tokenizer.
        texts: calibration documents, or domain -> documents.
        method: ``"mc-moe"`` (mixtures of experts), ``"mixllm"`` or ``"sparse-attention"`` (any).
        options: ``bits``, ``prune``, ``density``, ``lengths`` and what else the method takes.
    """
    from mixtura.lm.compress.api import compress as run

    return run(model, tokenizer, texts, method=method, **options)


def compare(sources: Sequence[Any], texts: Mapping[str, Sequence[str]], **options: Any) -> "Comparison":
    """Measure checkpoints side by side: quality, bytes, speed; see :func:`mixtura.lm.comparison.compare`."""
    from mixtura.lm.comparison import compare as run

    return run(sources, texts, **options)


def generate(model: Any, tokenizer: Any, prompt: str, **options: Any) -> str:
    """Text that continues a prompt; see :func:`mixtura.lm.generation.generate`."""
    from mixtura.lm.generation import generate as run

    return run(model, tokenizer, prompt, **options)


def inspect(model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]], **options: Any) -> "RoutingReport":
    """Which experts fire on which domain and which tokens; see :func:`mixtura.lm.inspection.inspect`."""
    from mixtura.lm.inspection import inspect as run

    return run(model, tokenizer, texts, **options)


__getattr__ = lazy_names(
    __name__,
    {"find_moe": "mixtura.lm.anatomy", "self_contrast": "mixtura.lm.decode.self_contrast"},
)
