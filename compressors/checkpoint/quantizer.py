"""How stock transformers loads a compressed checkpoint: an out-of-tree quantization method.

`from_pretrained` builds the original architecture on the meta device, asks the quantizer to replace
modules, and then loads tensors by name. This quantizer replaces compressed layers and compares the
headers of the files with what is expected, because transformers only warns about missing tensors
and leaves them uninitialized. After loading it checks masks, indices and scales.
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
        layout.check_version(format_version, "config.json: quantization_config")
        layout.parse_modules(self.modules, "config.json: quantization_config")
        check_tables(tables, "config.json: quantization_config")
        for key, table in tables.items():
            if key in TABLES:  # most checkpoints have none, and save none
                setattr(self, key, table)


class LrcQuantizer(HfQuantizer):
    """Replace linear layers and embeddings by their compressed counterparts."""

    requires_calibration = True  # checkpoints only; quantizing while loading is another thing
    quantization_config: LrcConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        where = "config.json: quantization_config"
        modules = layout.parse_modules(self.quantization_config.modules, where)
        tables = tables_of(model.config)
        shapes, biases = tables.get(SHAPES, {}), tables.get(BIASES, [])
        with _fitting():
            self._config_shapes = resize_(model, shapes)
            add_biases_(model, biases)
        expected = layout.resized_tensors(shapes)
        for name in biases:
            if name not in modules:
                expected[f"{name}.bias"] = TensorSpec([model.get_submodule(name).out_features])
        expected |= replace_layers(model, modules)
        with _fitting():
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
                "no plain model computes what this one does: its residual stream has a basis of "
                "its own before every block; slice with 'rotations: global' for a plain model"
            )
        for name, module in list(model.named_modules()):
            if isinstance(module, CompressedLinear):
                set_module(model, name, module.to_dense())
        for name, module in list(model.named_modules()):
            if isinstance(module, TiedHead):
                set_module(model, name, module.to_dense(model.get_input_embeddings()))
        widen_(model, self._config_shapes)  # the config that is left says so
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Answer `save_pretrained`: the state dict is the file."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Answer Trainer and PEFT: the factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Let Trainer tune the factors themselves, without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Answer `generate`: nothing here breaks a graph."""
        return True


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


@contextmanager
def _fitting() -> Iterator[None]:
    """Report a table that does not match the model."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"config.json: quantization_config: {error}; the config was edited, or belongs to "
            "another model"
        ) from error


def replace_layers(model: nn.Module, modules: Mapping[str, WeightConfig]) -> TensorSpecs:
    """Replace layers by empty compressed ones; return the tensors that they expect.

    Raises
    ------
    CheckpointError
        If the model has no layer of a name, or one that cannot have its configuration.
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
                f"config.json: quantization_config.modules names {name!r}, which is not a linear "
                f"layer or embedding of {type(model).__name__}; the config was edited, or belongs "
                "to another model",
                code="invalid-config",
            )
        weight: nn.Parameter = dense.get_parameter("weight")
        with _naming(name):
            if tuple(weight.shape) != config.shape:
                raise ValueError(f"shape must be {list(weight.shape)}, got {list(config.shape)}")
            bias = getattr(dense, "bias", None) is not None
            expected |= layout.expected_tensors(name, config, bias=bias)
        replaced[name] = kind.replacing(dense, config)
        replaced[name].requires_grad_(weight.requires_grad)
        set_module(model, name, replaced[name])
    for name, layer in replaced.items():  # once all exist: an owner may come after its members
        with _naming(name):
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
                continue  # offloaded to disk: checked when read, if at all
            problems += [f"{name}.{text}" for text in module.problems()]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            f"the weights are damaged: {'; '.join(problems[:5])}{more}; {layout.COPY_AGAIN}",
            code="damaged-weights",
        )


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the module that an error is about."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"config.json: quantization_config.modules[{name!r}]: {error}; the config was edited, "
            "or belongs to another model"
        ) from error


def check_headers(expected: TensorSpecs, files: list[str]) -> None:
    """Compare the tensors that a checkpoint must have with the headers of its files.

    Raises
    ------
    CheckpointError
        Truncated file, missing tensor, wrong shape or an index of the wrong type, each by name.
    """
    try:
        found = read_headers(map(Path, files))
    except ValueError as error:
        raise CheckpointError(f"{error}; {layout.COPY_AGAIN}") from error
    wrong = layout.mismatches(expected, found)
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise CheckpointError(
            "the weights do not match config.json: "
            + "; ".join(wrong[:5])
            + more
            + f"; {layout.COPY_AGAIN}",
            code="tensor-mismatch",
        )


def register() -> None:
    """Make `from_pretrained` know lrc; does nothing the second time."""
    if layout.QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(layout.QUANT_METHOD)(LrcConfig)
        register_quantizer(layout.QUANT_METHOD)(LrcQuantizer)


register()
