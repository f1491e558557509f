"""The encoder-decoder made of the decoder's parts, half of its feed-forward parts mixtures with a capacity.

- An encoder that sees both ways and a decoder that also reads the encoder, normed before every part; in both, every second
  feed-forward part is a mixture of which a token visits one expert, weighted by its softmax gate as it is.
- An expert takes at most ``capacity_factor`` times its even share of the tokens in training, chosen at random, anew in every
  layer and step; in evaluation twice that, the first to come. What does not fit skips the part.
- Padding is never routed, takes no place and is not counted.

Shapes: B batch, L positions (S of the source), T = B L tokens, D width, E experts, V vocabulary.
Source: 2109.10465, sec. 3 (capacity, random token selection) and sec. 4 (the model).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

import mixtura.lm.experts_forward  # noqa: F401 (registers experts_implementation="mixtura")
from mixtura.core.gates import Routing
from mixtura.core.shared_batch import SharedBatch
from mixtura.lm.model.attention import Attention, MixturaRotaryEmbedding
from mixtura.lm.model.decoder import MixturaPreTrainedModel, routing_loss
from mixtura.lm.model.limited_experts import LimitedExpertsBlock, wide
from mixtura.lm.model.multitask_config import MultitaskMoEConfig
from mixtura.lm.model.parts import Mlp, make_norm
from mixtura.lm.token_loss import IGNORED

__all__ = ["MultitaskMoEForConditionalGeneration", "Seq2SeqMoEOutput"]


@dataclass
class EncoderOutput(ModelOutput):
    """What the encoder found out."""

    last_hidden_state: Tensor | None = None  # (B, S, D)
    routing: tuple[Routing, ...] | None = None  # one a mixture layer, tokens batch-major
    attention_mask: Tensor | None = (
        None  # (B, S), which the decoder needs too; `generate` passes it on only where it was given
    )


@dataclass
class Seq2SeqMoEOutput(ModelOutput):
    """What the model computed, and how its tokens went."""

    loss: Tensor | None = None  # nats a label, plus what uneven gates cost in training
    logits: Tensor | None = None  # (B, L, V)
    past_key_values: Any = None
    aux_loss: Tensor | None = None  # part of the loss that the gates cost
    encoder_last_hidden_state: Tensor | None = None  # (B, S, D)
    routing: tuple[Routing, ...] | None = (
        None  # mixture layers of the encoder, then of the decoder; empty with a cached encoder
    )
    encoder_routing: tuple[Routing, ...] | None = None
    decoder_routing: tuple[Routing, ...] | None = None


class CrossAttention(Attention):
    """Attention of the decoder's positions to the encoder's output; keys and values are computed once a sequence."""

    def __init__(self, config: MultitaskMoEConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False

    def read(self, hidden_states: Tensor, memory: Tensor, mask: Tensor | None, cache: Any = None) -> Tensor:
        """(B, L, D) and the encoder's output (B, S, D) -> (B, L, D)."""
        lead = hidden_states.shape[:-1]
        q = self.q_proj(hidden_states).view(*lead, -1, self.head_dim).transpose(1, 2)
        if cache is not None and cache.is_updated.get(self.layer_idx):
            kept = cache.cross_attention_cache.layers[self.layer_idx]
            k, v = kept.keys, kept.values
        else:
            k, v = (
                p(memory).view(*memory.shape[:2], -1, self.head_dim).transpose(1, 2) for p in (self.k_proj, self.v_proj)
            )
            if cache is not None:
                k, v = cache.cross_attention_cache.update(k, v, self.layer_idx)
                cache.is_updated[self.layer_idx] = True
        y, _ = self._attend(q, k, v, None, mask, None)
        return cast(Tensor, self.o_proj(y.reshape(*lead, -1)))


