"""The cache of a model with spans: for every head the sink and a ring of its window, and no more.

Heads of a layer that keep the same share one pair of tensors. Keys keep the positions they were turned to; a ring of W whole
blocks holds all that a query in the newest block may see, and a few stale tokens, which the mask hides. Which token stands in
which slot follows from the number of tokens seen, so no positions are stored.

Shapes: B rows, G key/value heads, g of a group, S slots, C width of a head.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from mixtura.lm.attention.span_mask import HeadGroup, attend, grouped, head_groups, merged, prompt_attention, visible
from mixtura.lm.attention.span_rules import SpanPlan, span_of

__all__ = ["Held", "SpanCache", "SpanLayer"]


class Held(NamedTuple):
    """New keys or values on their way to the attention, and the layer that will keep them."""

    layer: "SpanLayer"
    states: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the new states; libraries that wrap every attention function ask for it (kvpress)."""
        return self.states.shape


class SpanLayer(CacheLayerMixin):
    """Keys and values of one layer.

    Args:
        groups: heads by window.
        block: tokens a block.
        length: total tokens the cache is made for.
        backend: of the prompt's attention.
    """

    is_sliding = False
    is_croppable = False

    def __init__(self, groups: list[HeadGroup], block: int, length: int, backend: str = "windowed"):
        super().__init__()
        self.groups, self.block, self.length, self.backend = groups, block, length, backend
        self.slots = [int(span_of(group.window, length, block)) for group in groups]
        self.kept: list[tuple[Tensor, Tensor]] = []  # by group, (B, g, S, C)
        self.columns = 0  # tokens that came in, padding too
        self.seen: int | Tensor = 0  # real tokens, the same for all rows or (B,)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for everything that will be kept."""
        self.dtype, self.device = key_states.dtype, key_states.device
        b, _, _, c = key_states.shape
        width = value_states.shape[-1]
        self.kept = [
            (key_states.new_zeros(b, len(group.heads), s, c), value_states.new_zeros(b, len(group.heads), s, width))
            for group, s in zip(self.groups, self.slots, strict=True)
        ]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Hand new keys and values to the attention, which reads them with those kept and then keeps them."""
        return Held(self, key_states), Held(self, value_states)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scale: float) -> Tensor:
        """Output of all heads, (B, H, Q, C); the new tokens are kept."""
        n = key.shape[2]
        if self.columns + n > self.length:
            raise ValueError(
                f"this cache was made for {self.length} tokens and would hold {self.columns + n}; say the length beforehand: "
                f"past_key_values=SpanCache(model, {self.columns + n})"
            )
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        positions = self._positions(attention_mask, n, key.device)
        if self.columns == 0:
            out = prompt_attention(
                query, key, value, positions, self.groups, self.block, scale=scale, backend=self.backend
            )
            self._keep(key, value, positions)
        elif n == 1 and not isinstance(self.seen, Tensor) and positions.dim() == 1:
            out = self._one(query, key, value, scale)
        else:
            out = self._several(query, key, value, positions, scale)
            self._keep(key, value, positions)
        self.columns += n
        if positions.dim() == 1 and not isinstance(self.seen, Tensor):
            self.seen += n
        else:
            self.seen = self._counts(key.shape[0], key.device) + (positions.expand(len(key), n) >= 0).sum(-1)
        return out

    def _positions(self, attention_mask: Tensor | None, n: int, device: torch.device) -> Tensor:
        """Numbers of the new real tokens, shape (n,) or (B, n)."""
        if attention_mask is None and not isinstance(self.seen, Tensor):
            return torch.arange(self.seen, self.seen + n, device=device)
        if attention_mask is None:
            assert isinstance(self.seen, Tensor)
            return self.seen[:, None] + torch.arange(n, device=device)
        real = attention_mask[:, -n:].to(device)
        return torch.where(real, self._counts(len(real), device)[:, None] + real.long().cumsum(-1) - 1, -1)

    def _counts(self, rows: int, device: torch.device) -> Tensor:
        return self.seen if isinstance(self.seen, Tensor) else torch.full((rows,), self.seen, device=device)

    def _one(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """One token a row, all rows equally long: kept in place, then read."""
        assert isinstance(self.seen, int)
        parts = []
        for group, slots, (keys, values) in zip(self.groups, self.slots, self.kept, strict=True):
            at = self.seen if self.seen < slots else self.block + (self.seen - self.block) % (slots - self.block)
            keys[:, :, at], values[:, :, at] = (
                group.of(key, len(key[0]))[:, :, 0],
                group.of(value, len(value[0]))[:, :, 0],
            )
            filled = min(slots, self.seen + 1)
            mask = _newest_sees(self.seen, group.window, self.block, slots, filled, key.device)
            q = grouped(query, group, key.shape[1])
            parts.append(attend(q, keys[:, :, :filled], values[:, :, :filled], mask, scale=scale))
        return merged(iter(parts), self.groups, query)

    def _several(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, scale: float) -> Tensor:
        """New tokens of any number, rows of any length: those kept and the new ones are read together."""
        parts = []
        total = key.shape[1]
        counts = self.seen if isinstance(self.seen, Tensor) else torch.tensor(self.seen, device=key.device)
        for group, slots, (keys, values) in zip(self.groups, self.slots, self.kept, strict=True):
            old = slot_positions(counts, slots, self.block)
            new = positions if old.dim() == positions.dim() else positions.expand(*old.shape[:-1], -1)
            old = old if old.dim() == new.dim() else old.expand(len(new), -1)
            mask = visible(new, torch.cat([old, new], -1), group.window, self.block)
            both = [torch.cat([kept, group.of(x, total)], 2) for kept, x in ((keys, key), (values, value))]
            parts.append(attend(grouped(query, group, total), both[0], both[1], mask, scale=scale))
        return merged(iter(parts), self.groups, query)

    def _keep(self, key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Write the new tokens that stay."""
        total, b = key.shape[1], len(key)
        positions = positions.expand(b, -1)
        last = positions.amax(-1, keepdim=True)
        columns = torch.arange(positions.shape[1], device=key.device).expand(b, -1)
        for i, (group, slots, (keys, values)) in enumerate(zip(self.groups, self.slots, self.kept, strict=True)):
            at = slot_of(positions, slots, self.block)
            stays = (positions >= 0) & ((positions < self.block) | (positions > last - (slots - self.block)))
            # What does not stay goes to a slot past the end, which is cut off: no two tokens then want the same one.
            source = torch.full((b, slots + 1), -1, device=key.device)
            source.scatter_(1, torch.where(stays, at, slots), columns)
            source = source[:, :slots]
            take, fresh = source.clamp(min=0)[:, None, :, None], (source >= 0)[:, None, :, None]

            def written(
                old: Tensor, x: Tensor, group: HeadGroup = group, take: Tensor = take, fresh: Tensor = fresh
            ) -> Tensor:
                mine = group.of(x, total)
                return torch.where(fresh, mine.gather(2, take.expand(-1, mine.shape[1], -1, mine.shape[-1])), old)

            self.kept[i] = (written(keys, key), written(values, value))

    def get_seq_length(self) -> int:
        """Tokens that came in, padding too."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that a mask of padding speaks of."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that the cache is made for."""
        return self.length

    def offload(self) -> None:
        """Not supported: what is kept is small."""
        raise ValueError("a cache of spans is not offloaded; it is small as it is")

    def prefetch(self) -> None:
        """Nothing is ever away."""

    def reset(self) -> None:
        """Forget everything."""
        self.columns, self.seen, self.kept, self.is_initialized = 0, 0, [], False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what left the window cannot come back."""
        raise ValueError(
            "a cache of spans cannot be taken back, since what left a window is gone; assisted and contrastive decoding need that"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, as beam search wants them."""
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some rows."""
        self._rows(lambda x: x[indices])

    def _rows(self, change: Any) -> None:
        self.kept = [(change(keys), change(values)) for keys, values in self.kept]
        if isinstance(self.seen, Tensor):
            self.seen = change(self.seen)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept."""
        return sum(x.numel() * x.element_size() for pair in self.kept for x in pair)


