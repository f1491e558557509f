"""What the encoder-decoder is made of: the decoder's fields, and those of its two halves and of their experts' capacity."""

from typing import Any, ClassVar, cast

from mixtura.lm.model.config import MixturaConfig

__all__ = ["MultitaskMoEConfig"]

LAYOUTS = ("batch_major", "sequence_major")
PLAIN: dict[str, Any] = {  # parts of the decoder that the encoder-decoder doesn't have
    "attention": "full",
    "block": "sequential",
    "norm_placement": "before",
    "qk_norm": "none",
    "clip_qkv": None,
    "sliding_window": None,
    "shared_expert_intermediate_size": 0,
    "shared_combine": "sum",
    "router_float32": True,
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "logit_scale": 1.0,
    "lm_head_bias": False,
    "device_balance_coef": 0.0,
    "balance_per": "batch",
}


class MultitaskMoEConfig(MixturaConfig):
    """Shape of a :class:`~mixtura.lm.model.encoder_decoder.MultitaskMoEForConditionalGeneration`.

    Beside the fields of :class:`~mixtura.lm.model.MixturaConfig`, of which ``d_model``, ``heads``, ``ffn`` and ``selection`` are
    other names for ``hidden_size``, ``num_attention_heads``, ``intermediate_size`` and ``capacity_policy``:

    Attributes:
        encoder_layers, decoder_layers: layers of each half.
        num_experts: experts of a mixture; a list has one number for each mixture, those of the encoder first; 0: no mixtures.
        every: every so many-th feed-forward part of each half is a mixture, beginning with the ``every``-th layer.
        capacity_factor, eval_capacity_factor: 1 in training and 2 in evaluation here; padding is not counted.
        layout: order of tokens in which "first" is meant: ``batch_major`` (sentence after sentence) or ``sequence_major`` (all
            first positions, then all second ones, as fairseq and Megatron hold them).
        router_jitter: the gate's input is multiplied by uniform numbers in 1 +- jitter, in training; 0.01 in the paper's code.
        decoder_start_token_id: what the decoder begins with.
    Raises:
        ValueError: the field is named.
    Source:
        2109.10465, sec. 3.2 and 4; GShard (2006.16668) for experts in every second layer.
    """

    model_type = "mixtura_multitask"
    attribute_map: ClassVar[dict[str, str]] = {
        "d_model": "hidden_size",
        "heads": "num_attention_heads",
        "ffn": "intermediate_size",
        "selection": "capacity_policy",
    }

    is_encoder_decoder: bool = True
    hidden_size: int = 512
    intermediate_size: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 3
    num_experts: int | list[int] = 16
    num_experts_per_tok: int = 1
    norm_topk_prob: bool = False
    every: int = 2
    capacity_factor: float = 1.0
    eval_capacity_factor: float = 2.0
    layout: str = "batch_major"
    router_jitter: float = 0.0
    router_z_loss_coef: float = 0.0
    router_float32: bool = True
    tie_word_embeddings: bool = True
    decoder_start_token_id: int = 0
    experts_by_layer: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        for name in ("encoder_layers", "decoder_layers", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.num_hidden_layers = self.decoder_layers  # what caches are made for
        if isinstance(self.num_experts, (list, tuple)):
            self.experts_by_layer = list(self.num_experts)
            self.num_experts = max(self.experts_by_layer, default=0)
        super().__post_init__(**kwargs)
        _check(self)

    @property
    def encoder_experts(self) -> list[int]:
        """Experts of each layer of the encoder; 0 where it is dense."""
        return self._experts(self.encoder_layers, 0)

    @property
    def decoder_experts(self) -> list[int]:
        """Experts of each layer of the decoder; 0 where it is dense."""
        return self._experts(self.decoder_layers, self.encoder_layers // self.every)

    def _experts(self, layers: int, before: int) -> list[int]:
        numbers = self.experts_by_layer
        found = []
        for i in range(layers):
            mixture, rest = divmod(i + 1, self.every)
            if rest:
                found.append(0)
            else:
                found.append(cast(int, self.num_experts) if numbers is None else numbers[before + mixture - 1])
        return found


def _check(config: MultitaskMoEConfig) -> None:
    for name, plain in PLAIN.items():
        if getattr(config, name) != plain:
            raise ValueError(f"the encoder-decoder has {name}={plain!r} only, got {getattr(config, name)!r}")
    if config.layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {sorted(LAYOUTS)}, got {config.layout!r}")
    if not 0 <= config.router_jitter < 1:
        raise ValueError(f"router_jitter must be in [0, 1), got {config.router_jitter}")
    mixtures = config.encoder_layers // config.every + config.decoder_layers // config.every
    numbers = config.experts_by_layer
    if numbers is not None and (len(numbers) != mixtures or min(numbers, default=1) < 1):
        raise ValueError(f"num_experts must be a number, or {mixtures} of at least 1 for the mixtures, got {numbers}")
