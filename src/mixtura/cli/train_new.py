"""``mixtura train CONFIG``: a model that does not exist yet, from a config file and the text it shall learn."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixtura.cli.work import domains_of
from mixtura.core.checkpoint import read_json, write_json

if TYPE_CHECKING:
    from mixtura.lm.model import MixturaConfig

__all__ = ["config_of", "is_config", "read_fields", "start"]

FACTS = "started-from.json"  # what a start was made of, to tell whether an interrupted run may go on from it


def is_config(source: str) -> bool:
    """Whether a source names a config file and not a checkpoint."""
    return source.endswith(".json")


def config_of(source: str) -> "MixturaConfig":
    """The config that a file describes; the errors are those of :func:`start`."""
    from mixtura.lm.model import MixturaConfig

    return MixturaConfig(**_fields(source))


def start(
    source: str, beside: Path, text: Sequence[Path] | None, seed: int, *, command: str, say: Callable[[str], None]
) -> Path:
    """Write an untrained checkpoint with a tokenizer of its own, and return its directory.

    Args:
        source: JSON file with fields of ``MixturaConfig``.
        beside: directory to write; one made of the same config, text and seed is used as it is.
        text: what the tokenizer learns its ``vocab_size`` pieces from.
        seed: draws the weights.
        command, say: for the model card, and for words to the user.
    Raises:
        ValueError: no JSON object, a field that the config does not have (it is named), or a value it refuses.
        FileNotFoundError: no such file.
    """
    from mixtura.lm import loading
    from mixtura.lm.model import MixturaForCausalLM
    from mixtura.lm.tokens import byte_pair_tokenizer

    fields = _fields(source)
    domains = domains_of(text)
    facts = {
        "fields": fields,
        "seed": seed,
        "characters": {n: sum(map(len, part.train)) for n, part in domains.items()},
    }
    if (beside / FACTS).exists() and read_json(beside / FACTS) == facts:
        return beside
    config = config_of(source)
    tokenizer = byte_pair_tokenizer([t for part in domains.values() for t in part.train], config.vocab_size)
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = MixturaForCausalLM(config)
    recipe = f"Drawn from {Path(source).name}, not trained."
    card = {"title": beside.name, "base": ["random weights"], "recipe": recipe, "command": command}
    loading.save(model, tokenizer, beside, card=card)
    write_json(beside / FACTS, facts)
    say(f"{source}: a new model with {len(tokenizer):,} tokens learned from {', '.join(domains)}")
    return beside


def read_fields(source: str, kind: Any, also: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a config that a JSON file holds; the errors are those of :func:`start`.

    Args:
        source: the file.
        kind: class of the config, whose fields are known.
        also: further names that are no error.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"{source} does not exist; give a JSON file with fields of {kind.__name__}, or a checkpoint"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{source} must hold a JSON object of config fields, got {type(fields).__name__}")
    known = {*kind().to_dict(), *also}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"{source} has unknown fields {unknown}; {kind.__name__} has {sorted(known)}")
    return fields


def _fields(source: str) -> dict[str, Any]:
    from mixtura.lm.model import MixturaConfig

    return read_fields(source, MixturaConfig)
