"""Attention with spans: masks, caches, models of every family, against plain attention under the whole mask."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import mixtura  # noqa: F401 (registers)
from mixtura.core.assign import Infeasible, allocate_spans
from mixtura.lm.attention import SpanCache, SpanPlan, convert, plan_spans
from mixtura.lm.attention.late import FAMILIES
from mixtura.lm.attention.span_mask import attend_window, visible
from mixtura.lm.attention.span_plan import pareto_plans, rule_losses
from mixtura.lm.attention.span_rules import Rule, rule_grid, span_of, uniform_plan, window_blocks

BLOCK = 8
PLAN = SpanPlan([[16.0, 0.0, 32.0]] * 2, [[0.0, 1.0, 0.1]] * 2, block=BLOCK)


def tiny(family: str = "llama", **options):
    """A model with 6 query heads on 3 key/value heads in 2 layers."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 100,
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "sliding_window": None,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    } | options
    config = AutoConfig.for_model(family, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def masked_logits(model, ids, plan, mask=None):
    """Logits of the plain model, eager, with the plan's mask given head by head."""
    n = ids.shape[1]
    positions = torch.arange(n) if mask is None else torch.where(mask.bool(), mask.long().cumsum(-1) - 1, -1)
    windows = plan.blocks(n)
    repeats = model.config.num_attention_heads // plan.shape[1]
    handles = []
    for i, layer in enumerate(model.model.layers):
        per_head = [visible(positions, positions, int(w), plan.block) for w in windows[i]]
        allowed = torch.stack([m if m.dim() == 3 else m[None] for m in per_head], 1).repeat_interleave(repeats, 1)
        allowed = allowed | ~allowed.any(-1, keepdim=True)
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)

        def put(module, args, kwargs, bias=bias):
            return args, kwargs | {"attention_mask": bias}

        handles.append(layer.self_attn.register_forward_pre_hook(put, with_kwargs=True))
    model.set_attn_implementation("eager")
    place = {} if mask is None else {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, use_cache=False, **place).logits
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    return logits


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_attends_as_under_the_whole_mask_and_decodes_token_by_token_the_same(family):
    model, ids = tiny(family), torch.randint(3, 100, (2, 50), generator=torch.Generator().manual_seed(1))
    spans = convert(model, PLAN)
    with torch.no_grad():
        got = spans(ids, use_cache=False).logits
        torch.testing.assert_close(got, masked_logits(model, ids, PLAN), rtol=0, atol=2e-5)
        cache = SpanCache(spans, 50)
        steps = [spans(ids[:, i : i + 1], past_key_values=cache).logits for i in range(50)]
    torch.testing.assert_close(torch.cat(steps, 1), got, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["windowed", "reference"])
@pytest.mark.parametrize("cuts", [(50,), (3, 50), (20, 21, 22, 50), (33, 49, 50)])
def test_a_prompt_in_pieces_gives_what_the_whole_gives_and_the_cache_keeps_its_spans(backend, cuts):
    model, ids = tiny(), torch.randint(3, 100, (2, 50), generator=torch.Generator().manual_seed(1))
    spans = convert(model, PLAN, backend=backend)
    cache = SpanCache(spans, 50)
    with torch.no_grad():
        parts = [spans(ids[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise((0, *cuts))]
        want = masked_logits(model, ids, PLAN)
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=0, atol=1e-4)
    # Keys and values, 2 rows, width 8, 4 bytes.
    assert cache.nbytes == 2 * 2 * 8 * 4 * int(PLAN.spans(50).sum())
    assert cache.get_seq_length() == 50


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["windowed", "reference"])
def test_padding_moves_neither_sink_nor_window(side, backend):
    model, spans = tiny(), convert(tiny(), PLAN, backend=backend)
    ids = torch.randint(3, 100, (3, 60), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 60, dtype=torch.long)
    for row, pads in enumerate((0, 7, 55)):
        span = slice(0, pads) if side == "left" else slice(60 - pads, 60)
        ids[row, span], mask[row, span] = 0, 0
    place = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        got = spans(ids, attention_mask=mask, position_ids=place, use_cache=False).logits
        want = masked_logits(model, ids, PLAN, mask)
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=0, atol=1e-4)
        # In two pieces and then token by token, through the cache.
        cache, steps = SpanCache(spans, 60), []
        for a, b in itertools.pairwise((0, 30, 40, *range(41, 61))):
            steps.append(
                spans(ids[:, a:b], attention_mask=mask[:, :b], position_ids=place[:, a:b], past_key_values=cache).logits
            )
    torch.testing.assert_close(torch.cat(steps, 1)[mask.bool()], want[mask.bool()], rtol=0, atol=1e-4)


def test_rows_with_padding_generate_what_they_generate_alone():
    spans = convert(tiny(), PLAN)
    ids = torch.randint(3, 100, (2, 34), generator=torch.Generator().manual_seed(3))
    ids[1, :4] = 0
    mask = (ids > 0).long()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    both = spans.generate(ids, attention_mask=mask, **options)
    # The length of the batch, hence its spans.
    alone = spans.generate(ids[1:, 4:], past_key_values=SpanCache(spans, 40), **options)
    assert both[1, 34:].tolist() == alone[0, 30:].tolist()


