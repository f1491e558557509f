"""The decoder: blocks made of the parts that the config names, a language-model head, and the losses of the gates.

Shapes: B batch, L positions, T = B L tokens, D width, E experts, V vocabulary.

It runs on transformers' own machinery: attention engines, masks, caches, ``generate``, gradient checkpointing, loading and
saving. ``import mixtura`` registers ``model_type="mixtura"`` with the Auto classes.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

import mixtura.lm.experts_forward  # noqa: F401 (registers experts_implementation="mixtura")
from mixtura.core.balance import BalancePer, balance_loss, device_split, router_z_loss
from mixtura.core.gates import top_k
from mixtura.core.shared_batch import SharedBatch
from mixtura.lm.model.attention import Attention, AttentionMixture, MixturaRotaryEmbedding, _AttentionCore
from mixtura.lm.model.config import MixturaConfig
from mixtura.lm.model.latent_attention import LatentAttention
from mixtura.lm.model.parts import Experts, ExpertsBlock, MixturaRMSNorm, MixturaRouter, make_feed_forward, make_norm
from mixtura.lm.token_loss import next_token_loss

__all__ = ["MixturaForCausalLM", "MixturaLayer", "MixturaModel", "routing_loss"]

ATTENTIONS = {"full": Attention, "latent": LatentAttention, "mixture": AttentionMixture}


class MixturaLayer(GradientCheckpointingLayer):
    """One block: attention and feed-forward part, in sequence or in parallel, normed before or after."""

    def __init__(self, config: MixturaConfig, layer_idx: int):
        super().__init__()
        self.block, self.after = config.block, config.norm_placement == "after"
        self.self_attn = ATTENTIONS[config.attention](config, layer_idx)
        self.mlp = make_feed_forward(config, layer_idx)
        if self.after:
            self.post_attention_layernorm = make_norm(config)
            self.post_feedforward_layernorm = make_norm(config)
        else:
            self.input_layernorm = make_norm(config)
            if config.block != "parallel":
                self.post_attention_layernorm = make_norm(config)

    def forward(self, hidden_states: Tensor, tokens: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(B, L, D) -> (B, L, D); ``tokens`` (B, L) is false at padding, for experts with a limit."""
        x = hidden_states
        if self.after:
            x = x + self.post_attention_layernorm(self.self_attn(x, **kwargs)[0])
            return x + self.post_feedforward_layernorm(self._fed(x, tokens))
        h = self.input_layernorm(x)
        attended = self.self_attn(h, **kwargs)[0]
        if self.block == "parallel":
            return x + attended + self._fed(h, tokens)
        if self.block == "parallel_two_norms":
            return x + attended + self._fed(self.post_attention_layernorm(x), tokens)
        x = x + attended
        return x + self._fed(self.post_attention_layernorm(x), tokens)

    def _fed(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        fed: Tensor = self.mlp(x) if tokens is None or not isinstance(self.mlp, ExpertsBlock) else self.mlp(x, tokens)
        return fed


class MixturaPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: MixturaConfig
    config_class = MixturaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MixturaLayer"]  # noqa: RUF012 (transformers reads these class attributes)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # transformers 5.23 decides this by searching the class's own source file for the decorator; ours stands in parts.py.
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(MixturaRouter, index=0),
        "hidden_states": MixturaLayer,
        "attentions": OutputRecorder(_AttentionCore, index=1),
    }

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """What is asked for; where nothing is, the plain loop for widths that torch's grouped product refuses."""
        # It wants rows of whole 16 bytes; multiples of 8 have them in 16-bit floats too, which autocast may make of float32.
        odd = self.config.hidden_size % 8 or self.config.moe_intermediate_size % 8
        return super().get_correct_experts_implementation(
            "eager" if requested_experts is None and odd else requested_experts
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MixturaRMSNorm) and module.weight is not None and module.kind == "rms_plus_one":
            init.zeros_(module.weight)
        if isinstance(module, (Experts, MixturaRouter, AttentionMixture)):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=std)


