"""Tiny models in float64 on which trainings over processes are compared, and chance that one process draws like many."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from itertools import pairwise
from unittest import mock

import torch

from mixtura.core.gates import Routing
from mixtura.lm.model import (
    MixturaConfig,
    MixturaForCausalLM,
    MultitaskMoEConfig,
    MultitaskMoEForConditionalGeneration,
)
from mixtura.lm.model.limited_experts import LimitedExpertsBlock
from mixtura.lm.model.parts import MixturaRouter
from mixtura.lm.training import language_loss

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "router_aux_loss_coef": 0.5,  # large, so that a mistake in it shows
    "router_z_loss_coef": 0.1,
    "attn_implementation": "eager",
}
EVEN = {"num_hidden_layers": 2, "num_experts": 4, "shared_expert_intermediate_size": 8, "dense_layers": [0]}


def even_model():
    """A dense layer and one of four experts with a shared one beside them, balance by sequence and by device."""
    torch.manual_seed(1)
    config = MixturaConfig(**TINY, **EVEN, balance_per="sequence", device_balance_coef=0.3, device_groups=2)
    config._experts_implementation = "eager"
    return MixturaForCausalLM(config).double()


def pyramid_model():
    """Two experts, then four, one a token; expert 3 scores the mean of the others, so it is never the best at the start."""
    torch.manual_seed(2)
    config = MixturaConfig(**TINY, num_hidden_layers=2, num_experts=[2, 4], num_experts_per_tok=1, norm_topk_prob=False)
    config._experts_implementation = "mixtura"
    model = MixturaForCausalLM(config)
    with torch.no_grad():
        gate = model.model.layers[1].mlp.gate.weight
        gate[3] = gate[:3].mean(0)
    return model.double()


def translator_model(**changes):
    """An encoder-decoder of four experts, then two, each with places for less than its share, and noise at its gates."""
    torch.manual_seed(3)
    options = {"encoder_layers": 2, "decoder_layers": 2, "num_experts": [4, 2], "min_capacity": 1, "router_jitter": 0.2}
    options |= {"initializer_range": 0.3, "pad_token_id": 0, "decoder_start_token_id": 1, "capacity_factor": 0.8}
    options["attn_implementation"] = "sdpa"  # the eager one softens in float32, where a row of padding is NaN
    config = MultitaskMoEConfig(**TINY | {"moe_intermediate_size": None} | options | changes)
    config._experts_implementation = "eager"
    return MultitaskMoEForConditionalGeneration(config).double()


def sparse_model(**changes):
    """Two and four experts of one matrix, read by their router; places for less than their share, and one beside them."""
    torch.manual_seed(4)
    options = {"num_hidden_layers": 2, "num_experts": [2, 4], "router": "sparsity", "initializer_range": 0.3}
    options |= {"hidden_act": "relu", "mlp_gated": False, "mlp_bias": True, "capacity_factor": 0.9, "min_capacity": 1}
    options |= {"shared_expert_intermediate_size": 8, "shared_combine": "coefficient"}
    config = MixturaConfig(**TINY | options | changes)
    config._experts_implementation = "eager"
    return MixturaForCausalLM(config).double()


def sparse_full_model():
    """The same with gated experts without biases, and a router that reads the exact variance."""
    return sparse_model(mlp_gated=True, mlp_bias=False, router_statistics="full")


MODELS = {
    "even": even_model,
    "pyramid": pyramid_model,
    "translator": translator_model,
    "sparse": sparse_model,
    "sparse, full": sparse_full_model,
}
CHANCE = {
    "translator",
    "sparse",
    "sparse, full",
}  # whose trainings draw: what one process draws depends on the rows it holds


# The same without chance and limits: whoever holds which rows, they compute what one process does.
FREE = {
    "even": even_model,
    "pyramid": pyramid_model,
    "translator": lambda **changes: translator_model(capacity_factor=0.0, router_jitter=0.0, **changes),
    "sparse": lambda **changes: sparse_model(capacity_factor=0.0, **changes),
}


def loss_of(model, rows, shared):
    """The loss of a model on rows (B, L): of the next token, or of the source read backwards."""
    if model.config.is_encoder_decoder:
        return model(input_ids=rows, labels=rows.flip(1), shared_batch=shared, use_cache=False).loss
    return language_loss(model, rows, balance=0.5, z=0.1, shared=shared)


def start_chance(step, place):
    """Start the stream of chance of a step for the process that holds the part number ``place`` of the rows."""
    torch.manual_seed(100 * step + place)


@contextmanager
def replayed(bounds: list[int], step: int) -> Iterator[None]:
    """Let one process with all rows draw for each part of them what the process that holds it draws.

    ``bounds`` are the rows at which parts begin and end. Capacity, noise and selection are then those of many processes, and
    all else is computed on the whole batch.
    """
    states = []
    for place in range(len(bounds) - 1):
        start_chance(step, place)
        states.append(torch.get_rng_state())
    mix, limited = LimitedExpertsBlock.mix, MixturaRouter._limited

    def by_part(part):
        found = []
        for place, span in enumerate(pairwise(bounds)):
            torch.set_rng_state(states[place])
            found.append(part(*span))
            states[place] = torch.get_rng_state()
        return found

    def mixed(self, hidden, mask=None):
        made = by_part(lambda a, b: mix(self, hidden[a:b], None if mask is None else mask[a:b]))
        return torch.cat([y for y, _ in made]), _joined([routing for _, routing in made])

    def selected(self, routing, tokens=None):
        length = len(routing.indices) // bounds[-1]

        def part(a, b):
            rows = {f.name: getattr(routing, f.name)[a * length : b * length] for f in fields(Routing)}
            return limited(self, replace(routing, **rows), None if tokens is None else tokens[a:b])

        return _joined(by_part(part))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(LimitedExpertsBlock, "mix", mixed))
        stack.enter_context(mock.patch.object(MixturaRouter, "_limited", selected))
        yield


def _joined(routings):
    return Routing(**{f.name: torch.cat([getattr(r, f.name) for r in routings]) for f in fields(Routing)})