def test_full_density_changes_nothing():
    model = tiny()
    ids = torch.randint(3, 100, (2, 50))
    plan = uniform_plan((2, 3), 50, 1.0, BLOCK)
    assert plan.density(50) == 1
    with torch.no_grad():
        torch.testing.assert_close(
            convert(model, plan)(ids, use_cache=False).logits, model(ids).logits, rtol=0, atol=1e-5
        )


def test_generation_equals_greedy_steps_without_a_cache():
    spans = convert(tiny(), PLAN)
    ids = torch.randint(3, 100, (1, 20), generator=torch.Generator().manual_seed(4))
    got = spans.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False)
    reference = convert(tiny(), PLAN, backend="reference")
    cache = SpanCache(reference, 50)  # spans are those of the whole call
    row, step = ids, ids
    with torch.no_grad():
        for _ in range(30):
            logits = reference(step, past_key_values=cache).logits[:, -1]
            logits[:, 2] = -torch.inf  # no end before its time, as above
            step = logits.argmax(-1, keepdim=True)
            row = torch.cat([row, step], 1)
    assert got.tolist() == row.tolist()


def test_beams_keep_their_own_rows():
    spans = convert(tiny(), uniform_plan((2, 3), 40, 1.0, BLOCK))
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    assert spans.generate(ids, **options).tolist() == tiny().generate(ids, **options).tolist()


def test_a_model_with_spans_is_saved_and_loaded_with_its_plan(tmp_path):
    for family in ("llama", "mixtral"):
        spans = convert(tiny(family), PLAN)
        spans.save_pretrained(tmp_path / family)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / family)
        ids = torch.randint(3, 100, (1, 50))
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids, use_cache=False).logits, spans(ids, use_cache=False).logits)
        assert SpanPlan.of(loaded.config.mixtura_spans) == PLAN


def test_training_through_spans_reaches_the_weights():
    spans = convert(tiny(), PLAN).train()
    ids = torch.randint(3, 100, (2, 40))
    spans(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in spans.parameters())


def test_tiles_of_queries_give_the_whole_products(monkeypatch):
    from mixtura.lm.attention import span_mask

    torch.manual_seed(0)
    q, k, v = torch.randn(2, 1, 3, 70, 8), torch.randn(2, 1, 70, 8), torch.randn(2, 1, 70, 8)
    positions = torch.arange(70)
    want = span_mask.attend(q, k, v, visible(positions, positions, 2, 8), scale=0.3)
    for tile in (16, 24, 256):
        monkeypatch.setattr(span_mask, "TILE", tile)
        torch.testing.assert_close(attend_window(q, k, v, positions, 2, 8, scale=0.3), want)


