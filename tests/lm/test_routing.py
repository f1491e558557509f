"""Routing rules against sorting by hand."""

import pytest
import torch
from tiny_models import E, tiny_model

from mixtura.lm.anatomy import find_moe, recorded_routing
from mixtura.lm.decode.routing import RoutingRule, routed

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "deepseek_v3")


def ids_for(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def watched(model, rule, ids, **options):
    """What the experts were really called with, layer by layer: (indices, weights), and the gates' logits."""
    seen, logits = [], []
    with torch.no_grad(), routed(model, rule, **options):
        hooks = []
        for block in find_moe(model):
            # Registered later, so it runs after the rule has changed the arguments.
            hooks.append(block.experts.register_forward_pre_hook(lambda m, args: seen.append((args[1], args[2]))))
            hooks.append(
                block.gate.register_forward_hook(lambda m, args, out: logits.append(out[0].reshape(-1, E).float()))
            )
        out = model(input_ids=ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
    return out, seen, logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_rank_k_is_the_kth_largest_logit_alone_with_weight_one(family: str, k: int):
    model = tiny_model(family)
    scale = find_moe(model)[0].scale
    _, seen, logits = watched(model, RoutingRule.rank(k), ids_for())
    for (indices, weights), scores in zip(seen, logits, strict=True):
        want = scores.argsort(dim=-1, descending=True)[:, k - 1]
        assert torch.equal(indices, want[:, None])
        torch.testing.assert_close(weights, torch.full_like(weights, scale))


def test_top_as_the_gate_chooses_is_the_default():
    model, ids = tiny_model("mixtral"), ids_for()
    plain = model(input_ids=ids, use_cache=False).logits
    for rule in (RoutingRule.default(), RoutingRule.top(2)):
        torch.testing.assert_close(watched(model, rule, ids)[0], plain, rtol=1e-5, atol=1e-5)


def test_weights_follow_renorm():
    model, ids = tiny_model("olmoe"), ids_for()  # this family keeps its softmax values
    for renorm, want in ((False, "probabilities"), ("as_model", "probabilities"), (True, "ones")):
        _, seen, logits = watched(model, RoutingRule.rank(2), ids, renorm=renorm)
        for (indices, weights), scores in zip(seen, logits, strict=True):
            probs = scores.softmax(-1).gather(-1, indices)
            torch.testing.assert_close(weights, probs if want == "probabilities" else torch.ones_like(probs))
    model = tiny_model("mixtral")  # and this one does not
    _, seen, _ = watched(model, RoutingRule.rank(2), ids, renorm="as_model")
    assert all(torch.equal(weights, torch.ones_like(weights)) for _, weights in seen)


def test_the_threshold_keeps_the_fewest_experts_that_pass_it():
    model, ids = tiny_model("mixtral"), ids_for()
    _, seen, logits = watched(model, RoutingRule.threshold(0.6), ids, renorm=False)
    for (indices, weights), scores in zip(seen, logits, strict=True):
        for token in range(len(scores)):
            order = scores[token].softmax(-1).argsort(descending=True).tolist()
            probs = scores[token].softmax(-1)
            want, total = [], 0.0
            for expert in order:
                want.append(expert)
                total += probs[expert].item()
                if total > 0.6:
                    break
            kept = indices[token][weights[token] > 0].tolist()
            assert kept == want


def test_random_experts_are_even_reproducible_and_anew_in_every_layer():
    model, ids = tiny_model("mixtral"), ids_for(8, 60)
    _, seen, _ = watched(model, RoutingRule.random(1), ids, generator=torch.Generator().manual_seed(3))
    again = watched(model, RoutingRule.random(1), ids, generator=torch.Generator().manual_seed(3))[1]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(seen, again, strict=True))
    assert not torch.equal(seen[0][0], seen[1][0])
    counts = torch.cat([indices for indices, _ in seen]).flatten().bincount(minlength=E)
    n = counts.sum().item()
    # n draws with p = 1/4: five standard errors, a false alarm in about half a million runs over four counts.
    assert (counts / n - 0.25).abs().max() < 5 * (0.25 * 0.75 / n) ** 0.5


def test_a_rule_for_each_row_gives_what_the_row_gets_alone():
    model, ids = tiny_model("qwen2_moe"), ids_for(3)
    rules = [RoutingRule.default(), RoutingRule.rank(2), RoutingRule.ranks([1, 3, 4])]
    together = watched(model, rules, ids)[0]
    for row, rule in enumerate(rules):
        alone = watched(model, rule, ids[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-5)


def test_every_experts_engine_gives_the_same():
    import mixtura.lm.experts_forward  # noqa: F401

    model, ids = tiny_model("mixtral"), ids_for()
    rules = [RoutingRule.default(), RoutingRule.rank(2)]
    outs = []
    for engine in ("eager", "batched_mm", "grouped_mm", "mixtura"):
        model.set_experts_implementation(engine)
        outs.append(watched(model, rules, ids)[0])
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-4, atol=1e-5)


def test_bad_rules_are_named():
    model = tiny_model("mixtral")
    with (
        pytest.raises(ValueError, match=r"needs 5 experts, and model\.layers\.0\.mlp has 4"),
        routed(model, RoutingRule.rank(5)),
    ):
        pass
    with pytest.raises(ValueError, match="renorm must be"), routed(model, RoutingRule.rank(1), renorm="yes"):
        pass
    with (
        pytest.raises(ValueError, match="3 rules"),
        torch.no_grad(),
        routed(model, [RoutingRule.rank(1)] * 2 + [RoutingRule.rank(2)]),
    ):
        model(input_ids=ids_for(2, 7), use_cache=False)
    for bad in (lambda: RoutingRule.rank(0), lambda: RoutingRule.ranks([1, 1]), lambda: RoutingRule.ranks([])):
        with pytest.raises(ValueError, match="at least 1"):
            bad()
    with pytest.raises(ValueError, match="0 < tau < 1"):
        RoutingRule.threshold(1.0)


def test_recording_sees_the_gates_own_choice_around_a_rule():
    model, ids = tiny_model("mixtral"), ids_for()
    with torch.no_grad(), recorded_routing(model) as before:
        model(input_ids=ids, use_cache=False)
    with torch.no_grad(), recorded_routing(model) as own, routed(model, RoutingRule.rank(4)):
        model(input_ids=ids, use_cache=False)
    first = find_moe(model)[0].name
    assert torch.equal(own[first].indices, before[first].indices)
