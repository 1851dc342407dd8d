"""Load compressed checkpoints with transformers: a quantization method registered from outside.

`from_pretrained` builds the original architecture on the meta device, calls the quantizer to
replace modules, and then loads tensors by name. This quantizer replaces compressed layers and
compares the safetensors headers with the expected tensors, because transformers only warns about
missing tensors and leaves them uninitialized. After loading it checks masks, indices and scales.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.config_tables import check_tables
from lrc.compressors.checkpoint.elastic_budgets import (
    BUDGET,
    budget_index,
    cut_model_,
    parse_budgets,
)
from lrc.compressors.checkpoint.manifest import read_manifest
from lrc.compressors.checkpoint.model_tables import (
    MODULES,
    added_biases,
    current_tables,
    fit_names,
    has_experts,
    head_shapes,
)
from lrc.compressors.checkpoint.parent_weights import (
    PARENT_MODEL,
    ParentWeights,
    expect_parent_,
    fill_from_parent_,
    read_parent,
)
from lrc.compressors.io.freed_memory import ReplacedTensors
from lrc.compressors.io.shards import read_headers
from lrc.compressors.io.shortened import shortened
from lrc.compressors.kernels import optimize
from lrc.compressors.layers import (
    CompressedEmbedding,
    CompressedLinear,
    TensorSpec,
    TensorSpecs,
    TiedHead,
    WeightConfig,
)
from lrc.compressors.layers.component import finite_problems
from lrc.compressors.layers.compressed_linear import Int8Linear, compares_dtype, convert_inputs_
from lrc.compressors.layers.expert_batches import batch_experts
from lrc.compressors.layers.experts import fuse_experts_, split_experts_
from lrc.compressors.layers.model_shapes import SHAPES, TABLES, resize_, widen_
from lrc.compressors.layers.residual_basis import BIASES, NORMS, add_biases_, place_norms_
from lrc.compressors.layers.siblings import share_inputs
from lrc.compressors.models.contents import renamed
from lrc.compressors.models.expert_tensors import own_conversions, without_experts
from lrc.compressors.models.model_kinds import kind_of
from lrc.configs.errors import CheckpointError

BLOCK = "config.json: quantization_config"


class LrcConfig(QuantizationConfigMixin):  # type: ignore[no-untyped-call, misc, unused-ignore]
    """The `quantization_config` block of a compressed checkpoint.

    Parameters
    ----------
    modules : dict
        Name of a layer or embedding -> its `WeightConfig` as JSON.
    format_version : int
    elastic : dict, optional
        Budgets that the checkpoint can be cut to, see `parse_budgets`.
    parent : dict, optional
        What the checkpoint reads from its parent, see `ParentWeights`.
    **tables
        How a sliced model differs from its architecture: shapes of resized modules, added biases,
        and norms, see `TABLES`.
    """

    def __init__(
        self,
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = layout.FORMAT_VERSION,
        elastic: dict[str, Any] | None = None,
        parent: dict[str, Any] | None = None,
        **tables: Any,
    ) -> None:
        self.quant_method = layout.QUANT_METHOD  # type: ignore[assignment]  # an out-of-tree name
        self.format_version = format_version
        layout.check_version(format_version, BLOCK)
        parsed = layout.parse_modules(modules or {}, BLOCK)
        check_tables(tables, BLOCK)
        if parse_budgets(elastic, parsed, BLOCK):
            self.elastic = elastic  # not set otherwise, so that it is not saved
        if ParentWeights.parse(parent, BLOCK) is not None:
            self.parent = parent
        self.tables = {MODULES: modules or {}, **tables}

    @property
    def budgets(self) -> tuple[float, ...]:
        """The budgets that the checkpoint can be cut to, the stored one first."""
        return tuple(vars(self).get(layout.ELASTIC, {}).get("budgets", ()))

    @property
    def tables(self) -> dict[str, Any]:
        """The tables `modules`, and those of a sliced model that are not empty."""
        return {key: table for key, table in vars(self).items() if key in (MODULES, *TABLES)}

    @tables.setter
    def tables(self, tables: Mapping[str, Any]) -> None:
        for key in (MODULES, *TABLES):  # empty ones are not set, so that they are not saved either
            vars(self).pop(key, None)
            if tables.get(key) or key == MODULES:
                setattr(self, key, tables[key])


class LrcQuantizer(HfQuantizer):
    """Replace linear layers and embeddings by their compressed counterparts."""

    requires_calibration = True  # loads compressed checkpoints; cannot compress while loading
    quantization_config: LrcConfig
    _wait_for_hashes: Callable[[], None] | None
    _has_split_experts = False
    _parent: Mapping[str, Tensor] | None = None
    """Weights of modules that the files lack, from the parent; None if there are none."""
    _cut = 0
    """Number of the budget to cut to after loading."""

    def _process_model_before_weight_loading(
        self,
        model: Any,
        checkpoint_files: list[str] | None = None,
        device_map: Mapping[str, Any] | str | None = None,
        **_: Any,
    ) -> Any:
        if not checkpoint_files:
            raise CheckpointError(
                "transformers did not say which files it loads, so that they cannot be checked; "
                "load the folder of a checkpoint, with a version of transformers that lrc supports"
            )
        folder, options = Path(checkpoint_files[0]).parent, self.quantization_config
        keep = getattr(model.config, BUDGET, None)
        if keep is not None:
            self._cut = budget_index(options.budgets, keep, where=str(folder), key=BUDGET)
        expected = self.rebuild_(model)
        devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        skeleton = {*map(str, devices)} == {"meta"}
        absent = self._read_parent(model, folder, skeleton=skeleton)
        check_headers(expected, checkpoint_files, model, absent)
        # Files are compared with their hashes while transformers loads them.
        manifest = read_manifest(folder)
        self._wait_for_hashes = manifest.start_check() if manifest and not skeleton else None
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if any(isinstance(end, CompressedLinear | TiedHead) for end in ends):
            # Not a bound method, which would be pickled as the one of the class.
            model.resize_token_embeddings = partial(_resize_token_embeddings, model)
        return model

    def _read_parent(self, model: Any, folder: Path, *, skeleton: bool) -> list[str]:
        """Read what the files lack from the parent; return the names of the weights."""
        weights = ParentWeights.parse(vars(self.quantization_config).get(layout.PARENT), BLOCK)
        if weights is None:
            return []
        local = fit_names({layout.PARENT: weights.tensors}, model)[layout.PARENT]
        if not skeleton:
            found = read_parent(weights, getattr(model.config, PARENT_MODEL, None), folder)
            by_tensor = {weights.tensors[name]: tensor for name, tensor in found.items()}
            self._parent = {name: by_tensor[tensor] for name, tensor in local.items()}
        return expect_parent_(model, local)

    def rebuild_(self, model: Any) -> TensorSpecs:
        """Change a model without weights as the config states; return the tensors it expects."""
        self._has_split_experts = has_experts(self.quantization_config.tables[MODULES], model)
        if self._has_split_experts:
            split_experts_(model)
        tables = fit_names(self.quantization_config.tables, model)
        self.quantization_config.tables = tables
        modules = layout.parse_modules(tables[MODULES], BLOCK)
        shapes, biases = tables.get(SHAPES, {}), tables.get(BIASES, [])
        with _as_checkpoint_error(BLOCK):
            self._original_shapes = resize_(model, shapes)
            if NORMS in tables:
                heads = head_shapes(model, shapes)
                resize_(model, heads)
                self.quantization_config.tables = {**tables, SHAPES: {**shapes, **heads}}
            add_biases_(model, biases)
        self._added_biases = [*biases, *added_biases(model, modules)]
        expected = layout.resized_tensors(shapes)
        for name in biases:
            if name not in modules:
                expected[f"{name}.bias"] = TensorSpec([model.get_submodule(name).out_features])
        expected |= replace_layers(model, modules)
        with _as_checkpoint_error(BLOCK):
            # They change the basis of the residual stream between blocks.
            shortcuts = place_norms_(model, tables.get(NORMS, {}))
        expected |= {name: TensorSpec(shape) for name, shape in shortcuts.items()}
        return expected

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self._parent is not None:
            fill_from_parent_(model, self._parent)
            self._parent = None
            # The model is complete now, and so are the files that it may be saved to.
            vars(self.quantization_config).pop(layout.PARENT, None)
            vars(model.config).pop(PARENT_MODEL, None)
        if self._wait_for_hashes is not None:
            self._wait_for_hashes()
            self._wait_for_hashes = None  # a model is copied and pickled with its quantizer
        check_values(model)
        if self._cut:
            cut_model_(model, self._cut)
            self._forget_budgets(model)
            setattr(model.config, BUDGET, None)
        convert_inputs_(model)
        replaced = ReplacedTensors()
        optimize(model, replaced=replaced)
        share_inputs(model, replaced=replaced)
        batch_experts(model)
        replaced.flush()
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Replace all compressed layers by ordinary ones.

        Biases that the architecture lacks stay in the config, so that a saved model is complete.
        """
        super().dequantize(model, dtype=dtype)  # type: ignore[no-untyped-call, unused-ignore]
        vars(model).pop("resize_token_embeddings", None)
        self._forget_budgets(model)
        if self._added_biases:
            model.config.quantization_config = LrcConfig(biases=self._added_biases)
        return model if dtype is None else model.to(dtype)

    def _forget_budgets(self, model: Any) -> None:
        """Remove what only an elastic model has in its config."""
        self._cut = 0
        vars(model.config).pop(BUDGET, None)
        vars(self.quantization_config).pop(layout.ELASTIC, None)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        if NORMS in self.quantization_config.tables:
            raise CheckpointError(
                "cannot dequantize: with 'rotations: block' every block uses its own basis of the "
                "residual stream, which the original architecture cannot express; slice with "
                "'rotations: global' instead"
            )
        for name, module in list(model.named_modules()):
            if isinstance(module, CompressedLinear):
                model.set_submodule(name, module.to_dense())
        # After the embeddings, which the tied heads read, are dense.
        for name, module in list(model.named_modules()):
            if isinstance(module, TiedHead):
                embedding = model.get_input_embeddings()
                model.set_submodule(name, module.to_dense(embedding))
                owner = next(n for n, each in model.named_modules() if each is embedding)
                model.all_tied_weights_keys[f"{name}.weight"] = f"{owner}.weight"
        widen_(model, self._original_shapes)  # those of the config without `quantization_config`
        fuse_experts_(model)
        self._has_split_experts = False
        return model

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """Leave the names of split experts as they are; called before weights are loaded.

        Older versions of transformers do not give the model.
        """
        found: Any = super().update_weight_conversions(weight_conversions, *model)  # type: ignore[no-untyped-call, unused-ignore]
        return without_experts(found) if self._has_split_experts else found

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        """Update the config, which `save_pretrained` writes after this call."""
        config = self.quantization_config
        config.tables = current_tables(config.tables, model)
        model.config.quantization_config = config
        return None, {}

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Return True: `save_pretrained` can write the state dict as it is."""
        return True

    is_trainable = True  # Trainer and PEFT accept it: unquantized factors are ordinary parameters
    is_qat_trainable = True  # Trainer may train it without adapters
    is_compileable = True


def _resize_token_embeddings(
    model: Any,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> Any:
    """Replace the method of a model with a quantized embedding or head, whose rows are packed."""
    embedding = model.get_input_embeddings()
    multiple = pad_to_multiple_of or 1
    size = -(-(new_num_tokens or embedding.num_embeddings) // multiple) * multiple
    if size == embedding.num_embeddings:
        return embedding
    raise CheckpointError(
        f"cannot resize the vocabulary from {embedding.num_embeddings} to {size} tokens: the "
        "embedding or the head is stored as integers; call model.dequantize() first (after "
        "'rotations: block', which has no dequantize(): compress without 'embeddings' and "
        "'lm_head')",
        code="quantized-embedding",
    )


@contextmanager
def _as_checkpoint_error(where: str) -> Iterator[None]:
    """Convert a ValueError about a part of the config to a CheckpointError."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"{where}: {error}; the config was edited, or belongs to another model"
        ) from error


