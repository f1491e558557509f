"""mixtura: everything that is mixed, and everything that is being taken apart.

The rooms are packages of their own (``import mixtura.lm``). Importing mixtura itself loads nothing heavy; it only asks
to be told when transformers is imported, so that ``AutoModelForCausalLM.from_pretrained`` then knows mixtura's models
and quantizers.
"""

from mixtura._register import when_transformers_is_imported

__version__ = "0.1.0"

when_transformers_is_imported()
