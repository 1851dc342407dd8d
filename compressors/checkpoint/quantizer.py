"""How stock transformers loads a compressed checkpoint: an out-of-tree quantization method.

`from_pretrained` builds the original architecture on the meta device, asks the quantizer to swap
modules, and then loads tensors by name. All that is ours is the swap and, before it, a look at the
headers of the files, because transformers itself only warns about a missing tensor and leaves
whatever was in memory.
"""

from collections.abc import Iterator
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
from lrc.compressors.layers import FORMS, Form, TiedHead
from lrc.compressors.layers.residual_basis import BIASES, NORMS, add_biases_, place_norms_
from lrc.compressors.layers.shapes import SHAPES, TABLES, resize_, tables_of, widen_
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
        layout.check_modules(self.modules, "config.json: quantization_config")
        check_tables(tables, "config.json: quantization_config")
        for key, table in tables.items():
            if key in TABLES:  # most checkpoints have none, and save none
                setattr(self, key, table)


class LrcQuantizer(HfQuantizer):
    """Put the compressed forms in the places of the linears they replaced."""

    requires_calibration = True  # checkpoints only; quantizing while loading is another thing
    quantization_config: LrcConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> Any:
        modules, tables = self.quantization_config.modules, tables_of(model.config)
        shapes, biases = tables.get(SHAPES, {}), tables.get(BIASES, [])
        with _fitting():
            self._config_shapes = resize_(model, shapes)
            add_biases_(model, biases)
        expected = layout.resized_tensors(shapes)
        for name in biases:
            if name not in modules:
                expected[f"{name}.bias"] = ([model.get_submodule(name).out_features], None)
        expected |= swap_in_forms(model, modules)
        with _fitting():
            shortcuts = place_norms_(model, tables.get(NORMS, {}))
        expected |= {name: (shape, None) for name, shape in shortcuts.items()}
        if checkpoint_files:
            check_headers(expected, checkpoint_files)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        if tables_of(model.config).get(NORMS):
            raise CheckpointError(
                "no plain model computes what this one does: its residual stream has a basis of "
                "its own before every block; slice with 'rotations: global' for a plain model"
            )
        for name, module in list(model.named_modules()):
            if isinstance(module, Form):
                set_module(model, name, module.dense())
        for name, module in list(model.named_modules()):
            if isinstance(module, TiedHead):
                set_module(model, name, module.dense(model.get_input_embeddings()))
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
    """Say that a table does not fit the model."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"config.json: quantization_config: {error}; the config was edited, or is another "
            "model's"
        ) from error


def swap_in_forms(model: nn.Module, modules: dict[str, dict[str, Any]]) -> layout.Expected:
    """Replace linears and embeddings by empty compressed forms; return the tensors they expect.

    Raises
    ------
    CheckpointError
        If the model has none of that name, or one that cannot have that form.
    """
    expected: layout.Expected = {}
    forms: dict[str, Form] = {}
    for name, spec in modules.items():
        kind = FORMS[spec["form"]]
        try:
            dense: Any = model.get_submodule(name)
        except AttributeError:
            dense = None
        if dense is None or not isinstance(dense, kind.REPLACES):
            what = "linear layer" if kind.REPLACES is nn.Linear else "embedding"
            raise CheckpointError(
                f"config.json: quantization_config.modules names {name!r}, which is no {what} of "
                f"{type(model).__name__}; the config was edited, or is another model's"
            )
        weight: nn.Parameter = dense.get_parameter("weight")
        (d_out, d_in), bias = weight.shape, getattr(dense, "bias", None) is not None
        with _naming(name):
            expected |= layout.expected_tensors(name, d_out, d_in, spec, bias=bias)
        forms[name] = kind.empty(dense, spec)
        forms[name].requires_grad_(weight.requires_grad)
        set_module(model, name, forms[name])
    for name, form in forms.items():  # once all are there: an owner may come after its members
        with _naming(name):
            form.attach(model, modules[name])
    return expected


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say which module a form refused."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"config.json: quantization_config.modules[{name!r}]: {error}; the config was edited, "
            "or is another model's"
        ) from error


def check_headers(expected: layout.Expected, files: list[str]) -> None:
    """Hold the tensors a checkpoint must have against the headers of its files.

    Raises
    ------
    CheckpointError
        Truncated file, missing tensor, wrong shape or an index of the wrong type, each by name.
    """
    try:
        found = read_headers(map(Path, files))
    except ValueError as error:
        raise CheckpointError(f"{error}; {layout.AGAIN}") from error
    wrong = layout.misfits(expected, found)
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise CheckpointError(
            "the weights do not fit config.json: "
            + "; ".join(wrong[:5])
            + more
            + f"; {layout.AGAIN}"
        )


def register() -> None:
    """Make `from_pretrained` know lrc; does nothing the second time."""
    if layout.QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(layout.QUANT_METHOD)(LrcConfig)
        register_quantizer(layout.QUANT_METHOD)(LrcQuantizer)


register()
