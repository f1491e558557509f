"""Quantize any checkpoint to 4.4 bits a weight, and see which channels got 8: python channels_of_two_widths.py SRC DST TEXT..."""

import sys

from mixtura.data.texts import read_texts
from mixtura.lm import compress
from mixtura.lm.compress.channel_picture import high_shares
from mixtura.lm.compress.mixed_channels import stored_bits
from mixtura.lm.loading import load, save

source, destination, *paths = sys.argv[1:]
model, tokenizer = load(source)
small = compress(model, tokenizer, read_texts(paths), method="mixllm", bits=4.4, samples=16, length=256, inplace=True)
save(
    small,
    tokenizer,
    destination,
    card={"title": destination, "base": [source], "recipe": "MixLLM at 4.4 bits.", "command": " ".join(sys.argv)},
)
print(f"{stored_bits(small):.2f} bits a quantized weight, everything counted; channels at 8 bits:")
for kind, share in high_shares(small).items():
    print(f"  {kind:<10} {100 * share:5.1f} %")