def replace_layers(model: nn.Module, modules: Mapping[str, WeightConfig]) -> TensorSpecs:
    """Replace layers by uninitialized compressed ones; return the tensors that they expect.

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
        kind: type[CompressedLinear] = CompressedLinear
        if isinstance(dense, nn.Embedding):
            kind = CompressedEmbedding
        if not isinstance(dense, kind.REPLACES):
            raise CheckpointError(
                f"{BLOCK}.modules names {name!r}, which is not a linear "
                f"layer or embedding of {type(model).__name__}; the config was edited, or belongs "
                "to another model",
                code="invalid-config",
            )
        weight: nn.Parameter = dense.get_parameter("weight")
        with _as_checkpoint_error(f"{BLOCK}.modules[{name!r}]"):
            if tuple(weight.shape) != config.shape:
                raise ValueError(f"shape must be {list(weight.shape)}, got {list(config.shape)}")
            bias = getattr(dense, "bias", None) is not None
            expected |= layout.expected_tensors(name, config, bias=bias)
        parent, _, leaf = name.rpartition(".")
        if kind is CompressedLinear and compares_dtype(type(model.get_submodule(parent)), leaf):
            kind = Int8Linear
        replaced[name] = kind.replacing(dense, config)
        replaced[name].requires_grad_(weight.requires_grad)
        model.set_submodule(name, replaced[name])
        # Some classes (Blt) initialize the weights of layers from the module that has them.
        owner: Any = model.get_submodule(name.rpartition(".")[0])
        if owner is not model and not owner._non_persistent_buffers_set:
            owner._is_hf_initialized = True
    # A second pass, because the layer that stores a shared factor may be listed after its users.
    for name, layer in replaced.items():
        with _as_checkpoint_error(f"{BLOCK}.modules[{name!r}]"):
            layer.connect(model)
    return expected


def check_values(model: nn.Module) -> None:
    """Check the tensors of a model that has been loaded.

    All numbers must be finite, and masks, indices and scales of compressed layers consistent.
    Weights that are offloaded to disk are not checked.

    Raises
    ------
    CheckpointError
        Naming the layers whose tensors violate the invariants of their components.
    """
    problems, checked = [], set()
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            tensors = [*module.parameters(), *module.buffers()]
            checked |= {*map(id, tensors)}
            if not any(tensor.is_meta for tensor in tensors):
                problems += [f"{name}.{text}" for text in module.problems()]
    for name, parameter in model.named_parameters():
        if id(parameter) not in checked and not parameter.is_meta:
            problems += [f"{name} {text}" for text in finite_problems(parameter)]
    if problems:
        raise CheckpointError(
            f"the weights are damaged: {shortened(problems)}; {layout.COPY_AGAIN}",
            code="damaged-weights",
        )


def check_headers(
    expected: TensorSpecs, files: list[str], model: Any = None, absent: Collection[str] = ()
) -> None:
    """Compare the tensors that a checkpoint must have with the headers of its files.

    Those in `absent` need not be there. With `model`, names in the files are those that
    transformers reads as names of the model, and its other weights must be there too, as
    floating-point numbers: transformers would initialize missing ones, and convert integers.

    Raises
    ------
    CheckpointError
        If a file is truncated, or tensors are missing or have a wrong shape or dtype.
    """
    try:
        headers = read_headers(map(Path, files))
    except ValueError as error:
        raise CheckpointError(f"{error}; {layout.COPY_AGAIN}") from error
    if model is not None:
        names = renamed(headers, own_conversions(model), model).items()
        headers = {name: headers[key] for key, (name, converted) in names if not converted}
        expected = _other_weights(model) | expected
    expected = {name: spec for name, spec in expected.items() if name not in absent}
    wrong = layout.mismatches(expected, headers)
    if wrong:
        raise CheckpointError(
            f"the weights do not match config.json: {shortened(wrong)}; {layout.COPY_AGAIN}",
            code="tensor-mismatch",
        )


def _other_weights(model: Any) -> TensorSpecs:
    """Return the floating-point tensors of the decoder and the head, without tied ones.

    The head is left out if the files are of another class, such as the decoder alone.
    """
    prefix, head = f"{model.base_model_prefix}.", model.get_output_embeddings()
    computed = model._keys_to_ignore_on_save or ()
    own = type(model).__name__ in (model.config.architectures or [type(model).__name__])
    if not own:
        head = None
    heads = tuple(f"{name}." for name, module in model.named_modules() if module is head)
    classifies = own and kind_of(model.config).classifies
    if model.base_model is model or classifies:  # names have no prefix, or the head has several
        prefix = ""
    return {
        name: TensorSpec(list(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name.startswith((prefix, *heads))
        and name not in model.all_tied_weights_keys
        and name not in computed
        and tensor.is_floating_point()
    }


def register() -> None:
    """Register lrc with transformers, once."""
    if layout.QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(layout.QUANT_METHOD)(LrcConfig)
        register_quantizer(layout.QUANT_METHOD)(LrcQuantizer)


register()
