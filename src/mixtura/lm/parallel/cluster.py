"""Machines and models as numbers: what a plan is computed from when the hardware is not there."""

from dataclasses import dataclass, replace
from typing import Any

from mixtura.lm.parallel.placement import Topology

__all__ = ["PRESETS", "Cluster", "ModelShape"]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal devices, joined by links.

    Attributes:
        nodes, devices_per_node: how many.
        inter_bw: bytes a second into, and out of, one node (its devices share them).
        intra_bw: bytes a second into, and out of, one device from others of its node.
        flops: operations a second that one device sustains in large products.
        memory: bytes of one device.
        latency: seconds before a collective's first byte, for each of its messages.
    """

    nodes: int
    devices_per_node: int
    inter_bw: float
    intra_bw: float
    flops: float
    memory: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("inter_bw", "intra_bw", "flops", "memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.latency < 0:
            raise ValueError(f"latency must be >= 0, got {self.latency}")
        _ = self.topology  # refuses an empty one

    @property
    def topology(self) -> Topology:
        return Topology(self.nodes, self.devices_per_node)

    @property
    def devices(self) -> int:
        return self.topology.devices

    @staticmethod
    def preset(name: str, devices: int | None = None) -> "Cluster":
        """One of :data:`PRESETS`, with whole nodes for ``devices`` (one smaller node for fewer than a node has).

        Raises:
            ValueError: an unknown name (the known ones are listed), or devices that do not fill nodes.
        Example:
            >>> Cluster.preset("A", 16).nodes
            2
        """
        if name not in PRESETS:
            raise ValueError(f"cluster must be one of {sorted(PRESETS)}, got {name!r}")
        cluster = PRESETS[name]
        if devices is None:
            return cluster
        per = cluster.devices_per_node
        if devices < 1 or (devices > per and devices % per):
            raise ValueError(f"devices must be at most {per} or a multiple of it on cluster {name}, got {devices}")
        return replace(cluster, nodes=max(1, devices // per), devices_per_node=min(per, devices))


# A and B are the two of Hecate (2502.02581, sec. 5.1): 4 x 8 V100 on 100 Gb/s and 4 x 8 A100 on 400 Gb/s. A node's NVLink: half
# the two-way figure of its makers. Operations: what large half-precision products sustain.
PRESETS = {
    "A": Cluster(nodes=4, devices_per_node=8, inter_bw=12.5e9, intra_bw=150e9, flops=40e12, memory=32 * 2**30),
    "B": Cluster(nodes=4, devices_per_node=8, inter_bw=50e9, intra_bw=300e9, flops=120e12, memory=40 * 2**30),
    "H100x8": Cluster(nodes=1, devices_per_node=8, inter_bw=400e9, intra_bw=450e9, flops=450e12, memory=80 * 2**30),
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder as the cost model sees it; every layer in ``experts`` has that many, 0 for a dense one.

    Attributes:
        width, heads_width, hidden: of the model, of all queries together and of one expert.
        experts: routed experts of each layer.
        top_k: experts that a token visits.
        shared: hidden units of what every token visits beside them (the feed-forward width of a dense layer).
        matrices: of one expert, 3 when gated, else 2.
        vocabulary: tokens; ``tied`` says whether input and output share the table.
        sequence: tokens of one text.
        router_statistics: what a router without weights reads of the experts, ``"diagonal"`` or ``"full"``
            (:mod:`mixtura.core.sparsity_gate`); "" for one with weights.
        biased: whether the experts' hidden units have a bias, which such a router reads as one more input.
        bytes: of one weight or activation value as computed with.
    """

    width: int
    hidden: int
    experts: tuple[int, ...]
    top_k: int
    sequence: int
    heads_width: int = 0
    kv_width: int = 0
    shared: int = 0
    matrices: int = 2
    vocabulary: int = 0
    tied: bool = True
    router_statistics: str = ""
    biased: bool = False
    bytes: int = 2

    @property
    def sparse_layers(self) -> int:
        return sum(count > 0 for count in self.experts)

    @property
    def expert_parameters(self) -> int:
        """Of one expert."""
        return self.matrices * self.width * self.hidden

    @property
    def expert_bytes(self) -> int:
        """Weights of one expert."""
        return self.bytes * self.expert_parameters

    @property
    def routed_parameters(self) -> int:
        """Of all routed experts."""
        return sum(self.experts) * self.expert_parameters

    @property
    def other_parameters(self) -> int:
        """Everything but the routed experts: attention, norms, routers, what every token visits, the token tables."""
        queries = self.heads_width or self.width
        attention = 2 * self.width * queries + 2 * self.width * (self.kv_width or queries)
        layers = sum(
            attention
            + 2 * self.width
            + self.matrices * self.width * self.shared
            + (0 if self.router_statistics else count * self.width)
            for count in self.experts
        )
        return layers + self.width + (1 if self.tied else 2) * self.vocabulary * self.width

    def attention_flops(self, tokens: int) -> float:
        """Operations of one layer's attention and of what every token visits, forward."""
        queries = self.heads_width or self.width
        projections = 2 * (2 * self.width * queries + 2 * self.width * (self.kv_width or queries))
        shared = 2 * self.matrices * self.width * self.shared
        return tokens * (projections + 4 * self.sequence * queries + shared)

    @property
    def row_flops(self) -> int:
        """Operations of one row through one expert, forward."""
        return 2 * self.expert_parameters

    @property
    def row_bytes(self) -> int:
        """Of one row on its way to an expert or back."""
        return self.bytes * self.width

    @property
    def statistics_numbers(self) -> int:
        """Numbers that the router needs of one expert: means and variances of its inputs, or all their covariances."""
        inputs = self.width + self.biased
        return {"": 0, "diagonal": 2 * inputs, "full": inputs + inputs**2}[self.router_statistics]

    @property
    def statistics_bytes(self) -> int:
        """Of those of one expert; float32 whatever the weights are."""
        return 4 * self.statistics_numbers

    @staticmethod
    def of(config: Any, *, sequence: int | None = None) -> "ModelShape":
        """Shape of a config of ours or of a transformers family of experts.

        Raises:
            ValueError: a config without experts, or without a field that the shape needs (named).
        """
        read = _Reader(config)
        layers = read("num_hidden_layers")
        counts = read("num_experts", "num_local_experts", "n_routed_experts")
        per_layer = list(counts) if isinstance(counts, list | tuple) else [counts] * layers
        dense = read("dense_layers", "mlp_only_layers", default=None) or range(read("first_k_dense_replace", default=0))
        for layer in dense:
            per_layer[layer] = 0
        every = read("decoder_sparse_step", default=1) or 1  # Qwen's; layers without experts between those with them
        per_layer = [count if (layer + 1) % every == 0 else 0 for layer, count in enumerate(per_layer)]
        if not any(per_layer):
            raise ValueError("config has no routed experts, so there is nothing to place; give a mixture of experts")
        heads, width = read("num_attention_heads"), read("hidden_size")
        head_dim = read("head_dim", default=None) or width // heads
        hidden = read("moe_intermediate_size", default=0) or read("intermediate_size")
        shared = read("shared_expert_intermediate_size", default=0) or 0
        shared = shared or hidden * (read("n_shared_experts", default=0) or 0)
        return ModelShape(
            width=width,
            hidden=hidden,
            experts=tuple(per_layer),
            top_k=read("num_experts_per_tok"),
            sequence=sequence or read("max_position_embeddings", default=2048),
            heads_width=heads * head_dim,
            kv_width=(read("num_key_value_heads", default=None) or heads) * head_dim,
            shared=shared,
            matrices=3 if read("mlp_gated", default=True) else 2,
            vocabulary=read("vocab_size"),
            tied=bool(read("tie_word_embeddings", default=False)),
            router_statistics=read("router_statistics") if read("router", default="linear") == "sparsity" else "",
            biased=bool(read("mlp_bias", default=False)),
        )


class _Reader:
    def __init__(self, config: Any):
        self.config = config

    def __call__(self, *names: str, **default: Any) -> Any:
        for name in names:
            if hasattr(self.config, name):
                return getattr(self.config, name)
        if "default" in default:
            return default["default"]
        raise ValueError(f"config has no {' or '.join(names)}, which the plan needs")
