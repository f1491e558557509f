"""Spans by FlexAttention: which tiles it skips, and that it gives what the whole mask gives."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from mixtura.lm.attention import SpanPlan, convert, span_flex
from mixtura.lm.attention.span_flex import block_mask, why_not_flex
from mixtura.lm.attention.span_mask import head_groups, prompt_attention, real_positions, visible

PLAN = SpanPlan([[16.0, 0.0], [24.0, 32.0], [16.0, 16.0]], [[0.0, 1.0], [0.1, 0.2], [0.0, 0.3]], block=8)
PADS = ((0, 0), (7, 0), (0, 71), (100, 0))  # before and behind each row


def mask_of(n: int) -> torch.Tensor:
    """Padding of a batch of four rows."""
    mask = torch.ones(4, n, dtype=torch.long)
    for row, (before, behind) in zip(mask, PADS, strict=True):
        row[:before], row[n - behind :] = 0, 0
    return mask


def tiles_of(count: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Whether a tile of keys is listed for a tile of queries."""
    dense = torch.zeros(*which.shape, dtype=torch.bool)
    return dense.scatter(-1, which.long(), torch.arange(which.shape[-1]) < count[..., None])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("block", "tile"), [(8, 8), (8, 16), (16, 8), (6, 16)])
def test_a_tile_is_skipped_where_nothing_is_seen_and_read_whole_where_all_is(block, tile, padded):
    n, windows = 150, torch.tensor([1, 1, 4, 30])
    positions = real_positions(mask_of(n).bool(), n, torch.device("cpu")) if padded else torch.arange(n)[None]
    found = block_mask(positions, windows, block, tile=tile)
    want = torch.stack([visible(positions, positions, int(w), block) for w in windows], 1)
    rows = torch.arange(len(positions))[:, None, None, None]
    heads, at = torch.arange(4)[:, None, None], torch.arange(n)
    assert torch.equal(found.mask_mod(rows, heads, at[:, None], at), want)
    t = -(-n // tile)
    want = F.pad(want, (0, t * tile - n, 0, t * tile - n)).unflatten(3, (t, tile)).unflatten(2, (t, tile))
    some, every = want.any(5).any(3), want.all(5).all(3)
    partial, whole = (
        tiles_of(found.kv_num_blocks, found.kv_indices),
        tiles_of(found.full_kv_num_blocks, found.full_kv_indices),
    )
    assert torch.equal(partial | whole, some) and not (partial & whole).any()
    assert not (whole & ~every).any()
    if tile == block and not padded:
        assert torch.equal(whole, every)


@pytest.mark.slow
@pytest.mark.skipif(why_not_flex(torch.empty(0)) is not None, reason="nothing can be compiled here")
def test_the_compiled_kernel_gives_what_the_whole_mask_gives_at_every_length_and_with_padding(tiny_dense):
    dense = AutoModelForCausalLM.from_pretrained(tiny_dense).eval()
    flex, whole = convert(dense, PLAN, backend="flex"), convert(dense, PLAN, backend="reference")
    ids = torch.randint(3, 100, (4, 200), generator=torch.Generator().manual_seed(1))
    span_flex._kernel.cache_clear()
    for n, mask in ((150, None), (200, mask_of(200))):
        given = {"input_ids": ids[:, :n], "attention_mask": mask, "use_cache": False}
        with torch.no_grad():
            got, want = flex(**given).logits, whole(**given).logits
        real = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-5)
        assert got.isfinite().all()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert flex.generate(ids, **options).tolist() == whole.generate(ids, **options).tolist()


def test_a_machine_or_a_call_that_is_none_for_flex_attention_is_told_why(monkeypatch):
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 1, 40, 8)

    def attend(query, **options):
        given = (query, k, k, torch.arange(40), head_groups([1]), 8)
        return prompt_attention(*given, scale=1.0, backend="flex", **options)

    with pytest.raises(ValueError, match=r"no dropout, and 0\.1 is asked for; set .*\['backend'\] to 'windowed'"):
        attend(q, dropout=0.1)
    with pytest.raises(ValueError, match="on a CPU it has no backward pass"):
        attend(q.clone().requires_grad_())
    with pytest.raises(ValueError, match="made for cpu and cuda"):
        attend(q.to("meta"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    span_flex._why_not_compiled.cache_clear()
    with pytest.raises(ValueError, match="no C\\+\\+ compiler here"):
        attend(q)
    span_flex._why_not_compiled.cache_clear()
