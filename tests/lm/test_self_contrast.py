"""Self-contrast against a naive loop without caches, and in its limits."""

import math

import numpy as np
import pytest
import torch
from tiny_models import families, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

import mixtura.lm
import mixtura.lm.experts_forward
from mixtura.lm.anatomy import find_moe, recorded_routing
from mixtura.lm.decode.routing import RoutingRule, routed
from mixtura.lm.decode.self_contrast import contrast_logits, generate

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "deepseek_v3")


def prompts(rows: int = 1, length: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids: torch.Tensor, n: int) -> torch.Tensor:
    for _ in range(n):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def naive(model, ids: torch.Tensor, n: int, alpha: float, beta: float, rank: int) -> list[int]:
    """Equations 5 and 6 in NumPy, whole forward passes, no cache."""
    for _ in range(n):
        with torch.no_grad():
            strong = model(input_ids=ids, use_cache=False).logits[0, -1].double().numpy()
            with routed(model, RoutingRule.rank(rank)):
                weak = model(input_ids=ids, use_cache=False).logits[0, -1].double().numpy()
        scores = np.full(len(strong), -np.inf)
        for i in range(len(strong)):
            if strong[i] >= math.log(alpha) + strong.max():
                scores[i] = (1 + beta) * strong[i] - beta * weak[i]
        ids = torch.cat([ids, torch.tensor([[int(scores.argmax())]])], dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", ["eager", "batched_mm", "grouped_mm", "mixtura"])
def test_64_tokens_equal_the_naive_loop(family: str, engine: str):
    model = tiny_model(family)
    model.set_experts_implementation(engine)
    got = generate(model, prompts(), alpha=0.1, beta=0.5, max_new_tokens=64, eos_token_id=())
    assert got[0].tolist() == naive(model, prompts(), 64, 0.1, 0.5, rank=2)


# Families that find_moe cannot serve (tests/lm/test_anatomy.py says why).
NOT_SERVED = {"doge", "jetmoe", "llama4", "llama4_text", "dots3_note"}
# Tiny configurations without an attention layer: transformers cannot ask their caches for a length.
WITHOUT_ATTENTION = {"bailing_hybrid", "granitemoehybrid", "jamba", "kimi_linear"}


@pytest.mark.parametrize("family", [f for f in families() if f not in NOT_SERVED | WITHOUT_ATTENTION])
def test_every_family_keeps_two_caches_that_hold_what_whole_passes_give(family: str):
    model, ids = tiny_model(family), prompts(1)
    want = naive(model, ids, 6, 0.1, 0.7, rank=2)
    for batched in (True, False):
        got = generate(model, ids, beta=0.7, max_new_tokens=6, batched=batched, eos_token_id=())
        assert got[0].tolist() == want


@pytest.mark.parametrize("family", FAMILIES)
def test_no_contrast_is_greedy(family: str):
    model, ids = tiny_model(family), prompts()
    want = greedy(model, ids, 12)
    for options in (
        {"beta": 0.0},
        {"alpha": 1.0},
        {"weak": RoutingRule.default(), "beta": 0.9},
        {"strong": RoutingRule.default(), "weak": RoutingRule.default(), "beta": 5.0},
    ):
        assert torch.equal(generate(model, ids, max_new_tokens=12, eos_token_id=(), **options), want), options


def test_contrast_changes_the_text_so_that_the_tests_above_can_fail():
    model = tiny_model("mixtral")
    assert not torch.equal(
        generate(model, prompts(), beta=0.9, max_new_tokens=30, eos_token_id=()), greedy(model, prompts(), 30)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_batch_and_two_passes_agree(family: str):
    model, ids = tiny_model(family), prompts(3)
    together, apart = (
        generate(model, ids, max_new_tokens=10, batched=batched, return_dict=True, eos_token_id=())
        for batched in (True, False)
    )
    assert torch.equal(together.sequences, apart.sequences)
    for a, b in zip(together.strong + together.weak, apart.strong + apart.weak, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_row_is_the_row_alone(family: str):
    model = tiny_model(family)
    short, long = prompts(1, 4, seed=1), prompts(1, 7, seed=2)
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), long])
    mask = (torch.arange(7)[None] >= torch.tensor([[3], [0]])).long()
    together = generate(model, padded, attention_mask=mask, max_new_tokens=12, eos_token_id=())
    assert together[0, 3:].tolist() == generate(model, short, max_new_tokens=12, eos_token_id=())[0].tolist()
    assert together[1].tolist() == generate(model, long, max_new_tokens=12, eos_token_id=())[0].tolist()