class MixturaModel(MixturaPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: MixturaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MixturaLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.rotary_emb = MixturaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Token ids (B, L) or embeddings (B, L, D) -> hidden states (B, L, D) and the cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.embed_scale != 1.0 and inputs_embeds is None:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype, device=x.device)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen)[None]
        make_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        mask = make_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        tables = self.rotary_emb(x, position_ids=position_ids)
        if self.config.capacity_factor or self.config.eval_capacity_factor:
            kwargs["tokens"] = _tokens(attention_mask, x)
        for layer in self.layers:
            x = layer(x, position_embeddings=tables, attention_mask=mask, past_key_values=past_key_values, **kwargs)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class MixturaForCausalLM(MixturaPreTrainedModel, GenerationMixin):
    """Language model built of the parts that its config names.

    In training with labels, or with ``output_router_logits``, ``loss`` is the mean token loss plus, summed over the layers
    with experts, ``router_aux_loss_coef`` times the load-balance loss, ``device_balance_coef`` times that between devices and
    ``router_z_loss_coef`` times the z loss; ``aux_loss`` is what was added. A gate of attention experts is soft and needs none of
    them.

    Example:
        >>> config = MixturaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_experts=4)
        >>> MixturaForCausalLM(config)(torch.tensor([[3, 1, 4]])).logits.shape
        torch.Size([1, 3, 64])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MixturaConfig):
        super().__init__(config)
        self.model = MixturaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shared_batch: SharedBatch | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Token ids (B, L) -> logits (B, kept positions, V); labels (B, L) hold -100 where no loss is wanted.

        ``shared_batch`` names the processes that hold the other rows: the mean of their losses is then the loss of all rows.
        """
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        gates = bool(self.config.num_experts) and (wanted or (self.training and labels is not None))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=gates,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        loss = aux = None
        if labels is not None and shared_batch is not None:
            loss = next_token_loss(logits, labels, shared=shared_batch)
        elif labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if gates:
            aux = routing_loss(
                outputs.router_logits, self.config, attention_mask, rows=len(logits), shared=shared_batch
            )
            loss = None if loss is None else loss + aux.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def save_pretrained(self, save_directory: str | Path, *args: Any, family: str | None = None, **kwargs: Any) -> None:
        """Write the model, as a family of transformers where ``family`` names one; that loads without mixtura.

        Args:
            save_directory: directory, made where it is not there.
            family: one of :data:`mixtura.lm.families.NATIVE`, such as ``"mixtral"``, ``"olmoe"``, ``"qwen2_moe"`` or
                ``"deepseek_v2"``; None writes our own format.
            args, kwargs: what transformers takes, for our own format.
        Raises:
            ValueError: an unknown family, or one that cannot express the config; the part is named.
        """
        if family is None:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if args or kwargs:
            raise TypeError(f"family={family!r} takes no further option, got {[*args, *kwargs]}")
        from mixtura.lm.families import build
        from mixtura.lm.families.save import save_checkpoint

        state = self.state_dict()
        native = build(
            self.config, lambda name: state[name].clone(), family=family, generation_config=self.generation_config
        )
        save_checkpoint(native, save_directory)


def _tokens(attention_mask: Any, x: Tensor) -> Tensor | None:
    """Where tokens and not padding stand, (B, L), of a mask (B, past and L); None where it does not say."""
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or attention_mask.shape[1] < x.shape[1]:
        return None
    return attention_mask[:, -x.shape[1] :].bool()


def routing_loss(
    router_logits: tuple[Tensor, ...],
    config: MixturaConfig,
    attention_mask: Tensor | None,
    *,
    rows: int = 1,
    shared: SharedBatch | None = None,
) -> Tensor:
    """Balance and z losses of all layers with experts, weighted as the config says; padding does not count.

    Args:
        router_logits: one tensor (T, E) a layer.
        config: names the factors and the number of chosen experts.
        attention_mask: (B, L), zero at padding, or None.
        rows: B, for a balance of each sequence.
        shared: processes that hold the other rows of the batch.
    Returns:
        Scalar, float32 or wider.
    Source: Switch Transformers (2101.03961), eq. 4; ST-MoE (2202.08906), eq. 5; summed over blocks as in BAM (2408.08274);
        between devices: DeepSeekMoE (2401.06066), eq. 15-17.
    """
    total = torch.zeros((), device=router_logits[0].device)
    between = config.device_groups if config.device_balance_coef else 0
    for logits_TE in router_logits:
        logits_TE = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
        mask_BL = None
        if attention_mask is not None and attention_mask.numel() == len(logits_TE):
            mask_BL = attention_mask.bool()
            rows = len(mask_BL)
        routing = top_k(logits_TE, config.num_experts_per_tok)
        shape = (rows, len(logits_TE) // max(rows, 1))
        total = total + balance_loss(
            routing.probs.unflatten(0, shape),
            routing.indices.unflatten(0, shape),
            expert=config.router_aux_loss_coef,
            device=config.device_balance_coef,
            groups=device_split(logits_TE.shape[-1], between) if between else None,
            per=cast(BalancePer, config.balance_per),
            mask=mask_BL,
            shared=shared,
        )
        if config.router == "sparsity":  # bounded already, and smaller scores would mean more active units
            continue
        seen_TE = logits_TE if mask_BL is None else logits_TE[mask_BL.reshape(-1)]
        total = total + config.router_z_loss_coef * router_z_loss(seen_TE, shared=shared)
    return total
