"""Branch, attend, mix: several specialists of one ancestor become one mixture that keeps all their parameters.

1. **branch**: copies of a dense seed train alone, each on its domain with a little general text.
2. **mix**: the specialists *and the untouched seed* become one model. Feed-forward parts and attentions become experts;
   embeddings, head and norms are averaged. The attention gate is soft (every attention runs), the feed-forward gate takes the
   best and keeps its softmax value, so that it learns from the loss even when one expert is chosen.
3. The mixture trains on all domains in equal shares.

Attention and feed-forward part have a router each. A block that the seed computes in sequence stays sequential, a parallel one
parallel.

Source: BAM! Just Like That (2408.08274), sec. 3; without its attention experts it is BTX (2403.07816), in
:mod:`mixtura.lm.upcycle.branch_train_mix`.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mixtura.core.training import TrainConfig, fit
from mixtura.lm.families import Dense, build, read_dense
from mixtura.lm.families.dense import Source
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.tokens import mixed_batch_at
from mixtura.lm.upcycle.stack import averaged, drawn, feed_forward, is_expert, stacked

__all__ = ["BranchAttendConfig", "branch", "mix", "vocabularies_agree"]

log = logging.getLogger(__name__)

ATTENTION = ("expert-kv", "shared-kv", "average")
# Settings that change no computation, in which branches may differ.
FREE = {
    "initializer_range",
    "attention_dropout",
    "use_cache",
    "dtype",
    "architectures",
    "transformers_version",
    "_name_or_path",
}
PER_EXPERT = ("q_proj", "k_proj", "v_proj", "o_proj")
KEYS_AND_VALUES = (".k_proj", ".v_proj", ".k_norm.")


@dataclass(frozen=True, kw_only=True)
class BranchAttendConfig:
    """How the branches are mixed.

    Attributes:
        attention: ``expert-kv`` (every expert its own keys and values), ``shared-kv`` (averaged keys and values, one cache)
            or ``average`` (no attention experts: the baseline BTX).
        ffn_top_k: feed-forward experts a token visits.
        balance, z: factors of the losses on the feed-forward router, summed over blocks; the paper names none, these are the
            values of the works it cites.
        router_std: standard deviation of both routers' first values.
        routing: ``soft`` as in the paper; ``top1`` and ``top2`` are its ablation.
        renormalise: make the chosen feed-forward gates sum to 1. None does so from two experts a token on. With one it is off
            as in the paper, since the router would get no gradient from the loss; two random gates that do not sum to 1
            have about half the weight, and SmolLM2-135M then starts at a perplexity of 304 instead of 36.
    """

    attention: Literal["expert-kv", "shared-kv", "average"] = "expert-kv"
    ffn_top_k: int = 1
    balance: float = 0.01
    z: float = 0.001
    router_std: float = 0.02
    routing: Literal["soft", "top1", "top2"] = "soft"
    renormalise: bool | None = None

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ValueError(f"attention must be one of {list(ATTENTION)}, got {self.attention!r}")
        if self.ffn_top_k < 1:
            raise ValueError(f"ffn_top_k must be at least 1, got {self.ffn_top_k}")
        if self.balance < 0 or self.z < 0 or self.router_std < 0:
            raise ValueError("balance, z and router_std must be >= 0")
        if self.attention == "average" and self.routing != "soft":
            raise ValueError(
                f"routing={self.routing!r} has no effect with attention='average': it has no attention experts"
            )


def branch(
    seed: PreTrainedModel,
    domains: Mapping[str, Tensor],
    *,
    general: Tensor | None = None,
    general_share: float = 0.10,
    train: TrainConfig,
    batch_size: int = 16,
    include_seed: bool = True,
    out: Path | None = None,
) -> dict[str, PreTrainedModel]:
    """Train a copy of the seed on each domain.

    Args:
        seed: dense model; left as it is.
        domains: name -> token blocks (N, L) to train on.
        general: token blocks of general text, mixed into every domain; None trains on the domain alone.
        general_share: share of general text in a batch, in [0, 1).
        train: steps and rate of each branch (the paper: half the peak rate of pretraining).
        batch_size: blocks a step.
        include_seed: put the untouched seed first, under ``"seed"``, as the paper's mixture needs it.
        out: directory for one resumable checkpoint a domain. Branches are independent of each other, so separate processes
            may each train one by giving one domain and the same directory.
    Returns:
        Name -> model, in the order of ``domains``.
    """
    if not domains:
        raise ValueError("domains must name at least one domain")
    if not 0 <= general_share < 1:
        raise ValueError(f"general_share must be in [0, 1), got {general_share}")
    if include_seed and "seed" in domains:
        raise ValueError("a domain must not be called 'seed': the untouched seed goes by that name")
    read_dense(seed)
    models: dict[str, PreTrainedModel] = {"seed": seed} if include_seed else {}
    for name, blocks in domains.items():
        sources = {name: blocks} if general is None else {name: blocks, " general": general}
        shares = {name: 1.0} if general is None else {name: 1.0 - general_share, " general": general_share}
        model = copy.deepcopy(seed)

        def loss_at(step: int, model: Any = model, sources: Any = sources, shares: Any = shares) -> Tensor:
            batch = mixed_batch_at(sources, shares, step, batch_size, seed=train.seed).to(model.device)
            return model(input_ids=batch, labels=batch, use_cache=False).loss

        fit(model, loss_at, train, out=out / name if out else None, label=f"branch {name}")
        models[name] = model.eval()
    return models


def mix(
    models: Mapping[str, PreTrainedModel | str | Path],
    config: BranchAttendConfig = BranchAttendConfig(),
    *,
    generator: torch.Generator | None = None,
) -> MixturaForCausalLM:
    """Build the mixture of branches of one ancestor.

    Args:
        models: name -> dense model or path, the seed among them; all of one family, shape and vocabulary. Left as they are.
        config: kind of mixture.
        generator: draws both routers; None draws from seed 0.
    Returns:
        A ``MixturaForCausalLM`` with N experts in the order of ``models``, which ``config.expert_names`` keeps; in
        evaluation mode.
    Raises:
        ValueError: fewer than two models, more experts a token than models, or models that differ: the first differing field
            and both values are named.
    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
        >>> mixture = mix({"seed": LlamaForCausalLM(tiny), "code": LlamaForCausalLM(tiny)})
        >>> mixture.config.attention_experts, mixture.model.layers[0].self_attn.q_proj.shape
        (2, torch.Size([2, 32, 32]))
    """
    if len(models) < 2:
        raise ValueError(f"models must hold at least 2 models (the specialists and their seed), got {len(models)}")
    if config.ffn_top_k > len(models):
        raise ValueError(f"ffn_top_k must be at most the number of models, {len(models)}, got {config.ffn_top_k}")
    branches = {name: read_dense(model) for name, model in models.items()}
    _check_alike(branches)
    paths = {name: Path(m) for name, m in models.items() if isinstance(m, (str, Path)) and Path(m).is_dir()}
    vocabularies_agree({name: _vocabulary(path) for name, path in paths.items()})
    seed = int(torch.randint(2**31, (1,), generator=generator)) if generator is not None else 0
    ours = _mixture_config(branches, config)
    rules = _Rules(
        [d.tensor for d in branches.values()], ours, config.router_std, seed, next(iter(branches.values())).dtype
    )
    first = next(iter(branches.values()))
    model = build(ours, rules.tensor, generation_config=first.generation_config)
    for i, j in sorted(rules.clones):
        names = list(branches)
        log.warning("%s and %s are identical, so their experts start as clones of each other", names[i], names[j])
    return model


def vocabularies_agree(vocabularies: Mapping[str, Mapping[str, int]]) -> None:
    """Check that tokenizers give every token the same number.

    Args:
        vocabularies: name of the model -> its tokenizer's token -> number.
    Raises:
        ValueError: names two models and the first token on which they differ, with both numbers.
    """
    known = {name: v for name, v in vocabularies.items() if v}
    if not known:
        return
    first, reference = next(iter(known.items()))
    for name, vocabulary in known.items():
        if vocabulary == reference:
            continue
        token = next(t for t in [*reference, *vocabulary] if reference.get(t) != vocabulary.get(t))
        raise ValueError(
            f"tokenizers differ: token {token!r} is {reference.get(token)} in {first!r} and {vocabulary.get(token)} in "
            f"{name!r}; branches must share the tokenizer of their seed"
        )


class _Rules:
    """Parameter of the mixture by name; notes which models have been identical so far."""

    def __init__(self, sources: Sequence[Source], config: MixturaConfig, std: float, seed: int, dtype: torch.dtype):
        self.sources, self.config, self.std, self.seed, self.dtype = sources, config, std, seed, dtype
        self.clones = set(combinations(range(len(sources)), 2))

    def tensor(self, name: str) -> Tensor:
        config = self.config
        if name.endswith((".mlp.gate.weight", ".self_attn.router.weight")):
            shape = (len(self.sources), config.hidden_size)
            return drawn(name, shape, std=self.std, seed=self.seed, dtype=self.dtype)
        if is_expert(name):
            return self._noted(feed_forward(name, self.sources))
        if config.attention != "mixture" or ".self_attn." not in name:
            return averaged(name, self.sources)
        return self._attention(name)

    def _attention(self, name: str) -> Tensor:
        dense = name
        for part in PER_EXPERT:
            if name.endswith(f"{part}_bias"):
                dense = name.removesuffix("_bias") + ".bias"
            elif name.endswith(f".{part}"):
                dense = f"{name}.weight"
        alone = self.config.attention_kv == "shared" and any(part in name for part in KEYS_AND_VALUES)
        value = averaged(dense, self.sources)[None] if alone else self._noted(stacked(dense, self.sources))
        # Norms of each head are stored (N, 1, C), so that they broadcast over the heads.
        return value[:, None] if "_norm." in name and self.config.qk_norm == "head" else value

    def _noted(self, experts: Tensor) -> Tensor:
        self.clones = {(i, j) for i, j in self.clones if torch.equal(experts[i], experts[j])}
        return experts


def _mixture_config(branches: Mapping[str, Dense], config: BranchAttendConfig) -> MixturaConfig:
    ours = copy.deepcopy(next(iter(branches.values())).config)
    n = len(branches)
    if config.attention != "average":
        ours.attention, ours.attention_experts = "mixture", n
        ours.attention_kv, ours.attention_routing = config.attention.removesuffix("-kv"), config.routing
    ours.num_experts, ours.num_experts_per_tok = n, config.ffn_top_k
    ours.norm_topk_prob = config.ffn_top_k > 1 if config.renormalise is None else config.renormalise
    ours.router_aux_loss_coef, ours.router_z_loss_coef = config.balance, config.z
    ours.expert_names = list(branches)
    return ours


def _check_alike(branches: Mapping[str, Dense]) -> None:
    (first, reference), *others = branches.items()
    facts = _facts(reference)
    for name, dense in others:
        for field, value in _facts(dense).items():
            if value != facts.get(field):
                raise ValueError(
                    f"{first!r} and {name!r} differ in {field}: {facts.get(field)!r} and {value!r}; branches must be copies "
                    "of one seed, trained on"
                )


def _facts(dense: Dense) -> dict[str, Any]:
    facts = {k: v for k, v in dense.config.to_dict().items() if k not in FREE}
    return {"architecture": dense.family, **facts, "dtype": dense.dtype}


def _vocabulary(folder: Path) -> dict[str, int]:
    if not (folder / "tokenizer.json").exists():
        return {}
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).get_vocab()