ONES = torch.ones(1, 9, dtype=torch.long)
WRONG = {
    "the plan is for 2 layers of 1 key/value heads, the model has 2 of 3": lambda m: convert(
        m, SpanPlan([[8.0]] * 2, [[0.0]] * 2)
    ),
    "has spans already": lambda m: convert(convert(m, PLAN), PLAN),
    "backend must be one of windowed, flex, reference": lambda m: convert(m, PLAN, backend="fast"),
    "got DynamicCache": lambda m: convert(m, PLAN)(ONES, past_key_values=DynamicCache()),
    "would hold 9": lambda m: convert(m, PLAN)(ONES, past_key_values=SpanCache(PLAN, 8)),
    "assisted decoding": lambda m: convert(m, PLAN).generate(ONES, prompt_lookup_num_tokens=2),
    "makes its own": lambda m: convert(m, PLAN).generate(ONES, cache_implementation="static"),
    "would be 601 tokens, and this model reads 512": lambda m: convert(m, PLAN).generate(
        ONES[:, :1], max_new_tokens=600
    ),
    "keeps no weights": lambda m: convert(m, PLAN)(ONES, output_attentions=True),
    "mask of padding": lambda m: convert(m, PLAN)(ONES, attention_mask=torch.ones(1, 1, 9, 9)),
    "made for up to 64 tokens": lambda m: SpanCache(SpanPlan(PLAN.alphas, PLAN.betas, 8, 64), 65),
    "tables of one shape": lambda m: SpanPlan([[1.0]], [[1.0, 2.0]]),
    "lacks betas": lambda m: SpanPlan.of({"alphas": [[1]]}),
    "sliding windows of its own": lambda m: convert(tiny("mistral", sliding_window=16), PLAN),
    "'gpt_neox' models cannot be given spans": lambda m: convert(tiny("gpt_neox"), PLAN),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_says_why(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message](tiny())


def test_rules_of_whole_blocks_stay_within_the_length():
    rules = rule_grid((64, 256), 16)
    for length in (64, 256):
        spans = span_of(window_blocks([r.alpha for r in rules], [r.beta for r in rules], length, 16), length, 16)
        assert spans.min() >= 32 and spans.max() == length
    assert len({tuple(int(span_of(window_blocks(*r, n, 16), n, 16)) for n in (64, 256)) for r in rules}) == len(rules)


def test_the_uniform_plan_meets_its_density():
    for density in (0.25, 0.4, 0.5, 0.9):
        plan = uniform_plan((30, 3), 528, density, 16)
        assert plan.density(528) == pytest.approx(density, abs=2e-3)
        assert len(plan.spans(528).unique()) <= 2


def influence(seed: int, shape=(2, 3), n: int = 8):
    """Random influence, larger near the diagonal for some heads."""
    rng = np.random.default_rng(seed)
    e = rng.exponential(size=(*shape, n, n)) * np.exp(-rng.uniform(0, 1, (*shape, 1, 1)) * np.arange(n)[:, None])
    return torch.tensor(np.tril(e), dtype=torch.float32)


def test_a_window_cuts_the_blocks_it_hides_and_never_the_sink():
    e = influence(0, (1, 1))
    for window in (1, 3, 8):
        positions = torch.arange(8)
        hidden = ~visible(positions, positions, window, 1) & (positions[:, None] >= positions)
        assert rule_losses(e, [window])[0, 0] == pytest.approx(float(e[0, 0][hidden].sum()), rel=1e-6)


@pytest.mark.parametrize("most", [1, 2, None])
def test_the_program_finds_what_trying_all_finds(most):
    rng = np.random.default_rng(0)
    cost, weight = rng.exponential(size=(2, 5, 4)), np.sort(rng.uniform(0, 1, (2, 4)))
    groups, budget = [0, 0, 0, 1, 1], np.array([0.5, 0.6])
    cap = 0.6 * cost[1].max(1).sum()
    best = np.inf
    for chosen in itertools.product(range(4), repeat=5):
        used = max(len({c for c, g in zip(chosen, groups, strict=True) if g == k}) for k in (0, 1))
        spent = weight[:, chosen].mean(1)
        second = cost[1][range(5), chosen].sum()
        if (
            (most is None or used <= most)
            and (spent <= budget).all()
            and (spent >= 0.5 * budget).all()
            and second <= cap
        ):
            best = min(best, cost[0][range(5), chosen].sum())
    found = allocate_spans(cost[0], weight, budget, groups, most=most, lower=0.5, within=[(cost[1], 0, cap)])
    assert cost[0][range(5), found].sum() == pytest.approx(best)
    if most is not None:
        assert all(len({int(c) for c, g in zip(found, groups, strict=True) if g == k}) <= most for k in (0, 1))


def test_a_plan_meets_its_budget_at_every_length_with_few_rules_a_layer():
    e = {64: influence(1, n=8), 128: influence(2, n=16)}
    plan = plan_spans(e, 0.5, extend=(256,))
    assert plan.longest == 256 and plan.block == 8
    for length in (64, 128, 256):
        assert plan.density(length) <= 0.5 + 1e-9
    for alphas, betas in zip(plan.alphas, plan.betas, strict=True):
        assert len(set(zip(alphas, betas, strict=True))) <= 2


def test_no_plan_on_the_front_beats_another_and_validation_chooses_among_them():
    e = {64: influence(3, n=8), 128: influence(4, n=16)}
    front = pareto_plans(e, 0.4)
    assert len(front) > 1
    for a, b in itertools.permutations(front, 2):
        assert not all(a.loss[n] <= b.loss[n] for n in b.loss)
    target = front[-1].plan
    assert plan_spans(e, 0.4, validate=lambda plan: 0.0 if plan == target else 1.0) == target


def test_one_rule_a_layer_costs_more_than_two():
    e = {128: influence(5, (4, 3), 16)}
    losses = [pareto_plans(e, 0.4, max_rules_per_layer=most)[0].loss[128] for most in (1, 2, None)]
    assert losses[0] > losses[1] >= losses[2]


def test_a_density_that_no_rule_reaches_names_the_smallest():
    with pytest.raises(
        Infeasible, match=r"smallest that rules of whole blocks of 8 tokens can have at all of them is 0\.25"
    ):
        plan_spans({64: influence(6)}, 0.1)
    with pytest.raises(ValueError, match="density must be above 0 and at most 1"):
        plan_spans({64: influence(6)}, 1.5)
    with pytest.raises(ValueError, match="profiled with one block"):
        plan_spans({64: influence(6), 128: influence(6)}, 0.5)
    with pytest.raises(Infeasible, match="no allocation keeps mean weights"):
        allocate_spans([[1.0, 2.0]], [[0.5, 0.7]], [0.1], [0])


def test_a_plan_is_written_and_the_authors_plans_are_read(tmp_path):
    PLAN.to_json(tmp_path / "plan.json")
    assert SpanPlan.from_json(tmp_path / "plan.json") == PLAN
    (tmp_path / "theirs.json").write_text('{"alphas": [[64, 128]], "betas": [[0, 0.5]]}')
    assert SpanPlan.from_json(tmp_path / "theirs.json").shape == (1, 2)
    assert Rule(0.0, 1.0) in rule_grid((64,), 8)
