"""Check the tensors of a compressed checkpoint: in the headers of its files, and after loading."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.io.shards import read_headers
from lrc.compressors.io.shortened import shortened
from lrc.compressors.layers import CompressedLinear, TensorSpec, TensorSpecs
from lrc.compressors.layers.component import finite_problems
from lrc.compressors.models.contents import renamed
from lrc.compressors.models.expert_tensors import own_conversions
from lrc.compressors.models.model_kinds import kind_of
from lrc.configs.errors import CheckpointError


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