class EncoderLayer(GradientCheckpointingLayer):
    """Attention both ways and a feed-forward part."""

    def __init__(self, config: MultitaskMoEConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.self_attn.is_causal = False
        self.mlp = _feed_forward(config, config.encoder_experts[layer_idx])
        self.input_layernorm, self.post_attention_layernorm = make_norm(config), make_norm(config)

    def forward(
        self, x: Tensor, tables: tuple[Tensor, Tensor], attention: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        """(B, S, D) -> (B, S, D), and how the tokens went if there are experts."""
        x = x + self.self_attn(self.input_layernorm(x), tables, attention)[0]
        return _fed(self.mlp, self.post_attention_layernorm, x, mask)


class DecoderLayer(GradientCheckpointingLayer):
    """Causal attention, attention to the encoder, and a feed-forward part."""

    def __init__(self, config: MultitaskMoEConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.cross_attn = CrossAttention(config, layer_idx)
        self.mlp = _feed_forward(config, config.decoder_experts[layer_idx])
        self.input_layernorm, self.post_attention_layernorm = make_norm(config), make_norm(config)
        self.cross_attention_layernorm = make_norm(config)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        attention: Tensor | None,
        mask: Tensor | None,
        memory: Tensor,
        memory_attention: Tensor | None,
        past_key_values: Any = None,
    ) -> tuple[Tensor, Routing | None]:
        """(B, L, D) and the encoder's output (B, S, D) -> (B, L, D), and how the tokens went if there are experts."""
        own = None if past_key_values is None else past_key_values.self_attention_cache
        x = x + self.self_attn(self.input_layernorm(x), tables, attention, own)[0]
        x = x + self.cross_attn.read(self.cross_attention_layernorm(x), memory, memory_attention, past_key_values)
        return _fed(self.mlp, self.post_attention_layernorm, x, mask)


def _feed_forward(config: MultitaskMoEConfig, n_experts: int) -> nn.Module:
    return LimitedExpertsBlock(config, n_experts) if n_experts else Mlp(config)


def _fed(part: nn.Module, norm: nn.Module, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Routing | None]:
    if isinstance(part, LimitedExpertsBlock):
        y, routing = part.mix(norm(x), mask)
        return x + y, routing
    return x + part(norm(x)), None


class MultitaskMoEPreTrainedModel(MixturaPreTrainedModel):
    """Loading, saving and initialisation, as for the decoder."""

    config: MultitaskMoEConfig
    config_class = MultitaskMoEConfig
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]  # noqa: RUF012 (transformers reads these class attributes)
    _can_record_outputs = {}  # noqa: RUF012


class Half(MultitaskMoEPreTrainedModel):
    """What encoder and decoder have alike: an embedding, layers, a final norm and rotary tables."""

    def __init__(self, config: MultitaskMoEConfig, layers: Sequence[nn.Module]):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(layers)
        self.norm = make_norm(config)
        self.rotary_emb = MixturaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def embedded(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, L, D)."""
        x: Tensor = self.embed_tokens(ids)
        scale = self.config.embed_scale
        return x if scale == 1.0 else x * torch.tensor(scale, dtype=x.dtype, device=x.device)


class Encoder(Half):
    """Token ids -> hidden states that know both sides."""

    main_input_name = "input_ids"

    def __init__(self, config: MultitaskMoEConfig):
        super().__init__(config, [EncoderLayer(config, i) for i in range(config.encoder_layers)])

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> EncoderOutput:
        """Token ids (B, S) or embeddings (B, S, D); the mask (B, S) is zero at padding and by default where the pad token is."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = inputs_embeds if input_ids is None else self.embedded(input_ids)
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        mask = None if attention_mask is None else attention_mask.bool()
        assert x is not None
        attention = create_bidirectional_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask)
        tables = self.rotary_emb(x, position_ids=torch.arange(x.shape[1], device=x.device)[None])
        routings = []
        for layer in self.layers:
            x, routing = layer(x, tables, attention, mask)
            routings += [routing] if routing is not None else []
        return EncoderOutput(last_hidden_state=self.norm(x), routing=tuple(routings), attention_mask=attention_mask)