class SpanCache(Cache):
    """Keys and values of a model with spans, for calls of up to ``length`` tokens, prompt and answer together.

    Args:
        model: a converted model, or its plan.
        length: total tokens; it sets the spans, once for the whole call.
        backend: of the prompt's attention; a model's own where a model is given.
    Raises:
        ValueError: a length past what the plan was made for.
    """

    def __init__(self, model: Any, length: int, *, backend: str = "windowed"):
        plan = model if isinstance(model, SpanPlan) else SpanPlan.of(model.config.mixtura_spans)
        if not isinstance(model, SpanPlan):
            backend = model.config.mixtura_spans["backend"]
        self.plan, self.length = plan, length
        windows = plan.blocks(length).tolist()
        super().__init__(layers=[SpanLayer(head_groups(row), plan.block, length, backend) for row in windows])

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values that are kept."""
        return sum(layer.nbytes for layer in self.layers)


def slot_of(positions: Tensor, slots: int, block: int) -> Tensor:
    """Slot of each token: the sink's own, then round and round in the ring."""
    ring = max(slots - block, 1)
    return torch.where(positions < block, positions, block + (positions - block) % ring)


def slot_positions(seen: Tensor, slots: int, block: int) -> Tensor:
    """Number of the token in each slot after ``seen`` real tokens, -1 where none is; shape of ``seen`` and (S,)."""
    at = torch.arange(slots, device=seen.device)
    last = seen[..., None] - 1
    ring = max(slots - block, 1)
    newest = last - (last - at) % ring  # the latest token that falls into the slot
    found = torch.where(at < block, at, newest)
    return torch.where((found <= last) & (found >= torch.where(at < block, 0, block)), found, -1)


@functools.lru_cache(maxsize=256)
def _newest_sees(
    position: int, window: int, block: int, slots: int, filled: int, device: torch.device
) -> Tensor | None:
    """Which filled slots a token sees that was just kept, (1, ``filled``); None where it sees them all."""
    here = torch.tensor([position], device=device)
    at = slot_positions(torch.tensor(position + 1, device=device), slots, block)[:filled]
    mask = visible(here, at, window, block)
    return None if bool(mask.all()) else mask
