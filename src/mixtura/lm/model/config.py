"""What a decoder is made of: one flat config, as transformers keeps it, checked once.

Every dense family that :mod:`mixtura.lm.families` reads is one setting of these fields, and so is every mixture made of it.
"""

from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

__all__ = ["MixturaConfig"]

CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("rms", "rms_plus_one", "layer"),
    "norm_placement": ("before", "after"),
    "qk_norm": ("none", "head", "full"),
    "block": ("sequential", "parallel", "parallel_two_norms"),
    "attention": ("full", "latent", "mixture"),
    "attention_kv": ("expert", "shared"),
    "attention_routing": ("soft", "top1", "top2"),
    "balance_per": ("batch", "sequence"),
    "router": ("linear", "sparsity"),
    "router_statistics": ("diagonal", "full"),
    "shared_combine": ("sum", "coefficient"),
    "capacity_policy": ("random", "prefix", "group", "probs"),
}


class MixturaConfig(PreTrainedConfig):
    """Shape and parts of a :class:`~mixtura.lm.model.MixturaForCausalLM`.

    Beside the fields that every decoder in transformers has:

    Attributes:
        num_key_value_heads, head_dim: 0 for as many as queries, and for hidden_size / num_attention_heads.
        norm: ``rms`` (x / rms * w), ``rms_plus_one`` (x / rms * (1 + w), Gemma) or ``layer`` (mean taken off as well).
        norm_weight, norm_bias: whether the norms have a weight and a bias (OLMo-1 has neither).
        norm_placement: ``before`` normalises what a part reads, ``after`` what it writes (OLMo2).
        qk_norm: norm of queries and keys: none, over each ``head`` (Qwen3) or over the ``full`` width (OLMo2).
        block: ``sequential``; ``parallel``: attention and feed-forward read the same normed input; or
            ``parallel_two_norms``: the same input, each through a norm of its own (GPT-NeoX).
        mlp_gated: down(act(gate x) * up x) if true, else down(act(up x)).
        qkv_bias, o_bias, mlp_bias, lm_head_bias: which projections have a bias.
        embed_scale, logit_scale: constant factors on the embedding and on the logits.
        clip_qkv: queries, keys and values are clamped to [-clip_qkv, clip_qkv].
        no_rope_layers: layers that do not rotate queries and keys.
        sliding_window: positions a query sees, itself included; the same in every layer. ``None``: all.
        num_experts: feed-forward experts a layer; 0 is a dense model. A list has one number a layer, 0 for a dense one, and is
            kept as one number and ``dense_layers`` where all others agree.
        num_experts_per_tok, norm_topk_prob: experts a token visits, and whether their gates are made to sum to 1.
        moe_intermediate_size: hidden units an expert; 0 for ``intermediate_size``.
        shared_expert_intermediate_size: hidden units of a feed-forward part that every token visits; 0 for none.
        shared_combine: ``sum``: that part and the routed experts are added; ``coefficient``: weighted by a softmax over the
            two of a linear map of the token (DeepSpeed-MoE's released code).
        dense_layers: layers that keep a dense feed-forward part.
        router: ``linear`` (learned), or ``sparsity``: no parameters, a token visits the experts that would fire the fewest hidden
            units on it (MoE-X; with ``hidden_act="relu"`` it means that exactly). Its scores are bounded, so they get no z loss.
        router_statistics: of the sparsity router; see :mod:`mixtura.core.sparsity_gate`.
        capacity_factor, eval_capacity_factor: an expert takes at most max(ceil(T K / E * factor), min_capacity) of T tokens, in
            training and in evaluation; 0 for no limit. A pair over it gets nothing from that expert; padding that an
            attention mask marks takes no place.
        min_capacity: places that every expert has.
        capacity_policy, capacity_groups: which tokens stay in training: ``random`` ones, the first (``prefix``), the first of
            each of so many spans (``group``) or those with the largest gates (``probs``). In evaluation the first stay.
        router_float32: compute the gates' logits in float32 whatever the type of the weights.
        attention: ``full``; ``latent``: keys and values come out of one short vector a token, which is what the cache holds
            (DeepSeek-V2); or ``mixture``: ``attention_experts`` attentions, mixed by a gate.
        attention_kv: ``expert``: keys and values of each attention's own; ``shared``: one set.
        attention_routing: ``soft``: all attentions weigh in; ``top1``/``top2``: only the largest gates, as they are.
        kv_lora_rank, q_lora_rank: width of that vector, and of the queries' own; 0 for queries that have none.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: of a latent head: widths that are not and that are rotated, and of values.
        router_aux_loss_coef, router_z_loss_coef: factors of the load-balance and z losses, summed over layers.
        device_balance_coef, device_groups: factor of the balance between so many groups of experts, as they lie on devices.
        balance_per: whether balance is asked of all tokens of the ``batch`` together or of each ``sequence``.
    """

    model_type = "mixtura"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads this class attribute)

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 0
    head_dim: int = 0
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: Any = None
    sliding_window: int | None = None
    attention_dropout: float = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    norm: str = "rms"
    norm_weight: bool = True
    norm_bias: bool = False
    norm_placement: str = "before"
    qk_norm: str = "none"
    block: str = "sequential"
    mlp_gated: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    clip_qkv: float | None = None
    no_rope_layers: list[int] | None = None

    num_experts: int | list[int] = 0
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    shared_combine: str = "sum"
    dense_layers: list[int] | None = None
    router: str = "linear"
    router_statistics: str = "diagonal"
    attention: str = "full"
    attention_experts: int = 1
    attention_kv: str = "expert"
    attention_routing: str = "soft"
    kv_lora_rank: int = 0
    q_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    capacity_factor: float = 0.0
    eval_capacity_factor: float = 0.0
    min_capacity: int = 4
    capacity_policy: str = "random"
    capacity_groups: int = 4
    router_float32: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    device_balance_coef: float = 0.0
    device_groups: int = 0
    balance_per: str = "batch"

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.attention == "latent":  # what the rotary tables are made for
            self.head_dim = self.qk_rope_head_dim
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        self.no_rope_layers = list(self.no_rope_layers or [])
        self.dense_layers = list(self.dense_layers or [])
        if not isinstance(self.num_experts, int):
            self.num_experts, self.dense_layers = _by_layer(self.num_experts, self)
        _check(self)
        super().__post_init__(**kwargs)

    def sparse(self, layer: int) -> bool:
        """Whether a layer's feed-forward part is made of experts."""
        return self.experts_of(layer) > 0

    def experts_of(self, layer: int) -> int:
        """Routed experts of a layer's feed-forward part; 0 where it is dense."""
        if layer in (self.dense_layers or []):
            return 0
        return self.num_experts if isinstance(self.num_experts, int) else self.num_experts[layer]

    def expert_counts(self) -> list[int]:
        """The different numbers of experts that layers have, ascending; empty for a dense model."""
        return sorted({self.experts_of(layer) for layer in range(self.num_hidden_layers)} - {0})


