"""What the claim counts and measures."""

from mixtura.claims import branch_attend_mix as claim
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM


def test_counted_operations_equal_those_of_the_formula():
    sizes = claim.SIZES["cpu"]
    T, D, H, L, V, N = sizes.batch * sizes.length, sizes.width, sizes.hidden, sizes.length, sizes.vocabulary, 4
    shape = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": H,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "block": "parallel",
        "num_experts": N,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
    }
    # Forward and backward: 6 operations a weight and token; one feed-forward expert a token, every attention expert.
    attention = 6 * T * 4 * D * D + 6 * 2 * T * L * D
    router, feed_forward, head = 6 * T * D * N, 6 * T * 3 * D * H, 6 * T * D * V
    for n, parts in ((1, {}), (N, {"attention": "mixture", "attention_experts": N})):
        model = MixturaForCausalLM(MixturaConfig(**shape, **parts))
        routers = router * (1 if n == 1 else 2)
        assert claim._flops(sizes, model) == sizes.layers * (feed_forward + n * attention + routers) + head


def test_the_three_parts_of_the_text_do_not_overlap():
    text = claim._text(claim.SIZES["smoke"], seed=0)
    for name, rows in text.train.items():
        trained = {tuple(row.tolist()) for row in rows}
        chosen = {tuple(row.tolist()) for row in text.choose[name]}
        tested = {tuple(row.tolist()) for row in text.test[name]}
        assert trained and chosen and tested
        assert not trained & chosen and not trained & tested and not chosen & tested