def test_a_finished_row_goes_on_with_padding_and_all_finished_rows_end_it():
    model, ids = tiny_model("mixtral"), prompts(3)
    free = generate(model, ids, max_new_tokens=20, eos_token_id=())[:, 6:]
    end = int(free[0, 4])
    found = generate(model, ids, max_new_tokens=20, eos_token_id=end, pad_token_id=0)[:, 6:]
    for row, want in zip(found, free, strict=True):
        stop = (want == end).nonzero()
        n = int(stop[0]) + 1 if len(stop) else 20
        n_seen = min(n, found.shape[1])
        assert torch.equal(row[:n_seen], want[:n_seen])
        assert not row[n_seen:].any()
    only = generate(model, ids[:1], max_new_tokens=20, eos_token_id=end, pad_token_id=0)
    assert only.shape[1] == 6 + (free[0] == end).nonzero()[0] + 1


def test_sampling_follows_the_contrasted_softmax():
    model, ids = tiny_model("mixtral"), prompts()
    scores = generate(model, ids, max_new_tokens=1, return_dict=True, beta=0.3, alpha=0.01).scores[0][0]
    want = scores.softmax(-1)
    draws = generate(
        model,
        ids.repeat(2000, 1),
        max_new_tokens=1,
        do_sample=True,
        beta=0.3,
        alpha=0.01,
        generator=torch.Generator().manual_seed(0),
    )[:, -1]
    share = draws.bincount(minlength=len(want)) / 2000
    # Five standard errors of a share of 2000 draws; at most a handful of tokens lie inside the mask.
    assert (share - want).abs().max() < 5 * 0.5 / 2000**0.5
    assert share[want == 0].sum() == 0


def test_the_arithmetic_is_that_of_classifier_free_guidance_inside_the_mask():
    from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

    strong, weak = torch.randn(1, 20), torch.randn(1, 20)

    class Fixed:
        def __call__(self, *args, **kwargs):
            return type("Out", (), {"logits": weak[:, None], "get": lambda self, name, default=None: None})()

    theirs = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, Fixed(), torch.ones(1, 1, dtype=torch.long))
    want = theirs(torch.ones(1, 1, dtype=torch.long), strong)
    got = contrast_logits(strong, weak, alpha=1e-30, beta=0.5)
    torch.testing.assert_close(got - got[0, 0], want - want[0, 0])


def test_the_weak_pass_really_uses_other_experts():
    model, ids = tiny_model("mixtral"), prompts(4, 30)
    with torch.no_grad():
        with recorded_routing(model) as strong:
            model(input_ids=ids, use_cache=False)
        for rank in (1, 2, 3, 4):
            with recorded_routing(model) as own, routed(model, RoutingRule.rank(rank)):
                model(input_ids=ids, use_cache=False)
            shares = []
            for block in find_moe(model):
                used = own[block.name].logits.argsort(-1, descending=True)[:, rank - 1, None]
                shares.append((used != strong[block.name].indices).all(-1).float().mean().item())
            assert shares[0] == (0.0 if rank <= 2 else 1.0)
            if rank == 2:
                assert all(0 < share < 1 for share in shares[1:])


def test_a_clean_model_after_an_exception():
    model, ids = tiny_model("mixtral"), prompts()
    want = generate(model, ids, max_new_tokens=5, eos_token_id=())

    def stops(sequences, scores):
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        generate(model, ids, max_new_tokens=5, stopping_criteria=[stops])
    assert torch.equal(generate(model, ids, max_new_tokens=5, eos_token_id=()), want)