def _by_layer(counts: Any, config: MixturaConfig) -> tuple[int | list[int], list[int]]:
    """A list of experts a layer, and the dense layers; one number where all layers with experts have as many."""
    counts = list(counts)
    if any(not isinstance(n, int) or n < 0 for n in counts):
        raise ValueError(f"num_experts must be whole numbers >= 0, got {counts}")
    if len(counts) != config.num_hidden_layers:
        raise ValueError(
            f"num_experts as a list must have one number for each of the {config.num_hidden_layers} layers, 0 for a dense "
            f"one, got {len(counts)}: {counts}"
        )
    dense = sorted({*(config.dense_layers or []), *(i for i, n in enumerate(counts) if n == 0)})
    kept = {n for i, n in enumerate(counts) if i not in dense}
    if not kept:
        return 0, []
    if len(kept) == 1:
        return kept.pop(), dense
    return [0 if i in dense else n for i, n in enumerate(counts)], dense


def _check(config: MixturaConfig) -> None:
    for name, known in CHOICES.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name} must be one of {list(known)}, got {getattr(config, name)!r}")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act must be one of {sorted(ACT2FN)}, got {config.hidden_act!r}")
    for name in ("dense_layers", "no_rope_layers"):
        if wrong := [i for i in getattr(config, name) if not 0 <= i < config.num_hidden_layers]:
            raise ValueError(f"{name} must lie in 0..{config.num_hidden_layers - 1}, got {wrong}")
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    if heads % kv:
        raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv}")
    partly = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0
    if config.attention != "latent" and config.head_dim % 2 and not partly:
        raise ValueError(
            f"head_dim must be even (positions turn pairs of its coordinates), got {config.head_dim}; give it, or a hidden_size "
            f"that {heads} heads divide into even widths"
        )
    if isinstance(config.num_experts, int) and config.num_experts < 0:
        raise ValueError(f"num_experts must be >= 0, got {config.num_experts}")
    fewest = min(config.expert_counts(), default=0)
    if fewest and not 1 <= config.num_experts_per_tok <= fewest:
        raise ValueError(
            f"num_experts_per_tok must be between 1 and num_experts={fewest}, got {config.num_experts_per_tok}"
        )
    if config.shared_expert_intermediate_size and not config.num_experts:
        raise ValueError("shared_expert_intermediate_size needs routed experts beside it; set num_experts")
    if config.router == "sparsity" and not (config.num_experts and config.norm_topk_prob):
        raise ValueError(
            "router='sparsity' needs num_experts, and norm_topk_prob=True: its weights are a softmax of the chosen"
        )
    if config.shared_combine != "sum" and not config.shared_expert_intermediate_size:
        raise ValueError(
            f"shared_combine={config.shared_combine!r} needs a part that every token visits; set shared_expert_intermediate_size"
        )
    for name in ("capacity_factor", "eval_capacity_factor", "min_capacity"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must be >= 0 (0 for no limit), got {getattr(config, name)}")
    if config.capacity_groups < 1:
        raise ValueError(f"capacity_groups must be at least 1, got {config.capacity_groups}")
    if config.attention_experts < 1:
        raise ValueError(f"attention_experts must be >= 1, got {config.attention_experts}")
    if config.attention == "mixture" and config.attention_routing == "top2" and config.attention_experts < 2:
        raise ValueError("attention_routing='top2' needs attention_experts >= 2, got 1")
    if config.attention == "latent":
        _check_latent(config)
    for name in ("router_aux_loss_coef", "router_z_loss_coef", "device_balance_coef"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must be >= 0, got {getattr(config, name)}")
    groups = config.device_groups
    if config.device_balance_coef and not (groups and all(n % groups == 0 for n in config.expert_counts())):
        raise ValueError(
            f"device_balance_coef needs device_groups that divide num_experts={config.num_experts}, got {config.device_groups}"
        )
    if config.block != "sequential" and config.norm_placement != "before":
        raise ValueError(f"block={config.block!r} is defined for norm_placement='before' only")


def _check_latent(config: MixturaConfig) -> None:
    for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        if getattr(config, name) < 1:
            raise ValueError(f"attention='latent' needs {name} >= 1, got {getattr(config, name)}")
    if config.qk_rope_head_dim % 2:
        raise ValueError(f"qk_rope_head_dim must be even, got {config.qk_rope_head_dim}")
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"attention='latent' has keys for every head: num_key_value_heads must be {config.num_attention_heads}, "
            f"got {config.num_key_value_heads}"
        )
    for name, plain in (("qk_norm", "none"), ("clip_qkv", None)):
        if getattr(config, name) != plain:
            raise ValueError(f"attention='latent' has no {name}; leave it at {plain!r}, got {getattr(config, name)!r}")
