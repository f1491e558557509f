"""Look inside a mixture: which experts fire on which domain and which tokens, how even the load is, where the bits went.

Shapes: L mixture layers, M domains, E experts, V vocabulary, T tokens.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.core.checkpoint import write_json
from mixtura.core.page import figure_html, new_figure, table_html, write_page
from mixtura.core.progress import progress
from mixtura.lm.anatomy import MoEBlock, find_moe, recorded_routing, run_layers
from mixtura.lm.tokens import blocks

__all__ = ["RoutingReport", "expert_bits", "inspect"]

TOP_TOKENS = 8
SEEN_AT_LEAST = 5  # visits before a token is said to be typical of an expert


@dataclass(frozen=True)
class RoutingReport:
    """What :func:`inspect` found.

    Attributes:
        domains: names of the M domains.
        layers: paths of the L mixture layers.
        share: share of a domain's visits that go to each expert, [L][M][E]; each row sums to 1. Where layers differ in their
            number of experts, those that a layer does not have stand last, at 0.
        entropy: evenness of the load over all domains, [L]: 1 when experts share it evenly, 0 when one takes all.
        variation: standard deviation of the load over its mean, [L].
        top_tokens: [L][E], the tokens that visit the expert most often beyond chance, with the ratio to chance.
        bits: bits of each expert, [L][E]; empty where the experts are not packed.
        tokens: tokens read of each domain.
    """

    domains: list[str]
    layers: list[str]
    share: list[list[list[float]]]
    entropy: list[float]
    variation: list[float]
    top_tokens: list[list[list[tuple[str, float]]]]
    bits: list[list[int]]
    tokens: dict[str, int]

    def to_json(self, path: str | Path) -> None:
        """Write all figures as JSON."""
        write_json(path, asdict(self))

    def to_html(self, path: str | Path, *, title: str = "Inside the mixture") -> None:
        """Write a self-contained page."""
        n_experts = " or ".join(str(n) for n in sorted({len(tokens) for tokens in self.top_tokens}))
        lead = f"{len(self.layers)} mixture layers of {n_experts} experts; " + ", ".join(
            f"{count:,} tokens of {name}" for name, count in self.tokens.items()
        )
        sections = [
            (
                "Experts by domain",
                figure_html(self.domain_figure(), "Share of each domain's visits that go to each expert."),
            ),
            ("Layer by layer", figure_html(self.layer_figure(), "The same for every layer, one panel a domain.")),
            ("Load", figure_html(self.load_figure(), "Evenness of the load: 1 when the experts share it evenly.")),
        ]
        if self.bits:
            sections.append(("Bits", figure_html(self.bits_figure(), "Bits of each expert in each layer.")))
        sections.append(("What each expert likes", self._tokens_html()))
        write_page(path, title=title, lead=lead, sections=sections)

    def domain_figure(self) -> Any:
        """Heat map of domains by experts, averaged over layers."""
        mean = torch.tensor(self.share).mean(0)
        figure = new_figure(max(5.0, 0.6 * mean.shape[1] + 2), 0.5 * len(self.domains) + 1.4)
        _heat(figure, figure.add_subplot(), mean, "expert", self.domains)
        return figure

    def layer_figure(self) -> Any:
        """One heat map a domain: experts over layers."""
        share = torch.tensor(self.share)
        figure = new_figure(9.5, 1.0 + 0.18 * share.shape[2] * len(self.domains) + 0.8 * len(self.domains))
        panels = figure.subplots(len(self.domains), 1, squeeze=False)[:, 0]
        for m, axes in enumerate(panels):
            _heat(figure, axes, share[:, m].T, "layer" if m == len(panels) - 1 else "", None)
            axes.set_title(self.domains[m], loc="left", fontsize=10)
            axes.set_ylabel("expert")
        return figure

    def load_figure(self) -> Any:
        """Evenness of the load over layers."""
        figure = new_figure(9.5, 2.6)
        axes = figure.add_subplot()
        axes.plot(range(len(self.entropy)), self.entropy, "o-", color="#2b6cb0", markersize=3)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("layer")
        axes.set_ylabel("entropy / log E")
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def bits_figure(self) -> Any:
        """Bits over experts and layers."""
        figure = new_figure(9.5, 1.2 + 0.28 * len(self.bits[0]))
        axes = figure.add_subplot()
        grid = torch.tensor(self.bits).T
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=1)
        axes.set_xlabel("layer")
        axes.set_ylabel("expert")
        figure.colorbar(image, ax=axes, label="bits", ticks=sorted(set(grid.flatten().tolist())))
        return figure

    def _tokens_html(self) -> str:
        parts = []
        for layer, experts in zip(self.layers, self.top_tokens, strict=True):
            rows = [
                [str(e), "  ".join(f"{token!r} ×{lift:.1f}" for token, lift in tokens)]
                for e, tokens in enumerate(experts)
            ]
            table = table_html(["expert", "tokens that visit it more often than chance"], rows)
            parts.append(f"<details><summary>{html.escape(layer)}</summary>{table}</details>")
        return "".join(parts)


@torch.inference_mode()
def inspect(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Sequence[str]],
    *,
    samples: int = 16,
    length: int = 256,
    batch_size: int = 8,
) -> RoutingReport:
    """Read texts with a mixture of experts and count who visits whom.

    Args:
        model, tokenizer: any mixture of experts.
        texts: domain -> documents.
        samples, length: blocks a domain and tokens a block.
        batch_size: blocks at a time.
    Raises:
        ValueError: a dense model (its class is named), or a domain with too little text for one block.
    """
    found = find_moe(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no mixture layers to look into; upcycle it first")
    each = [block.n_experts for block in found]
    E, L = max(each), len(found)
    V = max(len(tokenizer), int(model.config.get_text_config().vocab_size))
    by_domain = torch.zeros(L, len(texts), E, dtype=torch.float64)
    by_token = torch.zeros(L, E, V, dtype=torch.float32)
    counts: dict[str, int] = {}
    mode = model.training
    model.eval()
    try:
        for m, (name, documents) in enumerate(texts.items()):
            rows = blocks(tokenizer, documents, length, limit=samples)
            counts[name] = rows.numel()
            for batch in progress(rows.split(batch_size), desc=f"inspect {name}", unit="batch"):
                with recorded_routing(found) as routings:
                    run_layers(model, batch)
                for i, block in enumerate(found):
                    _count(
                        routings[block.name].indices.cpu(),
                        batch.flatten(),
                        by_domain[i, m, : each[i]],
                        by_token[i, : each[i]],
                    )
    finally:
        model.train(mode)
    load = by_domain.sum(1)
    load = load / load.sum(-1, keepdim=True)
    most = torch.tensor(each, dtype=torch.float64).log()
    # A single expert shares evenly with itself; its entropy and the most there could be are both 0.
    entropy = torch.where(most > 0, -(load * load.clamp(min=1e-30).log()).sum(-1) / most, 1.0)
    return RoutingReport(
        domains=list(texts),
        layers=[block.name for block in found],
        share=(by_domain / by_domain.sum(-1, keepdim=True)).tolist(),
        entropy=entropy.tolist(),
        variation=[float(load[i, :n].std(correction=0) / load[i, :n].mean()) for i, n in enumerate(each)],
        top_tokens=[[_typical(by_token[i], e, tokenizer) for e in range(each[i])] for i in range(L)],
        bits=expert_bits(found),
        tokens=counts,
    )


def expert_bits(blocks: Sequence[MoEBlock]) -> list[list[int]]:
    """Bits of each expert, [L][E]; empty where the experts are not packed."""
    found: list[Any] = [block.experts for block in blocks]
    return [experts.bits.tolist() for experts in found if hasattr(experts, "bits")]


def _count(indices: Tensor, tokens: Tensor, domain: Tensor, by_token: Tensor) -> None:
    E, V = by_token.shape
    visits, words = indices.flatten(), tokens.repeat_interleave(indices.shape[1])
    real = visits < E  # a skipped visit counts nowhere
    visits, words = visits[real], words[real]
    domain += visits.bincount(minlength=E)
    by_token += (visits * V + words).bincount(minlength=E * V).view(E, V)


def _typical(by_token: Tensor, expert: int, tokenizer: Any) -> list[tuple[str, float]]:
    """Tokens whose share of visits to the expert exceeds the expert's share of all visits most."""
    mine, all_visits = by_token[expert], by_token.sum(0)
    if mine.sum() == 0:
        return []
    chance = mine.sum() / by_token.sum()
    lift = torch.where(mine >= SEEN_AT_LEAST, mine / all_visits.clamp(min=1) / chance, 0.0)
    best = lift.topk(min(TOP_TOKENS, len(lift)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(tokenizer.decode([token]), value) for token, value in pairs if value > 1]


def _heat(figure: Any, axes: Any, values: Tensor, xlabel: str, names: Sequence[str] | None) -> None:
    image = axes.imshow(values, aspect="auto", cmap="magma", vmin=0)
    axes.set_xlabel(xlabel)
    if names is not None:
        axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axes, label="share of visits")
