"""Skipping experts: the rule against NumPy, attention received against eager weights, and nothing left running."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from mixtura.lm.anatomy import find_moe
from mixtura.lm.compress.attention_received import column_means
from mixtura.lm.compress.dynamic_pruning import prune_dynamically, pruned_share, pruned_weights, thresholds
from mixtura.lm.compress.mixed_experts import convert


def tokens(rows: int = 4, length: int = 30, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    extra = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **extra).logits


def test_the_rule_equals_a_loop_in_numpy():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(50, 2, generator=generator)
    weights = weights / weights.sum(-1, keepdim=True)
    indices = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(50)])
    protected = torch.rand(50, generator=generator) < 0.2
    got_w, got_i = pruned_weights(weights, indices, 6, [0.4], protected)
    for t in range(50):
        w, i = weights[t].numpy().copy(), indices[t].numpy().copy()
        low = int(np.argmin(w))
        if w[low] / w[1 - low] < 0.4 and not protected[t]:
            w[low], w[1 - low], i[low] = 0.0, 1.0, 6
        np.testing.assert_allclose(got_w[t], w, rtol=1e-6)
        np.testing.assert_array_equal(got_i[t], i)


def test_gates_that_are_not_renormalised_keep_their_sum():
    weights, indices = torch.tensor([[0.5, 0.1]]), torch.tensor([[2, 3]])
    got, places = pruned_weights(weights, indices, 4, [0.5])
    torch.testing.assert_close(got, torch.tensor([[0.6, 0.0]]))
    assert places.tolist() == [[2, 4]]


@pytest.mark.parametrize("padded", [0, 3])
def test_attention_received_equals_the_column_means_of_eager_weights(padded: int):
    model = tiny_model("mixtral")
    model.set_attn_implementation("eager")
    ids = tokens(1, 12)
    with torch.no_grad():
        weights = model(input_ids=ids[:, padded:], output_attentions=True, use_cache=False).attentions[0]
    A = weights.mean(1)[0].numpy()
    L = A.shape[0]
    want = [sum(A[i, j] for i in range(j, L)) / (L - j) for j in range(L)]
    # Queries and keys as the engine gets them, padded on the left.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kept = {}

    def catch(module, query, key, value, mask, **kwargs):
        kept.setdefault("first", (query, key, kwargs["scaling"], mask))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("catch", catch)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register("catch", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("catch")
    mask = torch.ones_like(ids)
    mask[:, :padded] = 0
    logits(model, ids, mask if padded else None)
    means, real = column_means(*kept["first"])
    assert real[0].tolist() == mask[0].bool().tolist()
    np.testing.assert_allclose(means[0, padded:].numpy(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_the_share_that_is_reported_is_the_share_that_is_not_computed(packed: bool):
    model, ids = tiny_model("mixtral"), tokens(8, 30)
    if packed:
        model = convert(model, ids, average_bits=2.0)
    pruned = prune_dynamically(model, ids, protect=0.0)
    share = pruned_share(pruned, ids)
    # A median splits the calibration tokens in halves; deeper layers see other tokens once the first ones prune.
    assert 0.35 < share < 0.65
    visits = []

    def count(module, args):
        visits.append(int((args[1] < 4).sum()))

    hooks = [b.experts.register_forward_pre_hook(count) for b in find_moe(pruned)]
    logits(pruned, ids)
    for hook in hooks:
        hook.remove()
    total = 4 * 2 * ids.numel()
    assert sum(visits) == total - round(share * total / 2)


def test_the_output_is_that_of_a_loop_over_the_rule():
    model, ids = tiny_model("mixtral"), tokens(2, 20)
    ratios = thresholds(model, [ids])
    pruned = prune_dynamically(model, ids, protect=0.0)
    want_model = tiny_model("mixtral")
    for block, ratio in zip(find_moe(want_model), ratios, strict=True):

        def change(module, args, out, ratio=ratio):
            scores, weights, indices = out
            small = weights[:, 1] / weights[:, 0] < ratio[0]
            weights = torch.where(small[:, None], torch.tensor([[1.0, 0.0]]), weights)
            return scores, weights, indices

        block.gate.register_forward_hook(change)
    torch.testing.assert_close(logits(pruned, ids), logits(want_model, ids), rtol=1e-4, atol=1e-4)


def test_protecting_all_but_nothing_prunes_nothing():
    model, ids = tiny_model("mixtral"), tokens(3, 25)
    pruned = prune_dynamically(model, ids, protect=0.999)
    assert pruned_share(pruned, ids) == 0
    torch.testing.assert_close(logits(pruned, ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_some_protection_prunes_less():
    model, ids = tiny_model("mixtral"), tokens(4, 30)
    shares = [pruned_share(prune_dynamically(model, ids, protect=p), ids) for p in (0.0, 0.3, 0.6)]
    assert shares[0] > shares[1] > shares[2] > 0


def test_a_padded_row_is_the_row_alone():
    model, calibration = tiny_model("mixtral"), tokens(4, 30)
    pruned = prune_dynamically(model, calibration, protect=0.2)
    short, long = tokens(1, 9, seed=3), tokens(1, 14, seed=4)
    ids = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1), long])
    mask = (torch.arange(14)[None] >= torch.tensor([[5], [0]])).long()
    together = logits(pruned, ids, mask)
    torch.testing.assert_close(together[0, 5:], logits(pruned, short)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[1], logits(pruned, long)[0], rtol=1e-4, atol=1e-4)


def test_decoding_with_a_cache_goes_on_by_rule_one():
    model, ids = tiny_model("mixtral"), tokens(4, 20)
    pruned = prune_dynamically(model, ids, protect=0.0)
    with torch.no_grad():
        whole = pruned(input_ids=ids, use_cache=False).logits
        out = pruned(input_ids=ids[:, :15], use_cache=True)
        for i in range(15, 20):
            out = pruned(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            torch.testing.assert_close(out.logits[:, 0], whole[:, i], rtol=1e-3, atol=1e-3)


def test_a_packed_pruning_model_comes_back_from_the_disk(tmp_path: Path):
    model, ids = tiny_model("mixtral"), tokens(4, 30)
    small = prune_dynamically(convert(model, ids, average_bits=2.0), ids, protect=0.1, inplace=True)
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), logits(small, ids))
    assert pruned_share(again, ids) == pruned_share(small, ids) > 0


def test_layers_can_be_chosen_by_number_or_by_what_they_lose():
    model, ids = tiny_model("mixtral"), tokens(4, 30)
    every = pruned_share(prune_dynamically(model, ids, protect=0.0), ids)
    two = pruned_share(prune_dynamically(model, ids, protect=0.0, layers=2), ids)
    first = prune_dynamically(model, ids, protect=0.0, layers=[0])
    assert two < every
    with torch.no_grad():
        seen = []
        hooks = [
            b.experts.register_forward_pre_hook(lambda m, a: seen.append(bool((a[1] == 4).any())))
            for b in find_moe(first)
        ]
        logits(first, ids)
    assert hooks and seen == [True, False, False, False]


def test_bad_input_is_named():
    model, ids = tiny_model("mixtral"), tokens()
    with pytest.raises(ValueError, match=r"protect is a share and must be in \[0, 1\), got 1"):
        prune_dynamically(model, ids, protect=1)
    with pytest.raises(ValueError, match=r"layers must lie in 0\.\.3, got \[7\]"):
        prune_dynamically(model, ids, layers=[7])
    with pytest.raises(ValueError, match="number of mixture layers, 4, got 9"):
        prune_dynamically(model, ids, layers=9)
    single = tiny_model("mixtral")
    for block in find_moe(single):
        block.gate.top_k = 1
    with pytest.raises(ValueError, match="visits one expert"):
        prune_dynamically(single, ids)
    for block in find_moe(single):
        block.gate.top_k = 3
    with pytest.raises(ValueError, match="visit 3 experts here"):
        prune_dynamically(single, ids)
