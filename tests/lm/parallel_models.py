"""Two tiny decoders in float64 on which trainings over processes are compared."""

import torch

from mixtura.lm.model import MixturaConfig, MixturaForCausalLM

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


MODELS = {"even": even_model, "pyramid": pyramid_model}