class Decoder(Half):
    """Token ids and the encoder's output -> hidden states that know what came before."""

    def __init__(self, config: MultitaskMoEConfig):
        super().__init__(config, [DecoderLayer(config, i) for i in range(config.decoder_layers)])

    def forward(
        self,
        input_ids: Tensor,
        memory: Tensor,
        *,
        attention_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Token ids (B, L) and the encoder's output (B, S, D) -> hidden states (B, L, D), and how the tokens went.

        ``attention_mask`` (B, L), or (B, past and L), is zero at padding; by default padding is the pad token behind the first
        position, which is how finished sequences look while others are still generated.
        """
        config, x = self.config, self.embedded(input_ids)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        if attention_mask is not None:
            mask = attention_mask[:, -x.shape[1] :].bool()
        elif config.pad_token_id is not None:
            mask = (input_ids != config.pad_token_id) | (positions == 0)
        else:
            mask = None
        attention = create_causal_mask(
            config=config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            past_key_values=None if past_key_values is None else past_key_values.self_attention_cache,
            position_ids=positions,
        )
        memory_attention = create_bidirectional_mask(
            config=config, inputs_embeds=x, attention_mask=memory_mask, encoder_hidden_states=memory
        )
        tables = self.rotary_emb(x, position_ids=positions)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, tables, attention, mask, memory, memory_attention, past_key_values=past_key_values)
            routings += [routing] if routing is not None else []
        return self.norm(x), tuple(routings)


class MultitaskMoEForConditionalGeneration(MultitaskMoEPreTrainedModel, GenerationMixin):
    """Sequence to sequence, with experts in encoder and decoder.

    With labels, ``loss`` is the mean token loss; in training plus ``router_aux_loss_coef`` times the load-balance loss, summed
    over the mixture layers, of what the gates wanted (before capacity). ``routing`` holds every mixture layer's: of a token
    that found no place, and of padding, the index is E and the weight 0.

    Chance in training (random selection, jitter, dropout) comes from torch's own generator, or for selection from the one that
    :meth:`select_with` sets.

    Example:
        >>> shape = {"d_model": 32, "heads": 4, "ffn": 48, "encoder_layers": 2, "decoder_layers": 2, "num_experts": 4}
        >>> config = MultitaskMoEConfig(vocab_size=64, **shape)
        >>> model = MultitaskMoEForConditionalGeneration(config).eval()
        >>> out = model(input_ids=torch.tensor([[3, 1, 4]]), labels=torch.tensor([[1, 5]]))
        >>> out.logits.shape, len(out.routing)
        (torch.Size([1, 2, 64]), 2)
    """

    _tied_weights_keys = {  # noqa: RUF012
        "decoder.embed_tokens.weight": "encoder.embed_tokens.weight",
        "lm_head.weight": "encoder.embed_tokens.weight",
    }
    base_model_prefix = ""

    def __init__(self, config: MultitaskMoEConfig):
        super().__init__(config)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder, which ``generate`` runs once."""
        return self.encoder

    def get_decoder(self) -> nn.Module:
        """The decoder."""
        return self.decoder

    def get_input_embeddings(self) -> nn.Module:
        """The embedding that encoder, decoder and head share."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set it in encoder and decoder."""
        self.encoder.embed_tokens = self.decoder.embed_tokens = cast(nn.Embedding, value)

    def select_with(self, generator: torch.Generator | None) -> None:
        """Let random selection in training draw from this generator; None: torch's own, which gradient checkpointing needs."""
        for module in self.modules():
            if isinstance(module, LimitedExpertsBlock):
                module.generator = generator

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels (B, L) moved right by one, behind the start token; what has no loss becomes the pad token."""
        config = self.config
        pad = config.pad_token_id if config.pad_token_id is not None else config.decoder_start_token_id
        start = labels.new_full((len(labels), 1), config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, pad)], dim=1)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        shared_batch: SharedBatch | None = None,
        **kwargs: Any,
    ) -> Seq2SeqMoEOutput:
        """Source ids (B, S) and either labels or decoder ids (B, L) -> logits (B, L, V).

        Args:
            input_ids, inputs_embeds: the source; or ``encoder_outputs`` of an earlier pass.
            attention_mask: (B, S), zero at padding; by default where the pad token is.
            decoder_input_ids: by default the labels moved right.
            decoder_attention_mask: (B, L), zero at padding; by default where there are no labels.
            past_key_values: an ``EncoderDecoderCache``.
            labels: (B, L), -100 where no loss is wanted.
            use_cache: keep keys and values; by default where there are no labels.
            shared_batch: processes that hold the other rows: the mean of their losses is then the loss of all rows.
        Raises:
            ValueError: neither labels nor decoder ids, or gradient checkpointing with a generator of :meth:`select_with`.
        """
        again = self.training and (self.encoder.gradient_checkpointing or self.decoder.gradient_checkpointing)
        if again and any(getattr(module, "generator", None) is not None for module in self.modules()):
            # A layer that is computed again would draw other tokens than at first, and its gradients be wrong.
            raise ValueError("gradient checkpointing needs torch's own chance; call select_with(None) before training")
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("give labels or decoder_input_ids, got neither")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            if decoder_attention_mask is None:
                decoder_attention_mask = (labels != IGNORED).long()
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True
            )
        if attention_mask is None:
            attention_mask = getattr(encoder_outputs, "attention_mask", None)
        memory, encoder_routing = encoder_outputs[0], getattr(encoder_outputs, "routing", None) or ()
        if (labels is None if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        hidden, decoder_routing = self.decoder(
            decoder_input_ids,
            memory,
            attention_mask=decoder_attention_mask,
            memory_mask=attention_mask,
            past_key_values=past_key_values,
        )
        logits = self.lm_head(hidden)
        loss = aux = None
        if labels is not None:
            total = F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
            count = (labels != IGNORED).sum()
            if shared_batch is not None:
                loss = total / shared_batch.mean(count, total)
            else:
                items = kwargs.get("num_items_in_batch")
                loss = total / (count.clamp(min=1) if items is None else items)
            if self.training:
                aux = _balance(encoder_routing, self.config, attention_mask, shared_batch)
                aux = aux + _balance(decoder_routing, self.config, decoder_attention_mask, shared_batch).to(aux.device)
                loss = loss + aux.to(loss.device)
        return Seq2SeqMoEOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            aux_loss=aux,
            encoder_last_hidden_state=memory,
            routing=(*encoder_routing, *decoder_routing),
            encoder_routing=tuple(encoder_routing),
            decoder_routing=decoder_routing,
        )


def _balance(
    routings: tuple[Routing, ...], config: MultitaskMoEConfig, mask: Tensor | None, shared: SharedBatch | None
) -> Tensor:
    """What uneven gates cost, of what they wanted; 0 where every token is padding."""
    if not routings or (shared is None and mask is not None and not bool(mask.any())):
        return torch.zeros(())
    return routing_loss(tuple(r.logits for r in routings), config, mask, shared=shared)