def test_it_runs_inside_transformers_generate():
    model, ids = tiny_model("mixtral"), prompts()
    model.generation_config.eos_token_id = None
    want = generate(model, ids, beta=0.7, max_new_tokens=8, eos_token_id=())
    got = model.generate(ids, custom_generate=mixtura.lm.self_contrast, beta=0.7, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="no beam search"):
        model.generate(ids, custom_generate=mixtura.lm.self_contrast, num_beams=2, max_new_tokens=4)
    with pytest.raises(TypeError, match="cannot be doubled"):
        model.generate(ids, custom_generate=mixtura.lm.self_contrast, cache_implementation="static", max_new_tokens=4)


def test_processors_of_transformers_are_heard():
    model, ids = tiny_model("mixtral"), prompts()
    model.generation_config.eos_token_id = None
    options = {"custom_generate": mixtura.lm.self_contrast, "max_new_tokens": 30, "do_sample": False}
    plain = model.generate(ids, **options)
    banned = int(plain[0, 6])
    assert banned not in model.generate(ids, suppress_tokens=[banned], **options)[0, 6:]
    assert not torch.equal(model.generate(ids, t_weak=4.0, **options), plain)
    assert not torch.equal(model.generate(ids, repetition_penalty=5.0, **options), plain)


def test_an_end_token_alone_in_the_mask_gives_way_while_it_is_forbidden():
    model, ids = tiny_model("mixtral"), prompts()
    first = int(
        generate(model, ids, alpha=1.0, max_new_tokens=1, eos_token_id=())[0, -1]
    )  # alone in the mask of alpha = 1
    got = model.generate(
        ids,
        custom_generate=mixtura.lm.self_contrast,
        alpha=1.0,
        eos_token_id=first,
        pad_token_id=0,
        min_new_tokens=3,
        max_new_tokens=5,
        do_sample=False,
    )
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -1]
    logits[first] = -math.inf
    assert got[0, 6] == logits.argmax()
    assert first not in got[0, 6:8]


def test_what_cannot_be_had_twice_is_refused():
    from transformers import DynamicCache, StaticCache

    model, ids = tiny_model("mixtral"), prompts()
    options = {"custom_generate": mixtura.lm.self_contrast, "max_new_tokens": 4, "pad_token_id": 0}
    with pytest.raises(TypeError, match="StaticCache cannot be doubled"):
        model.generate(ids, past_key_values=StaticCache(config=model.config, max_cache_len=32), **options)
    used = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :3], past_key_values=used)
    with pytest.raises(TypeError, match="holds tokens of one routing"):
        model.generate(ids, past_key_values=used, **options)
    with pytest.raises(TypeError, match="reads text only, got also pixel_values"):
        mixtura.lm.self_contrast(model, ids, generation_config=model.generation_config, pixel_values=torch.zeros(1))


def test_masked_tokens_never_become_numbers_that_are_none():
    strong = torch.tensor([0.0, -torch.inf, -1.0])
    weak = torch.tensor([-torch.inf, -torch.inf, 0.0])
    assert not contrast_logits(strong, weak).isnan().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\]"),
        ({"alpha": 1.5}, r"alpha must be in \(0, 1\]"),
        ({"beta": -0.1}, "beta must be >= 0"),
        ({"t_weak": 0.0}, "t_strong and t_weak must be > 0"),
        ({"weak": RoutingRule.rank(9)}, "needs 9 experts"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, "padded on the left"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model("mixtral"), prompts(), **{"max_new_tokens": 2, **options})


def test_a_dense_model_is_named():
    dense = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has no mixture layers"):
        generate(dense, prompts(), max_new_tokens=2)


def test_a_missing_padding_token_is_said(caplog):
    model = tiny_model("mixtral")
    model.generation_config.pad_token_id = None
    generate(model, prompts(2), max_new_tokens=2, eos_token_id=7)
    assert "no pad_token_id" in caplog.text
