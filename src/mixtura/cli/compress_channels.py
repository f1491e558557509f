"""``compress --method mixllm``: output channels of two widths, and a picture of which ones got the larger."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mixtura.cli.checks import check_device, check_writable
from mixtura.cli.work import Say, domains_of, usage_of
from mixtura.core.measure import Meter
from mixtura.core.page import save_figure
from mixtura.lm import cost, loading

__all__ = ["compress_channels"]

PICTURE = "channels.svg"


def compress_channels(
    source: str,
    out: Path,
    text: Sequence[Path] | None,
    *,
    bits: float,
    options: Mapping[str, Any],
    device: str,
    dry_run: bool,
    command: str,
    say: Say,
) -> None:
    """Compress a checkpoint into ``out`` and say what its weights take and where the 8-bit channels are."""
    from mixtura.lm import compress as run
    from mixtura.lm.compress.channel_picture import high_shares, share_figure
    from mixtura.lm.compress.mixed_channels import average_bits, high_share_for, stored_bits

    check_device(device)
    check_writable(out, [source])
    high_share_for(bits)
    config = loading.load_config(source)
    size = cost.model_size(loading.empty_model(config))
    domains = domains_of(text)
    # A backward pass through activations costs two forward ones; rounding reads every block once more, and again in groups.
    tokens = 6 * options["samples"] * options["length"]
    # One layer's Hessians, and the activations and logits of one sample with their gradients.
    extra = 2 * size.total + 8 * options["length"] * config.get_text_config().vocab_size
    say(
        f"compress {source} to {bits:g} bits a weight: "
        f"{cost.estimate(size, bytes_per_parameter=(bits + 0.25) / 8, forward_tokens=tokens, extra_memory=extra)}"
    )
    if dry_run:
        return
    model, tokenizer = loading.load(source, dtype="quick", device=device)
    texts = {name: part.train for name, part in domains.items()}
    with Meter() as meter:
        small = run(model, tokenizer, texts, method="mixllm", bits=bits, inplace=True, **options)
    whole = stored_bits(small)
    card = {
        "title": out.name,
        "base": [source],
        "recipe": f"Quantized with mixtura by `mixllm` at {bits:g} bits ({', '.join(f'{k}={v}' for k, v in options.items())}). "
        "No engine but transformers with mixtura knows channels of two widths; `export_dense` writes plain weights.",
        "data": f"calibrated on {options['samples']} x {options['length']} tokens of {', '.join(domains)}",
        "command": command,
        "figures": {
            "parameters": size.total,
            "bits of a quantized weight": round(average_bits(small), 3),
            "with scales, zero points and order": round(whole, 3),
            "seconds": round(meter.seconds, 1),
        },
        "usage": usage_of(small, out),
        "source": "MixLLM: LLM Quantization with Global Mixed-precision between Output-features (arXiv 2412.14590)",
    }
    stored = getattr(config, "dtype", None)
    loading.save(small.to(stored) if isinstance(stored, torch.dtype) else small, tokenizer, out, card=card)
    save_figure(share_figure(small), out / PICTURE)
    shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in high_shares(small).items())
    say(f"channels at 8 bits: {shares} ({out / PICTURE} shows them layer by layer)")
    disk = loading.directory_bytes(out)
    say(
        f"{out}: {disk / 1e6:.1f} MB, {8 * disk / size.total:.2f} bits a weight over all {size.total / 1e6:.1f} M weights, "
        f"{whole:.2f} over those quantized"
    )
