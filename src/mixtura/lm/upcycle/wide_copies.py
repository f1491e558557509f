"""A dense model as a wide sparse one that can be read: random parts of its feed-forward layer as ReLU experts.

Every expert takes a random 1 / split of the dense layer's hidden units, another part each, and its input matrix is multiplied by
1 + noise: equal copies would tie in every score of a router that reads sparsity. Where the dense activation is smooth it becomes
ReLU. What an expert writes is multiplied by ``split``, so that on average the mixture starts as the dense model; it has to be
trained on to be good.

Source: MoE-X (2503.07639), sec. 5 (upcycling); the random parts and the noise are this library's rule.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.lm.families import build, native_family, read_dense
from mixtura.lm.families.dense import Source
from mixtura.lm.model import MixturaConfig
from mixtura.lm.upcycle.stack import EXPERT, drawn

__all__ = ["WideCopyConfig", "wide_copies"]


@dataclass(frozen=True, kw_only=True)
class WideCopyConfig:
    """How a dense feed-forward part becomes sparse experts.

    Attributes:
        n_experts, top_k: experts of a layer, and those that a token visits.
        split: an expert has 1 / split of the dense hidden units; with ``split = top_k`` a token costs what it did.
        noise: standard deviation of the factors on the experts' input matrices, around 1.
        router: ``"sparsity"`` or ``"linear"``.
        statistics: of the sparsity router.
        activation: ``"relu"``, or ``"keep"`` for the dense model's own.
        gate: what a gated feed-forward part becomes: ``"refuse"``, since its units are products of two maps, or ``"relu"``: its
            gate's activation becomes ReLU, which decides what fires, and the router reads the gate's matrix.
        balance: factor of the load-balance loss.
        router_std: standard deviation of a linear router's first values.
        seed: parts, noise and router.
    """

    n_experts: int = 8
    top_k: int = 2
    split: int = 2
    noise: float = 0.02
    router: str = "sparsity"
    statistics: str = "diagonal"
    activation: str = "relu"
    gate: str = "refuse"
    balance: float = 0.01
    router_std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_experts < 2:
            raise ValueError(f"n_experts must be at least 2, got {self.n_experts}")
        if not 1 <= self.top_k <= self.n_experts:
            raise ValueError(f"top_k must be between 1 and n_experts={self.n_experts}, got {self.top_k}")
        if self.split < 1:
            raise ValueError(f"split must be at least 1, got {self.split}")
        if self.noise < 0 or self.router_std < 0:
            raise ValueError("noise and router_std are standard deviations and must be >= 0")
        choices = {"router": ("linear", "sparsity"), "activation": ("relu", "keep"), "gate": ("refuse", "relu")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {getattr(self, name)!r}")


def wide_copies(model: PreTrainedModel | str | Path, config: WideCopyConfig) -> PreTrainedModel:
    """Turn a dense model into a wide sparse mixture.

    Args:
        model: dense model, or a path or hub name, which is read tensor by tensor. It is left as it is.
        config: number and kind of experts.
    Returns:
        A ``MixturaForCausalLM`` in evaluation mode (no transformers family has such a router). With ``split=1``, ``noise=0``
        and ``activation="keep"`` its logits equal the dense model's to rounding.
    Raises:
        ValueError: hidden units that ``split`` does not divide, or a gated feed-forward part without ``gate="relu"``; see also
            :func:`mixtura.lm.families.read_dense`.
    """
    dense = read_dense(model)
    hidden = dense.config.intermediate_size
    if hidden % config.split:
        raise ValueError(f"split={config.split} must divide the {hidden} hidden units of {dense.name}")
    if dense.config.mlp_gated and config.gate == "refuse":
        raise ValueError(
            f"{dense.name} ({dense.family}) has a gated feed-forward part, whose units are products of two maps; readable "
            "experts need one input matrix (GPT-NeoX, Phi, Falcon). gate='relu' converts it anyway: ReLU on the gate"
        )
    ours = _mixture_config(dense.config, config, hidden)

    def tensor(name: str) -> Tensor:
        if name.endswith(".mlp.gate.weight"):
            shape = (config.n_experts, ours.hidden_size)
            return drawn(name, shape, std=config.router_std, seed=config.seed, dtype=dense.dtype)
        if EXPERT.match(name):
            return _experts(name, dense.tensor, config, hidden)
        return dense.tensor(name).clone()

    return build(ours, tensor, family=native_family(ours), generation_config=dense.generation_config)


def _mixture_config(dense: MixturaConfig, config: WideCopyConfig, hidden: int) -> MixturaConfig:
    ours = copy.deepcopy(dense)
    ours.num_experts, ours.num_experts_per_tok = config.n_experts, config.top_k
    ours.moe_intermediate_size = hidden // config.split
    ours.norm_topk_prob = True
    ours.router, ours.router_statistics = config.router, config.statistics
    ours.router_aux_loss_coef, ours.router_z_loss_coef = config.balance, 0.0
    if config.activation == "relu":
        ours.hidden_act = "relu"
    return ours


def _experts(name: str, source: Source, config: WideCopyConfig, hidden: int) -> Tensor:
    """Stacked parameter of the experts: the rows, or columns, of the units that each one has."""
    match = EXPERT.match(name)
    assert match is not None, name
    prefix, part, kind = match.group(1), match.group(2), "bias" if match.group(3) else "weight"
    if part == "down_proj" and kind == "bias":  # the weights of the chosen sum to 1
        return source(f"{prefix}down_proj.bias").repeat(config.n_experts, 1)
    units_EH = _units(prefix, config, hidden)
    if part == "down_proj":
        return source(f"{prefix}down_proj.weight")[:, units_EH].transpose(0, 1).contiguous() * config.split
    halves = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("up_proj",)
    rows = torch.cat([source(f"{prefix}{half}.{kind}")[units_EH] for half in halves], dim=1)
    if config.noise and kind == "weight":
        rows = rows * (1 + drawn(name, rows.shape, std=config.noise, seed=config.seed, dtype=rows.dtype))
    return rows


def _units(prefix: str, config: WideCopyConfig, hidden: int) -> Tensor:
    """Dense units of each expert, (E, H), without replacement and in order; the same for all tensors of a layer."""
    chances = drawn(f"{prefix}units", (config.n_experts, hidden), std=1.0, seed=config.seed, dtype=torch.float32)
    return chances.argsort(-1)[:, : hidden // config.split].sort(-1).values
