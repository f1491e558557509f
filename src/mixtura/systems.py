"""The registry: forty published systems, one row each.

A row says what the paper is, in which room it lives and through which names it is called. Whether it works here is not
a field of the row but follows from its claim record, so that nothing can pretend.
"""

import importlib
from dataclasses import dataclass
from typing import Any

__all__ = ["ROOMS", "SYSTEMS", "System", "get"]

ROOMS = ("lm", "density", "audio", "vision", "multimodal", "robust")


@dataclass(frozen=True)
class System:
    """One published system.

    Attributes:
        id: name of the row, of its claim and of its record.
        title: title of the paper.
        arxiv: arXiv number.
        room: the room whose import path holds it.
        line: what it does, in one line of our own.
        entry: import paths of its public names; empty while the system is not built.
    """

    id: str
    title: str
    arxiv: str
    room: str
    line: str
    entry: tuple[str, ...] = ()

    @property
    def built(self) -> bool:
        """Whether there is code behind the row."""
        return bool(self.entry)

    @property
    def url(self) -> str:
        """Address of the paper's abstract."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    def resolve(self) -> list[Any]:
        """Import and return the objects that ``entry`` names."""
        found = []
        for path in self.entry:
            module, _, name = path.rpartition(".")
            found.append(getattr(importlib.import_module(module), name))
        return found


def get(system: str) -> System:
    """The row of a system.

    Raises:
        ValueError: the id is not known; close ones are named.
    Example:
        >>> get("mc-moe").room
        'lm'
    """
    for row in SYSTEMS:
        if row.id == system:
            return row
    from difflib import get_close_matches

    close = get_close_matches(system, [row.id for row in SYSTEMS], n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(f"no system is called {system!r}{hint} (mixtura systems lists all {len(SYSTEMS)})")


SYSTEMS: tuple[System, ...] = (
    System(
        "branch-attend-mix",
        "BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
        "2408.08274",
        "lm",
        "Dense specialists with a common ancestor become one mixture, their attention as soft experts too.",
        (
            "mixtura.lm.upcycle.branch_attend_mix.branch",
            "mixtura.lm.upcycle.branch_attend_mix.mix",
            "mixtura.lm.upcycle.branch_train_mix.to_standard",
        ),
    ),
    System(
        "mc-moe",
        "Mixture Compressor for Mixture-of-Experts LLMs Gains More",
        "2410.06270",
        "lm",
        "Each expert gets 1, 2 or 3 bits by an integer program, and second experts are skipped where they hardly count.",
        (
            "mixtura.lm.compress.mixed_experts.convert",
            "mixtura.lm.compress.dynamic_pruning.prune_dynamically",
        ),
    ),
    System(
        "self-contrast",
        "Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast",
        "2405.14507",
        "lm",
        "The next token is pushed away from what the same model says when routed to its lesser experts.",
        (
            "mixtura.lm.decode.self_contrast.generate",
            "mixtura.lm.decode.self_contrast.contrast_logits",
            "mixtura.lm.decode.routing.RoutingRule",
        ),
    ),
    System(
        "deepspeed-moe",
        "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power Next-Generation AI Scale",
        "2201.05596",
        "lm",
        "More experts in deeper layers beside a dense residual branch, and a shallower mixture distilled from it.",
        (
            "mixtura.lm.pyramid.PyramidResidualFFN",
            "mixtura.lm.pyramid.expert_schedule",
            "mixtura.lm.upcycle.pyramid.convert",
            "mixtura.lm.students.StagedDistillation",
            "mixtura.lm.students.student_of",
            "mixtura.lm.students.distill",
        ),
    ),
    System(
        "multilingual-moe",
        "Scalable and Efficient MoE Training for Multitask Multilingual Models",
        "2109.10465",
        "lm",
        "One translator of many languages as a mixture, trained over processes and pruned of experts afterwards.",
        (
            "mixtura.lm.model.MultitaskMoEForConditionalGeneration",
            "mixtura.lm.multitask.TaskMixture",
            "mixtura.lm.aggregate_experts.aggregate",
            "mixtura.lm.prune_experts.prune",
            "mixtura.core.capacity.capacity_select",
        ),
    ),
    System(
        "sparse-attention-mix",
        "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
        "2406.14909",
        "lm",
        "Every attention head gets a span of its own that grows with the input, chosen by profiling and a program.",
        (
            "mixtura.lm.attention.profile_spans",
            "mixtura.lm.attention.plan_spans",
            "mixtura.lm.attention.convert",
            "mixtura.lm.attention.SpanCache",
        ),
    ),
    System(
        "moe-x",
        "Mixture of Experts Made Intrinsically Interpretable",
        "2503.07639",
        "lm",
        "Wide sparse experts, routed by how sparse their activations would be, whose features can be read.",
        (
            "mixtura.lm.wide_sparse.WideSparseMoE",
            "mixtura.core.sparsity_gate.SparsityAwareGate",
            "mixtura.lm.upcycle.upcycle",
            "mixtura.lm.unit_report.unit_report",
            "mixtura.lm.unit_probes.BoardProbe",
        ),
    ),
    System(
        "mixllm",
        "MixLLM: LLM Quantization with Global Mixed-precision between Output-features and Highly-efficient System Design",
        "2412.14590",
        "lm",
        "The output channels that matter most to the loss of the whole model get 8 bits, all others 4.",
        (
            "mixtura.lm.compress.mixed_channels.convert",
            "mixtura.lm.compress.channel_salience.channel_salience",
            "mixtura.lm.compress.mixed_channel_linear.MixedChannelLinear",
        ),
    ),
    System(
        "hecate",
        "Hecate: Unlocking Efficient Sparse Model Training via Fully Sharded Sparse Data Parallelism",
        "2502.02581",
        "lm",
        "Experts are sharded over all devices and gathered sparsely where the tokens of the step need them.",
        (
            "mixtura.lm.parallel.placement.materialize",
            "mixtura.lm.parallel.placement.shard",
            "mixtura.lm.parallel.sharded_experts.shard_experts",
            "mixtura.lm.parallel.simulate.simulate",
            "mixtura.lm.parallel.plan.memory",
        ),
    ),
    System(
        "deepseek-moe",
        "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
        "2401.06066",
        "lm",
        "Many small experts instead of a few large ones, with some that every token shares.",
        (
            "mixtura.lm.fine_grained.FineGrainedMoE",
            "mixtura.lm.fine_grained.matched",
            "mixtura.lm.model.MixturaForCausalLM",
            "mixtura.lm.upcycle.segment",
            "mixtura.lm.upcycle.from_dense",
            "mixtura.lm.specialization.ban_top",
            "mixtura.lm.specialization.drop_shared",
        ),
    ),
    System(
        "sparse-ift",
        "Sparse Iso-FLOP Transformations for Maximizing Training Efficiency",
        "2303.11525",
        "lm",
        "A dense layer becomes a wider sparse one of equal cost that trains to a better result.",
        (
            "mixtura.core.isoflop.convert",
            "mixtura.core.isoflop.widen",
            "mixtura.core.sparse_training.MaskOptimizer",
            "mixtura.lm.isoflop.convert",
        ),
    ),
    System(
        "temperature-gate",
        "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?",
        "2401.13875",
        "density",
        "How fast a gated regression learns when its gate has a temperature, and which gate repairs the rate.",
        (
            "mixtura.density.GatedRegression",
            "mixtura.density.activation_independence",
            "mixtura.density.voronoi_loss",
            "mixtura.density.rate_experiment",
        ),
    ),
    System(
        "topk-gate",
        "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts",
        "2309.13850",
        "density",
        "Gated regression in which only the K likeliest experts answer, with the rates at which it learns.",
        (
            "mixtura.density.GatedRegression",
            "mixtura.density.voronoi_loss",
            "mixtura.density.region_probabilities",
            "mixtura.density.required_active",
            "mixtura.density.suggest_active",
        ),
    ),
    System(
        "category-discovery",
        "Learning Semi-supervised Gaussian Mixture Models for Generalized Category Discovery",
        "2305.06144",
        "density",
        "A half-labelled mixture splits and merges its components until the number of classes is found.",
        (
            "mixtura.density.CategoryDiscovery",
            "mixtura.density.DiscoveryLoop",
            "mixtura.density.discovery_accuracy",
            "mixtura.density.estimate_classes_by_labels",
        ),
    ),
    System(
        "adjusted-sdp",
        "Likelihood Adjusted Semidefinite Programs for Clustering Heterogeneous Data",
        "2209.15097",
        "density",
        "Clusters of different shapes by a semidefinite program that knows their likelihood.",
        (
            "mixtura.density.AdjustedSDPClustering",
            "mixtura.density.solve_membership_sdp",
            "mixtura.density.membership_lower_bound",
            "mixtura.density.kmeans_sdp",
        ),
    ),
    System(
        "compositional-density",
        "Learning Unnormalized Statistical Models via Compositional Optimization",
        "2306.07485",
        "density",
        "Maximum likelihood of models whose normalising constant nobody knows, by compositional descent.",
        (
            "mixtura.density.unnormalized.CompositionalLikelihood",
            "mixtura.density.unnormalized.NoiseContrastive",
            "mixtura.density.energy_model.EnergyDensity",
            "mixtura.density.energy_model.ood_score",
        ),
    ),
    System(
        "pretraining-advantage",
        "On the Provable Advantage of Unsupervised Pretraining",
        "2303.01566",
        "density",
        "When unlabelled data lowers the number of labelled samples a task needs, and by how much.",
        (
            "mixtura.density.latent_pretraining.PretrainedRegressor",
            "mixtura.density.latent_pretraining.PretrainedClassifier",
            "mixtura.density.pretraining_ways.pretraining_report",
            "mixtura.density.factor_model.FactorModel",
            "mixtura.density.contrastive_model.ContrastiveModel",
            "mixtura.density.pretraining_rates.advantage_experiment",
        ),
    ),
    System(
        "scale-mixture-gp",
        "Scale Mixtures of Neural Network Gaussian Processes",
        "2107.01408",
        "density",
        "Infinitely wide networks with a random last-layer scale: heavy-tailed processes in closed form.",
        (
            "mixtura.density.ScaleMixtureRegressor",
            "mixtura.density.ScaleMixtureClassifier",
            "mixtura.density.WideNetworkKernel",
        ),
    ),
    System(
        "multiscale-pde",
        "Solving High Frequency and Multi-Scale PDEs with Gaussian Processes",
        "2311.04465",
        "density",
        "Equations with high frequencies, solved by a process whose spectrum is a learned mixture.",
        (
            "mixtura.density.SpectralProcessSolver",
            "mixtura.density.SpectralMixture1D",
            "mixtura.density.MultiscaleSolver",
        ),
    ),
    System(
        "song",
        "YuE: Scaling Open Foundation Models for Long-Form Music Generation",
        "2503.08638",
        "audio",
        "Songs from lyrics: a vocal and an accompaniment track predicted side by side.",
    ),
    System(
        "bimodal-separation",
        "Weakly-supervised Audio Separation via Bi-modal Semantic Similarity",
        "2404.01740",
        "audio",
        "Sources pulled out of mixtures of mixtures, supervised by what a sound-text model says of them.",
    ),
    System(
        "query-separation",
        "CLIPSep: Learning Text-queried Sound Separation with Noisy Unlabeled Videos",
        "2212.07065",
        "audio",
        "The sound that a text names, separated from a recording, learned from noisy unlabelled clips.",
        entry=(
            "mixtura.audio.QuerySeparator",
            "mixtura.audio.NoiseInvariantLoss",
            "mixtura.audio.separate",
        ),
    ),
    System(
        "audio-codec",
        "Music2Latent2: Audio Compression with Summary Embeddings and Autoregressive Decoding",
        "2501.17578",
        "audio",
        "Audio in a few summary vectors, decoded chunk after chunk by a consistency model.",
    ),
    System(
        "compositional-audio",
        "CompA: Addressing the Gap in Compositional Reasoning in Audio-Language Models",
        "2310.08753",
        "audio",
        "Teaches sound-text models that order and attribute matter, and measures whether they learned it.",
    ),
    System(
        "sonar",
        "Underwater Acoustic Target Recognition with a Convolution-based Mixture of Experts",
        "2402.11919",
        "audio",
        "Ships told apart by their noise, each kind of spectrum by the expert that knows it.",
    ),
    System(
        "image-codec",
        "Unified Multivariate Gaussian Mixture for Efficient Neural Image Compression",
        "2203.10897",
        "vision",
        "Images compressed with vector quantizers that follow a multivariate Gaussian mixture.",
    ),
    System(
        "spectral-unmixing",
        "Effective Spectral Unmixing via Robust Representation and Learning-based Sparsity",
        "1409.0685",
        "vision",
        "What share of which material each pixel of a hyperspectral cube holds, in spite of bad bands.",
        (
            "mixtura.vision.SpectralUnmixing",
            "mixtura.vision.read_cube",
            "mixtura.vision.unmixing.fcls",
            "mixtura.vision.unmixing.sunsal",
        ),
    ),
    System(
        "image-quality",
        "Re-IQA: Unsupervised Learning for Image Quality Assessment in the Wild",
        "2304.00451",
        "vision",
        "A mixture of a content and a quality encoder that scores photographs without a reference.",
    ),
    System(
        "aerial-segmentation",
        "Learning to Aggregate Multi-Scale Context for Instance Segmentation in Remote Sensing Images",
        "2111.11057",
        "vision",
        "Objects in aerial images outlined one by one, with context gathered over scales and space.",
    ),
    System(
        "wavelet-mixer",
        "WaveMix: A Resource-efficient Neural Network for Image Analysis",
        "2205.14375",
        "vision",
        "Image tokens mixed by wavelet transforms instead of attention.",
        (
            "mixtura.core.wavelets.haar2d",
            "mixtura.vision.wavelet.WaveletClassifier",
            "mixtura.vision.wavelet.WaveletMixing",
            "mixtura.vision.wavelet.WaveletSegmenter",
            "mixtura.vision.wavelet.WaveletSuperResolution",
            "mixtura.vision.wavelet.convert_mixing",
        ),
    ),
    System(
        "gan-shrinkage",
        "Improving GAN Training via Feature Space Shrinkage",
        "2303.01559",
        "vision",
        "Steadier generators by pulling mixed images towards the features of their parts.",
    ),
    System(
        "ambient-diffusion",
        "How Much is a Noisy Image Worth? Data Scaling Laws for Ambient Diffusion",
        "2411.02780",
        "vision",
        "Generators trained on a few clean and many noisy images, and the price of noise in samples.",
    ),
    System(
        "outlier-exposure",
        "Mixture Outlier Exposure: Towards Out-of-Distribution Detection in Fine-grained Environments",
        "2106.03917",
        "robust",
        "Confidence that falls smoothly from known classes to outliers, by training on mixtures of both.",
        (
            "mixtura.robust.OutlierExposedClassifier",
            "mixtura.robust.MixtureOutlierExposure",
            "mixtura.robust.ood_metrics",
            "mixtura.robust.score",
        ),
    ),
    System(
        "label-noise",
        "An Accurate Detection Is Not All You Need to Combat Label Noise in Web-Noisy Datasets",
        "2407.05528",
        "robust",
        "Finds wrong labels by a line between clean and noisy features, alternating with small-loss selection.",
    ),
    System(
        "ordinal-mixup",
        "Mixup Your Own Pairs",
        "2309.16633",
        "robust",
        "Contrastive learning for regression with mixed pairs that respect the order of the labels.",
    ),
    System(
        "out-of-domain",
        "Out-Of-Domain Unlabeled Data Improves Generalization",
        "2310.00027",
        "robust",
        "A robust classifier of two mixed populations gains from unlabelled samples of another domain.",
    ),
    System(
        "caption-fusion",
        "DenseFusion-1M: Merging Vision Experts for Comprehensive Multimodal Perception",
        "2407.08303",
        "multimodal",
        "Captions written from what several vision experts see in the same picture.",
    ),
    System(
        "unified-moe",
        "Uni-MoE: Scaling Unified Multimodal LLMs with Mixture of Experts",
        "2405.11273",
        "multimodal",
        "One language model of experts that reads text, pictures, sound and speech.",
    ),
    System(
        "dense-retrieval",
        "Unsupervised Dense Information Retrieval with Contrastive Learning",
        "2112.09118",
        "multimodal",
        "Search by meaning with an encoder trained on unlabelled text alone.",
        (
            "mixtura.multimodal.Retriever",
            "mixtura.multimodal.SearchIndex",
            "mixtura.multimodal.DenseIndex",
            "mixtura.multimodal.TextEncoder",
            "mixtura.multimodal.train_unsupervised",
            "mixtura.multimodal.finetune",
        ),
    ),
    System(
        "clip-moe",
        "CLIP-MoE: Towards Building Mixture of Experts for CLIP with Diversified Multiplet Upcycling",
        "2409.19291",
        "multimodal",
        "Several fine-tuned views of one image-text model, combined into a mixture of experts.",
    ),
)
