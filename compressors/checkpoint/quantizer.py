"""Load compressed checkpoints with transformers: a quantization method outside its source tree.

`from_pretrained` builds the original architecture on the meta device, calls the quantizer to
replace modules, and then loads tensors by name. This quantizer replaces compressed layers and
compares the safetensors headers with the expected tensors, because transformers only warns about
missing tensors and leaves them uninitialized. After loading it checks masks, indices and scales.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.config_tables import check_tables
from lrc.compressors.io.shards import read_headers
from lrc.compressors.layers import (
    CompressedEmbedding,
    CompressedLinear,
    TensorSpec,
    TensorSpecs,
    TiedHead,
    WeightConfig,
)
from lrc.compressors.layers.model_shapes import SHAPES, TABLES, resize_, tables_of, widen_
from lrc.compressors.layers.residual_basis import BIASES, NORMS, add_biases_, place_norms_
from lrc.configs.errors import CheckpointError

BLOCK = "config.json: quantization_config"


class LrcConfig(QuantizationConfigMixin):  # type: ignore[no-untyped-call, misc, unused-ignore]
    """The `quantization_config` block of a compressed checkpoint."""

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = layout.FORMAT_VERSION,
        **tables: Any,
    ) -> None:
        self.quant_method = layout.QUANT_METHOD  # type: ignore[assignment]  # an out-of-tree name
        self.format_version = format_version
        self.modules = modules or {}
        layout.check_version(format_version, BLOCK)
        layout.parse_modules(self.modules, BLOCK)
        check_tables(tables, BLOCK)
        for key, table in tables.items():
            if key in TABLES:  # absent tables are not set, so that they are not saved either
                setattr(self, key, table)


class LrcQuantizer(HfQuantizer):
    """Replace linear layers and embeddings by their compressed counterparts."""

    requires_calibration = True  # loads compressed checkpoints; cannot compress while loading
    quantization_config: LrcConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        modules = layout.parse_modules(self.quantization_config.modules, BLOCK)
        tables = tables_of(model.config)
        shapes, biases = tables.get(SHAPES, {}), tables.get(BIASES, [])
        with _matching(BLOCK):
            self._original_shapes = resize_(model, shapes)
            add_biases_(model, biases)
        expected = layout.resized_tensors(shapes)
        for name in biases:
            if name not in modules:
                expected[f"{name}.bias"] = TensorSpec([model.get_submodule(name).out_features])
        expected |= replace_layers(model, modules)
        with _matching(BLOCK):
            shortcuts = place_norms_(model, tables.get(NORMS, {}))
        expected |= {name: TensorSpec(shape) for name, shape in shortcuts.items()}
        if checkpoint_files is not None:
            check_headers(expected, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        check_values(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        if tables_of(model.config).get(NORMS):
            raise CheckpointError(
                "cannot dequantize: with 'rotations: block' every block uses its own basis of the "
                "residual stream, which the original architecture cannot express; slice with "
                "'rotations: global' instead"
            )
        for name, module in list(model.named_modules()):
            if isinstance(module, CompressedLinear):
                model.set_submodule(name, module.to_dense())
        for name, module in list(model.named_modules()):
            if isinstance(module, TiedHead):
                model.set_submodule(name, module.to_dense(model.get_input_embeddings()))
        widen_(model, self._original_shapes)  # the config that remains has these
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Return True: `save_pretrained` can write the state dict as it is."""
        return True

    is_trainable = True  # by Trainer and PEFT: unquantized factors are ordinary parameters
    is_qat_trainable = True  # by Trainer without adapters
    is_compileable = True


@contextmanager
def _matching(where: str) -> Iterator[None]:
    """Convert a ValueError about a part of the config to a CheckpointError."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"{where}: {error}; the config was edited, or belongs to another model"
        ) from error


def replace_layers(model: nn.Module, modules: Mapping[str, WeightConfig]) -> TensorSpecs:
    """Replace layers by empty compressed ones; return the tensors that they expect.

    Raises
    ------
    CheckpointError
        If a name is not that of a layer, or a configuration does not fit its layer.
    """
    expected: TensorSpecs = {}
    replaced: dict[str, CompressedLinear] = {}
    for name, config in modules.items():
        try:
            dense: Any = model.get_submodule(name)
        except AttributeError:
            dense = None
        kind = CompressedEmbedding if isinstance(dense, nn.Embedding) else CompressedLinear
        if not isinstance(dense, kind.REPLACES):
            raise CheckpointError(
                f"{BLOCK}.modules names {name!r}, which is not a linear "
                f"layer or embedding of {type(model).__name__}; the config was edited, or belongs "
                "to another model",
                code="invalid-config",
            )
        weight: nn.Parameter = dense.get_parameter("weight")
        with _matching(f"{BLOCK}.modules[{name!r}]"):
            if tuple(weight.shape) != config.shape:
                raise ValueError(f"shape must be {list(weight.shape)}, got {list(config.shape)}")
            bias = getattr(dense, "bias", None) is not None
            expected |= layout.expected_tensors(name, config, bias=bias)
        replaced[name] = kind.replacing(dense, config)
        replaced[name].requires_grad_(weight.requires_grad)
        model.set_submodule(name, replaced[name])
        # Some classes (Blt) initialize the weights of layers from the module that has them.
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        if owner is not model and not owner._non_persistent_buffers_set:
            owner._is_hf_initialized = True
    # A second pass, because the layer that stores a shared factor may be listed after its users.
    for name, layer in replaced.items():
        with _matching(f"{BLOCK}.modules[{name!r}]"):
            layer.connect(model)
    return expected


def check_values(model: nn.Module) -> None:
    """Check masks, indices and scales of all compressed layers that have been loaded.

    Raises
    ------
    CheckpointError
        Naming the layers whose tensors violate the invariants of their components.
    """
    problems = []
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            tensors = [*module.parameters(), *module.buffers()]
            if any(tensor.is_meta for tensor in tensors):
                continue  # weights offloaded to disk are not checked
            problems += [f"{name}.{text}" for text in module.problems()]
    if problems:
        raise CheckpointError(
            f"the weights are damaged: {_first(problems)}; {layout.COPY_AGAIN}",
            code="damaged-weights",
        )


def check_headers(expected: TensorSpecs, files: list[str]) -> None:
    """Compare the tensors that a checkpoint must have with the headers of its files.

    Raises
    ------
    CheckpointError
        If a file is truncated, or tensors are missing or have a wrong shape or dtype.
    """
    try:
        found = read_headers(map(Path, files))
    except ValueError as error:
        raise CheckpointError(f"{error}; {layout.COPY_AGAIN}") from error
    wrong = layout.mismatches(expected, found)
    if wrong:
        raise CheckpointError(
            f"the weights do not match config.json: {_first(wrong)}; {layout.COPY_AGAIN}",
            code="tensor-mismatch",
        )


def _first(problems: list[str]) -> str:
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def register() -> None:
    """Register lrc with transformers, once."""
    if layout.QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(layout.QUANT_METHOD)(LrcConfig)
        register_quantizer(layout.QUANT_METHOD)(LrcQuantizer)


register()
