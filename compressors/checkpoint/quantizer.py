"""Load compressed checkpoints with transformers: a quantization method registered from outside.

`from_pretrained` builds the original architecture on the meta device, calls the quantizer to
replace modules, and then loads tensors by name. This quantizer replaces compressed layers and
compares the safetensors headers with the expected tensors, because transformers only warns about
missing tensors and leaves them uninitialized. After loading it checks masks, indices and scales.
"""

from collections.abc import Callable, Mapping
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

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.elastic_budgets import (
    BUDGET,
    budget_index,
    cut_model_,
)
from lrc.compressors.checkpoint.lrc_config import BLOCK, LrcConfig, edited_config
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
from lrc.compressors.checkpoint.tensor_checks import check_headers, check_values
from lrc.compressors.io.freed_memory import ReplacedTensors
from lrc.compressors.kernels import optimize
from lrc.compressors.layers import (
    CompressedEmbedding,
    CompressedLinear,
    TensorSpec,
    TensorSpecs,
    TiedHead,
    WeightConfig,
)
from lrc.compressors.layers.compressed_linear import Int8Linear, compares_dtype, convert_inputs_
from lrc.compressors.layers.expert_batches import batch_experts
from lrc.compressors.layers.experts import fuse_experts_, split_experts_
from lrc.compressors.layers.model_shapes import SHAPES, resize_, widen_
from lrc.compressors.layers.residual_basis import BIASES, NORMS, add_biases_, place_norms_
from lrc.compressors.layers.siblings import share_inputs
from lrc.compressors.models.expert_tensors import without_experts
from lrc.configs.errors import CheckpointError


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
        with edited_config(BLOCK):
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
        with edited_config(BLOCK):
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
        with edited_config(f"{BLOCK}.modules[{name!r}]"):
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
        with edited_config(f"{BLOCK}.modules[{name!r}]"):
            layer.connect(model)
    return expected


def register() -> None:
    """Register lrc with transformers, once."""
    if layout.QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(layout.QUANT_METHOD)(LrcConfig)
        register_quantizer(layout.QUANT_METHOD)(LrcQuantizer)


register()
