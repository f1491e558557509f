"""How transformers loads what :func:`mixtura.lm.isoflop.convert` made: quant_method ``mixtura-sparse-iso-flop``.

The config says which layers are of which shape; masks are buffers of the checkpoint, beside weights that are stored masked. So
a wide checkpoint of a family also loads without mixtura, as a dense model with many zeros, and computes the same.

transformers imports this module while it is still importing itself, so nothing of its models is imported at the top. And this
module may be what imports transformers; so it registers the method itself, in its last line.
"""

from dataclasses import asdict
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixtura.core.isoflop import IsoFlop, make_sparse, replace
from mixtura.core.sparse_layers import (
    Between,
    DopedSparse,
    FactorizedSparse,
    ParallelSparse,
    SparseLinear,
    mask_parameter,
    masked_parameters,
)

__all__ = ["METHOD", "SparseConfig", "SparseQuantizer", "describe", "register"]

METHOD = "mixtura-sparse-iso-flop"


class SparseConfig(QuantizationConfigMixin):
    """What stands in ``config.json`` of a converted checkpoint.

    Attributes:
        member, sparsity: of the transformation.
        norm, activation: inside parallel and factorized layers.
        n_m: [N, M] where masks have N active of every M inputs.
        layers: paths of the layers that were replaced, or for ``wide`` masked.
        parameters: paths of the parameters that have a mask without a layer of their own (stacked experts, GPT-2's layers).
    """

    def __init__(
        self,
        member: str = "wide",
        sparsity: float = 0.0,
        norm: str = "none",
        activation: str = "none",
        layers: list[str] | None = None,
        parameters: list[str] | None = None,
        n_m: list[int] | None = None,
        **kwargs: Any,
    ):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.member, self.sparsity, self.norm, self.activation = member, sparsity, norm, activation
        self.layers, self.parameters = layers or [], parameters or []
        self.n_m = list(n_m or (0, 0))
        self.transform()  # an unknown member or norm is told when the config is read

    def transform(self) -> IsoFlop:
        """The transformation that these fields describe."""
        between = Between(norm=self.norm, activation=self.activation)  # type: ignore[arg-type]
        n, m = self.n_m
        return IsoFlop(
            self.member,  # type: ignore[arg-type]
            self.sparsity,
            match="layer" if m else "network",
            between=between,
            n_m=(n, m),
        )


class SparseQuantizer(HfQuantizer):
    """Puts empty sparse layers in place before the weights and masks arrive."""

    requires_calibration = False
    quantization_config: SparseConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        transform = config.transform()
        if config.member != "wide":
            from mixtura.lm.isoflop import plain_layers

            plain_layers(model)
        for name in config.layers:
            try:
                model.get_submodule(name)
            except AttributeError:
                raise ValueError(
                    f"the checkpoint has a sparse {name}, which {type(model).__name__} does not have"
                ) from None
            if config.member == "wide":
                make_sparse(model, name)
            else:
                replace(model, name, transform)
                # GPT-2 draws new weights for what a checkpoint lacks by the names of its own layers.
                model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True
        for path in config.parameters:
            module, _, name = path.rpartition(".")
            mask_parameter(model.get_submodule(module), name)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            for found in masked_parameters(model).values():
                found.parameter.mul_(found.mask)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def register() -> None:
    """Make the method known to transformers; a second call does nothing."""
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(SparseConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(SparseQuantizer)


def describe(model: Any, transform: IsoFlop) -> None:
    """Write into the model's config what its sparse layers are, so that saving and loading find them."""
    kinds = (SparseLinear,) if transform.member == "wide" else (ParallelSparse, FactorizedSparse, DopedSparse)
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, kinds)]
    own = [name for name in masked_parameters(model) if not hasattr(type(modules[name.rpartition(".")[0]]), "set_mask")]
    between = asdict(transform.between)
    config = SparseConfig(
        transform.member, transform.sparsity, layers=layers, parameters=own, n_m=list(transform.n_m), **between
    )
    model.config.quantization_config = config
    model.hf_quantizer = SparseQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD


register()
