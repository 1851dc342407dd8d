"""The format of checkpoints: names, version and configuration, for writing and loading.

A compressed checkpoint is the folder that `save_pretrained` writes: safetensors shards, tokenizer
and the `config.json` of the original architecture. In addition:

* ``config.json: quantization_config`` = ``{"quant_method": "lrc", "format_version": 2,
  "modules": {NAME: CONFIG, ...}}`` with the configuration of every compressed layer, such as
  ``{"shape": [576, 576], "components": [{"type": "low_rank", "rank": 96}]}``. The weight is the
  sum of the components. ``"bias": true`` says that the layer has its own bias, whether or not it
  had one in the source.

* For every compressed layer, ``NAME.weight`` is a sentinel of one uint8, which makes loaders
  without lrc stop instead of starting from random weights; ``NAME.bias`` [d_out] is its bias, if it
  has one; and ``NAME.TYPE.TENSOR`` are the tensors of a component:

  ==================== =========================================================================
  ``low_rank``         ``a.weight`` [rank, d_in], ``b.weight`` [d_out, rank]; the matrix is
                       ``b @ a``
  ``pivoted_low_rank`` ``a.weight`` [rank, d_in]; ``c.weight`` [d_out - rank, rank], absent if
                       rank is d_out; ``order`` [d_out], int16, or int32 if d_out > 32767. Row j
                       of the matrix is row ``order[j]`` of ``cat([a, c @ a])``
  ``sparse``           ``values`` [nonzeros], row by row; ``mask`` [d_out, ceil(d_in / 8)],
                       uint8, with one bit per entry
  ``semi_structured``  n of every eight columns of a row: ``values`` [d_out, d_in / 8, n], of each
                       group in ascending order of its columns; ``mask`` [d_out, d_in / 8], uint8,
                       with one byte per group, of which n bits are set
  ``dictionary``       ``a.weight`` [atoms, d_in]; ``values`` [d_out, nonzeros], the
                       coefficients of every output in ascending order of their atoms; ``mask``
                       [d_out, ceil(atoms / 8)], uint8, or ``index`` [d_out, nonzeros], int16,
                       whichever is smaller (index only if atoms <= 32768). The matrix is
                       ``c @ a`` with the coefficients in ``c`` [d_out, atoms]
  ``tensor_train``     ``core1.weight`` to ``coreN.weight``, N from 2 to 4; core k with bonds a
                       before and b after it, m outputs and n inputs is [m * b, a * n], with the
                       outputs in front of b and a in front of the inputs, and maps those with a
                       to the others. Entry (i_1 ... i_N, j_1 ... j_N) of the matrix, with the
                       first factor of a dimension as its slowest index, is the product of the
                       matrices [a, b] of outputs i_k and inputs j_k. Bonds are 1 at the ends, and
                       otherwise ``bond`` or, if less, the number of entries of the matrix of the
                       cores on one side
  ``dense``            with quantization only: ``weight``
  ``block_sparse``     with symmetric quantization in groups of g columns only: ``values``
                       [groups, g], the stored groups row by row; ``mask`` [d_out,
                       ceil(d_in / g / 8)], uint8, with one bit per group. Others are zero
  ==================== =========================================================================

  A ``low_rank`` or ``dictionary`` component with ``"shares": OWNER`` has no ``a.weight`` and uses
  that of the same component of the layer OWNER.

  With ``"quantization": "int4-g64"``, a matrix M [rows, columns] of the component is stored in the
  layout of compressed-tensors (``pack-quantized``): ``M_packed`` [rows, ceil(columns * bits /
  32)], int32, the codes of a row one after the other from the lowest bit, each plus 2^(bits - 1);
  ``M_scale`` [rows, groups]; ``M_shape`` [2], int64; with ``-asymmetric`` also ``M_zero_point``
  [ceil(rows * bits / 32), groups], int32, packed along the columns. ``int8`` has one group per
  row, ``int4-g64`` one for every 64 columns. With ``int3-g16-s256`` the scales of every 256 columns
  are multiples of a common number, and stored as all others. A number is (code - zero point) *
  scale. Values are stored in one row as ``values_packed`` [1, ceil(count * bits / 32)] and
  ``values_scale`` [ceil(count / group)], with groups of 128 if the quantization has none.

  With ``"pattern": "2:4"`` exactly two of every four consecutive columns of the mask are set. The
  pattern of a ``tensor_train`` component, such as ``"24x24,32x48"``, has the factors of d_out and
  d_in.

  Bit ``j`` of byte ``i`` of a row of a mask, starting from the lowest, is column ``8 i + j``; bits
  after the last column are 0. Tensors without a stated dtype have that of the model.

* In an elastic checkpoint the block has ``"elastic": {"version": 1, "budgets": [0.9, 0.7]}``, the
  budgets in descending order, and ``low_rank`` components that can be cut have ``"ranks"``, one for
  each budget, which do not increase. The first one is stored. At rank r a budget takes the first r
  rows of ``a.weight`` and the first r columns of ``b.weight``; everything else is the same for all
  budgets. ``"budget"`` in ``config.json`` is the one that is loaded unless another is requested.

* A drafter that shares embedding and head with its parent has ``"parent": {"tensors": {MODULE:
  TENSOR, ...}, "dtype": "bfloat16", "sha256": ...}`` and does not store the weights of these
  modules, which are tensors in the files of the parent. ``"parent_model"`` in ``config.json`` is
  the folder or Hub id of the parent.

* An input embedding is stored like a layer of d_out tokens and d_in channels with a ``dense``
  component. What the architecture ties to it has neither tensors nor an entry and uses the same
  integers.

* Tables of the same block describe how slicing changed the model where config.json cannot, by full
  names. ``"shapes": {NAME: [d_out, d_in], ...}``: linear layers, and embeddings [n, width],
  smaller than the config says; configurations in ``modules`` refer to these shapes. ``"biases":
  [NAME, ...]``: linear layers with a bias that they lack in the source. ``"norms": {NAME:
  {"writer": NAME, "rank": R} or {}, ...}``: norms without weights, ``x / sqrt(|x|^2 / hidden_size
  + eps)``; with a writer, ``x @ F @ F^T`` is subtracted from the output of the linear layer
  `writer`, with the input x of the norm and its tensor ``shortcut`` F [k, rank].

* If layers of experts are compressed, which are called ``EXPERTS.NUMBER.gate_up_proj`` (or
  ``up_proj``) and ``EXPERTS.NUMBER.down_proj`` after the module EXPERTS of the architecture, all
  experts are stored under such names: dense matrices as ``NAME.weight`` [d_out, d_in], whichever
  order the architecture has, and biases as ``NAME.bias``. Otherwise experts are stored in the
  parameters of the architecture, which hold those of all experts.

* A model whose weights are all symmetric integers, without such tables, is a plain checkpoint of
  the ``compressed-tensors`` method: ``NAME.weight_packed`` and so on, no sentinels.

* The folder ``lrc/``: the recipe as given and in full, the plan files that stages were given, the
  executed plan, the report, and ``manifest.json`` with the SHA-256 of every other file except the
  model card and the report, which contains its own. Loading compares all files that it reads with
  their hashes, and refuses files that are not listed if transformers might read them. A folder that
  `save_pretrained` wrote has neither this folder nor hashes: what loading then still notices are
  names, shapes and types that do not match, numbers that are not finite, and inconsistent masks,
  indices and scales.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lrc.compressors.io.shards import Header
from lrc.compressors.layers import TensorSpec, TensorSpecs, WeightConfig, layer_tensors
from lrc.configs.errors import CheckpointError

QUANT_METHOD = "lrc"
FORMAT_VERSION = 2
ELASTIC = "elastic"
PARENT = "parent"
COPY_AGAIN = "copy or download the checkpoint again, or compress again"
EDITED = f"the file was edited: {COPY_AGAIN}"
SAFETENSORS_NAMES = {
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}
FOLDER = "lrc"
RECIPE, RECIPE_GIVEN, PLAN, PLAN_GIVEN, REPORT, MANIFEST = (
    f"{FOLDER}/recipe.yaml",
    f"{FOLDER}/recipe.given.yaml",
    f"{FOLDER}/plan.json",
    f"{FOLDER}/plan.given.{{stage}}.json",
    f"{FOLDER}/report.json",
    f"{FOLDER}/manifest.json",
)


def expected_tensors(name: str, config: WeightConfig, *, bias: bool) -> TensorSpecs:
    """Return the tensors of a compressed layer by their names in the file.

    Raises
    ------
    ValueError
        If no weight of that shape can have this configuration.
    """
    return {f"{name}.{leaf}": spec for leaf, spec in layer_tensors(config, bias=bias).items()}


def resized_tensors(shapes: Mapping[str, Sequence[int]]) -> TensorSpecs:
    """Return the weights in a table of shapes."""
    return {f"{name}.weight": TensorSpec(list(shape)) for name, shape in shapes.items()}


def mismatches(expected: TensorSpecs, found: Mapping[str, Header]) -> list[str]:
    """Return one sentence for every tensor that is missing or has another shape or dtype."""
    problems = []
    for name, (shape, dtype, _) in expected.items():
        header = found.get(name)
        if header is None:
            problems.append(f"{name}: expected {shape}, found nothing")
        elif header.shape != shape:
            problems.append(f"{name}: expected {shape}, found {header.shape}")
        elif dtype is None and not header.is_number:
            problems.append(f"{name}: expected floating-point numbers, found {header.dtype}")
        elif dtype is not None and shape == [1] and {header.dtype, dtype} == {"I8", torch.uint8}:
            continue  # a sentinel of `Int8Linear`, saved from a model on disk
        elif dtype is not None and header.dtype != SAFETENSORS_NAMES[dtype]:
            problems.append(f"{name}: expected {SAFETENSORS_NAMES[dtype]}, found {header.dtype}")
    return problems


def check_version(version: Any, where: str) -> None:
    """Reject a checkpoint of another format version.

    Raises
    ------
    CheckpointError
    """
    if version is True or not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"{where}: format_version must be {FORMAT_VERSION}, got {version!r}; {EDITED}",
            code="invalid-version",
        )
    if version < FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {version}, this lrc reads {FORMAT_VERSION}; compress the "
            f"source model again with this version ({RECIPE} in the checkpoint is the recipe; an "
            "error names the new name of every key that was renamed)",
            code="old-version",
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {version}, this lrc reads {FORMAT_VERSION}; the "
            "checkpoint was written by a newer lrc: upgrade lrc to read it",
            code="newer-version",
        )


def quantization_config(
    modules: Mapping[str, WeightConfig], tables: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a checkpoint; empty if stock classes hold the model.

    Parameters
    ----------
    modules : mapping of str to WeightConfig
    tables : mapping
        Tables of a sliced model that are not empty, and that of budgets.
    """
    if not modules and not tables:
        return {}
    known = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
    return {**known, "modules": {n: c.to_json() for n, c in modules.items()}, **tables}


def parse_modules(modules: Any, where: str) -> dict[str, WeightConfig]:
    """Read and check the table of compressed layers.

    Raises
    ------
    CheckpointError
        If this version cannot have written the table.
    """
    if not isinstance(modules, Mapping):
        raise CheckpointError(
            f"{where}: modules must map names to configurations, got {modules!r:.60}; {EDITED}",
            code="invalid-config",
        )
    found: dict[str, WeightConfig] = {}
    for name, record in modules.items():
        try:
            found[name] = WeightConfig.from_json(record)
            if not found[name].compressed:
                raise ValueError("'components' must not be empty")
        except ValueError as error:
            raise CheckpointError(
                f"{where}: modules[{name!r}]: {error}; the file was edited, or a newer lrc wrote "
                f"it: upgrade lrc, or {COPY_AGAIN}",
                code="invalid-config",
            ) from None
    for name, config in found.items():
        if config.shares is not None and config.shares not in found:
            raise CheckpointError(
                f"{where}: modules[{name!r}] must share a factor with a module of the table, got "
                f"{config.shares!r:.60}; {EDITED}",
                code="invalid-config",
            )
    return found
