"""The encoder-decoder with experts of limited capacity: token by token, at its limits, and as transformers uses it."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import mixtura  # noqa: F401 (registers the model type)
from mixtura.core.balance import load_balance_loss
from mixtura.core.capacity import capacity
from mixtura.core.shared_batch import SharedBatch
from mixtura.lm.model import MultitaskMoEConfig, MultitaskMoEForConditionalGeneration
from mixtura.lm.model.encoder_decoder import LimitedExpertsBlock

PAD, START, END = 0, 1, 2
E = 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def config(**changes):
    options = {"vocab_size": 40, "d_model": 16, "heads": 2, "ffn": 12, "encoder_layers": 4, "decoder_layers": 2}
    options |= {"num_experts": E, "initializer_range": 0.3, "min_capacity": 1}
    options |= {"pad_token_id": PAD, "decoder_start_token_id": START, "eos_token_id": END}
    return MultitaskMoEConfig(**options | changes)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return MultitaskMoEForConditionalGeneration(config(**changes)).eval()


def ids(rows=3, length=8, seed=0):
    return torch.randint(3, 40, (rows, length), generator=seeded(seed))


def block(**changes):
    torch.manual_seed(0)
    c = config(**changes)
    c._experts_implementation = "eager"
    made = LimitedExpertsBlock(c, E)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.5, generator=seeded(1))
    return made


def by_token(made, x, mask, limit):
    """One token at a time in batch-major order, first come, first served."""
    taken, rows = [0] * E, []
    for token, real in zip(x.reshape(-1, x.shape[-1]), mask.flatten(), strict=True):
        y = torch.zeros_like(token)
        if real:
            probs = (made.gate.weight @ token).softmax(0)
            e = int(probs.argmax())
            if taken[e] < limit:
                taken[e] += 1
                gate, up = (made.experts.gate_up_proj[e] @ token).chunk(2)
                y = probs[e] * (made.experts.down_proj[e] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 0.0])
def test_a_block_is_the_rule_token_by_token(factor):
    made, x = block(eval_capacity_factor=factor).eval(), torch.randn(3, 7, 16, generator=seeded(2))
    mask = torch.rand(3, 7, generator=seeded(3)) > 0.3
    limit = capacity(int(mask.sum()), E, factor, minimum=1) if factor else 10**6
    y, routing = made.mix(x, mask)
    torch.testing.assert_close(y, by_token(made, x, mask, limit), rtol=1e-5, atol=1e-5)
    assert (routing.indices.view(3, 7)[~mask] == E).all() and (routing.weights.view(3, 7)[~mask] == 0).all()
    assert torch.bincount(routing.indices.flatten(), minlength=E + 1)[:E].max() <= limit


@pytest.mark.parametrize("engine", ["mixtura", "grouped_mm", "batched_mm"])
def test_every_engine_passes_over_tokens_without_a_place_forward_and_backward(engine):
    def run(name):
        made = copy.deepcopy(block(eval_capacity_factor=0.7)).eval()
        made.config._experts_implementation = name
        x = torch.randn(2, 9, 16, generator=seeded(2)).requires_grad_()
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[1, 6:] = False
        y = made.mix(x, mask)[0]
        y.square().sum().backward()
        return {"y": y, "x.grad": x.grad} | {n: p.grad for n, p in made.named_parameters()}

    want, got = run("eager"), run(engine)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_selection_is_drawn_anew_in_every_layer_and_step_and_from_a_given_generator():
    model, x = small(capacity_factor=0.5).train(), ids(8, 16)
    with torch.no_grad():  # equal gates and inputs: what differs between layers is chance alone
        for module in model.modules():
            if isinstance(module, LimitedExpertsBlock):
                module.gate.weight.zero_()

    def run():
        with torch.no_grad():
            out = model(input_ids=x, labels=x)
        return [r.indices.flatten() for r in out.routing]

    model.select_with(seeded(0))
    first, second = run(), run()
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], second[0])
    model.select_with(seeded(0))
    assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    model.select_with(None)
    torch.manual_seed(5)
    free = run()
    torch.manual_seed(5)
    assert torch.equal(run()[0], free[0])
    assert all(torch.bincount(r, minlength=E + 1)[0] == 8 * 16 // E // 2 for r in first)


def test_nothing_is_random_in_evaluation_and_an_expert_takes_twice_its_share():
    model, x = small(), ids(8, 16)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LimitedExpertsBlock):
                module.gate.weight.zero_()  # all tokens want expert 0
        a, b = model(input_ids=x, labels=x), model(input_ids=x, labels=x)
    assert torch.equal(a.logits, b.logits)
    for routing in a.routing:
        kept = routing.indices.flatten() == 0
        assert kept.sum() == 2 * 8 * 16 // E and kept[: 2 * 8 * 16 // E].all()


@pytest.mark.parametrize(("layout", "first"), [("batch_major", "rows"), ("sequence_major", "columns")])
def test_the_layout_says_which_tokens_are_the_first(layout, first):
    made = block(layout=layout, eval_capacity_factor=2.0).eval()
    torch.nn.init.zeros_(made.gate.weight)
    _, routing = made.mix(torch.randn(4, 6, 16))
    kept = routing.indices.view(4, 6) == 0
    assert (kept[:2].all() and not kept[2:].any()) if first == "rows" else (kept[:, :3].all() and not kept[:, 3:].any())


def test_selection_by_group_and_by_gate_follow_their_rules_in_training():
    x = torch.randn(4, 8, 16, generator=seeded(4))
    made = block(selection="group", capacity_groups=2, layout="sequence_major", capacity_factor=1.0).train()
    torch.nn.init.zeros_(made.gate.weight)
    kept = made.mix(x)[1].indices.view(4, 8) == 0
    assert kept.T.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    made = block(selection="probs", capacity_factor=0.5).train()
    routing = made.mix(x)[1]
    best = routing.probs.max(-1)
    for e in range(E):
        mine = best.indices == e
        kept = (routing.indices.flatten() == e) & mine
        if kept.any() and (mine & ~kept).any():
            assert best.values[kept].min() >= best.values[mine & ~kept].max()


@pytest.mark.parametrize("training", [False, True])
def test_padding_takes_no_place_and_changes_nothing(training):
    model, x, y = small(capacity_factor=1.0, eval_capacity_factor=1.0, selection="prefix"), ids(3, 6), ids(3, 5, seed=1)
    y[0, 3:] = -100
    wide_x, wide_y = F.pad(x, (0, 4), value=PAD), F.pad(y, (0, 3), value=-100)
    model.train(training)
    a, b = model(input_ids=x, labels=y), model(input_ids=wide_x, labels=wide_y)
    torch.testing.assert_close(b.loss, a.loss)
    torch.testing.assert_close(b.logits[:, :5][y != -100], a.logits[y != -100], rtol=1e-5, atol=1e-5)
    for half, real in (("encoder_routing", wide_x != PAD), ("decoder_routing", wide_y != -100)):
        for routing in getattr(b, half):
            assert (routing.indices.view(real.shape)[~real] == E).all()


def test_batches_of_padding_alone_and_fewer_tokens_than_experts_are_legal():
    model = small().train()
    out = model(input_ids=torch.full((2, 3), PAD), labels=torch.full((2, 4), -100))
    assert out.loss == 0 and out.aux_loss == 0
    out.loss.backward()
    out = model(input_ids=ids(1, 2), labels=ids(1, 1))
    assert out.loss.isfinite()
    model.eval()
    assert model.generate(input_ids=ids(1, 1), max_new_tokens=2).shape[1] >= 2


def test_the_loss_is_that_of_the_labels_and_of_what_the_gates_wanted():
    model, x, y = small(capacity_factor=0.3).train(), ids(3, 6), ids(3, 5, seed=1)
    x[0, 4:], y[1, 2:] = PAD, -100
    out = model(input_ids=x, labels=y)
    want = torch.tensor(0.0)
    for half, real in ((out.encoder_routing, x != PAD), (out.decoder_routing, y != -100)):
        for r in half:
            seen = real.flatten()
            want = want + 0.01 * load_balance_loss(r.probs[seen], r.logits[seen].argmax(-1, keepdim=True))
    torch.testing.assert_close(out.aux_loss, want)
    tokens = F.cross_entropy(out.logits[y != -100], y[y != -100])
    torch.testing.assert_close(out.loss, tokens + want)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_one_process_with_a_shared_batch_has_the_same_loss():
    model, x, y = small(selection="prefix").train(), ids(3, 6), ids(3, 5, seed=1)
    y[1, 2:] = -100
    shared = model(input_ids=x, labels=y, shared_batch=SharedBatch())
    torch.testing.assert_close(shared.loss, model(input_ids=x, labels=y).loss)


def test_the_encoder_sees_both_ways_and_the_decoder_no_later_token():
    model, x, y = small(eval_capacity_factor=0.0), ids(2, 6), ids(2, 5, seed=1)
    other_x, other_y = x.clone(), y.clone()
    other_x[:, -1], other_y[:, 3] = 3 + (x[:, -1] - 2) % 36, 3 + (y[:, 3] - 2) % 36
    base = model(input_ids=x, decoder_input_ids=y).logits
    assert (model(input_ids=other_x, decoder_input_ids=y).logits - base).abs().amax(-1).min() > 0
    later = model(input_ids=x, decoder_input_ids=other_y).logits
    torch.testing.assert_close(later[:, :3], base[:, :3], rtol=1e-5, atol=1e-5)
    assert (later[:, 3:] - base[:, 3:]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generating_with_a_cache_gives_what_it_gives_without(options):
    model, x = small(eval_capacity_factor=0.0), ids(3, 6)
    x[1, 4:] = PAD
    with_cache = model.generate(input_ids=x, max_new_tokens=7, do_sample=False, **options)
    without = model.generate(input_ids=x, max_new_tokens=7, do_sample=False, use_cache=False, **options)
    assert torch.equal(with_cache, without) and len(with_cache.unique()) > 3
    if not options:
        alone = model.generate(input_ids=x[1:2, :4], max_new_tokens=7, do_sample=False)
        assert torch.equal(with_cache[1, : alone.shape[1]], alone[0])  # padding of the batch changes nothing
        scored = model(input_ids=x, decoder_input_ids=with_cache[:, :-1]).logits.argmax(-1)
        live = with_cache[:, :-1] != PAD
        assert torch.equal(scored[live], with_cache[:, 1:][live])


def test_the_model_comes_back_from_disk_to_the_bit_by_its_auto_class(tmp_path):
    model, x = small(num_experts=[2, 3, 5]), ids()
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())
    torch.testing.assert_close(again(input_ids=x, labels=x).logits, model(input_ids=x, labels=x).logits)
    c = AutoConfig.from_pretrained(tmp_path)
    assert (c.encoder_experts, c.decoder_experts) == ([0, 2, 0, 3], [0, 5])
    assert again.lm_head.weight is again.decoder.embed_tokens.weight is again.encoder.embed_tokens.weight


def test_the_embedding_may_be_scaled_where_it_is_read_and_not_where_it_predicts():
    model, plain, x = small(embed_scale=3.0), small(), ids()
    want = plain.encoder(inputs_embeds=3 * plain.encoder.embed_tokens(x), attention_mask=torch.ones_like(x))
    torch.testing.assert_close(model.encoder(input_ids=x).last_hidden_state, want.last_hidden_state)
    hidden, _ = model.decoder(x, want.last_hidden_state)
    logits = model(encoder_outputs=(want.last_hidden_state,), decoder_input_ids=x).logits
    torch.testing.assert_close(logits, hidden @ plain.lm_head.weight.T)
    assert not torch.equal(hidden, plain.decoder(x, want.last_hidden_state)[0])


def test_gates_stay_in_float32_under_autocast():
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=ids(), labels=ids())
    assert all(r.logits.dtype == torch.float32 for r in out.routing)


def test_checkpointed_layers_refuse_chance_that_they_cannot_draw_again():
    model = small().train()
    model.activation_checkpointing_enable()
    model.select_with(seeded(0))
    source, labels = torch.tensor([[5, 6]]), torch.tensor([[7, 1]])
    with pytest.raises(ValueError, match=r"gradient checkpointing needs torch's own chance; call select_with\(None\)"):
        model(input_ids=source, labels=labels)
    assert model.eval()(input_ids=source, labels=labels).loss.isfinite()  # nothing is drawn in evaluation
    model.select_with(None)
    model.train()(input_ids=source, labels=labels).loss.backward()


def test_checkpointed_layers_draw_the_same_selection_again():
    def grads(checkpointed):
        model = small(capacity_factor=0.5).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(3)
        model(input_ids=ids(), labels=ids()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, again = grads(False), grads(True)
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"selection": "first"},
            r"capacity_policy must be one of \['random', 'prefix', 'group', 'probs'\], got 'first'",
        ),
        ({"layout": "flat"}, r"layout must be one of \['batch_major', 'sequence_major'\], got 'flat'"),
        ({"capacity_factor": -1.0}, r"capacity_factor must be >= 0 \(0 for no limit\), got -1.0"),
        ({"num_experts": [4, 4]}, r"num_experts must be a number, or 3 of at least 1 for the mixtures, got \[4, 4\]"),
        ({"num_experts_per_tok": 2}, "the encoder-decoder has num_experts_per_tok=1 only, got 2"),
        ({"decoder_layers": 0}, "decoder_layers must be at least 1, got 0"),
        ({"router_jitter": 1.5}, r"router_jitter must be in \[0, 1\), got 1.5"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_a_pass_without_targets_is_refused():
    with pytest.raises(ValueError, match="give labels or decoder_input_ids, got neither"):
        small()(input_ids=ids())
