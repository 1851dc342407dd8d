"""The names and the version of what is written; one place, read by writer and loader alike.

A compressed checkpoint is the folder that `save_pretrained` would leave: safetensors shards,
`config.json` of the original architecture, tokenizer. What is ours:

* ``config.json: quantization_config`` = ``{"quant_method": "lrc", "format_version": 1,
  "modules": {NAME: {"form": FORM, ...}}}``: with the form the sizes below, whole numbers, such as
  ``"rank": R``, and ``"bias": true`` where the method made a bias, in place of the dense layer's or
  where that had none;
* for every module the tensors of its form, below, and ``NAME.weight``, a sentinel of one uint8 that
  makes loaders without lrc stop instead of starting from random weights;

  ======================== =========================================================================
  ``low_rank``             ``a.weight`` [rank, d_in], ``b.weight`` [d_out, rank], ``b.bias``
                           [d_out]; the weight is ``b @ a``
  ``pivoted_low_rank``     ``a.weight`` [rank, d_in], ``c.weight`` [d_out - rank, rank], not there
                           where rank is d_out; ``order`` [d_out], int16, or int32 where d_out >
                           32767; ``bias`` [d_out]; row j of the weight is row ``order[j]`` of
                           ``cat([a, c @ a])``
  ``shared_low_rank``      ``b.weight`` [d_out, rank], ``b.bias`` [d_out]; the weight is ``b @ a``
                           with the ``a`` of the ``low_rank`` module that the entry names as
                           ``"shares"``
  ``sparse``               ``values`` [nonzeros], row after row; ``mask`` [d_out, ceil(d_in / 8)],
                           uint8, whose bits say where they belong; ``bias`` [d_out]; the entry
                           holds ``"d_in"`` too
  ``low_rank_plus_sparse`` the tensors of ``pivoted_low_rank``, and ``values`` and ``mask`` of
                           ``sparse`` without its ``"d_in"``; the weight is the sum of the two
  ``dictionary``           ``a.weight`` [atoms, d_in]; ``values`` [d_out, nonzeros], of every output
                           its coefficients in ascending order of their atoms; ``mask`` [d_out,
                           ceil(atoms / 8)], uint8, whose bits say which atoms, or ``index`` [d_out,
                           nonzeros], int16, which lists them, where that is smaller and atoms <=
                           32768; ``bias`` [d_out]; the weight is ``c @ a`` with the coefficients in
                           their places in ``c`` [d_out, atoms], zeros elsewhere. What has the form
                           ``shared_dictionary`` has the same but ``a.weight``: that is of the
                           ``dictionary`` module that the entry names as ``"shares"``
  ``integers``             with a scheme only: the tensors of the matrix ``weight``, below;
                           ``bias`` [d_out]. ``integers_plus_low_rank`` has ``a.weight`` and
                           ``b.weight`` besides, no integers, whose product ``b @ a`` is added
  ``group_sparse``         with a symmetric scheme of groups of g columns: ``weight_packed`` [1,
                           ceil(groups * g * bits / 32)] and ``weight_scale`` [groups], the kept
                           groups row after row, like ``values`` below; ``mask`` [d_out, ceil(d_in
                           / g / 8)], uint8, whose bits say which groups of a row are kept, the
                           others being 0; ``bias`` [d_out]
  ``embedded_integers``    ``integers`` in the place of an embedding: d_out tokens, d_in wide. What
                           the architecture ties to the embedding has no tensors and no entry: it
                           uses these
  ======================== =========================================================================

  With ``"scheme": "int4-g64"`` in the entry, and then ``"shape": [d_out, d_in]`` beside it, every
  matrix M of these, [rows, columns], is stored as integers in compressed-tensors' layout
  (``pack-quantized``): ``M_packed`` [rows, ceil(columns * bits / 32)], int32, the codes of a row
  one behind the other from the lowest bit on, each plus 2^(bits - 1); ``M_scale`` [rows, groups];
  ``M_shape`` [2], int64; with ``-asymmetric`` also ``M_zero_point`` [ceil(rows * bits / 32),
  groups], int32, packed down the columns. ``int8`` has one group a row, ``int4-g64`` one for every
  64 columns; a number is (code - zero point) * scale. ``values`` are ``values_packed`` [1,
  ceil(count * bits / 32)] and ``values_scale`` [ceil(count / group)], in one row, with groups of
  128 where the scheme names none.

  With ``"pattern": "2:4"`` in the entry exactly two of every four consecutive columns of the mask
  are set, in ``sparse`` columns of the weight and in ``dictionary`` atoms; ``dictionary`` then has
  a mask and no index. These are the two values and the four bits that a kernel for the pattern
  wants of every four.

  A bias is there where the dense layer had one or the entry says so; what is no integer has the
  precision of the model. Bit ``j`` of byte ``i`` of a row of a mask, the lowest being 0, stands
  for column ``8 i + j``; bits beyond the last column are 0;
* where slicing has left a model that is other than its config says, tables in the same block that
  say how, all by full names. ``"shapes": {NAME: [d_out, d_in], ...}``: linears, and embeddings
  [n, width], that are smaller than the config says; a form in ``modules`` stands for a weight of
  that shape. ``"biases": [NAME, ...]``: linears with a bias that they had not. ``"norms": {NAME:
  {"writer": NAME, "rank": R} or {}, ...}``: norms without weights, ``x / sqrt(|x|^2 /
  hidden_size + eps)``, and with a writer the tensor ``shortcut`` F [k, rank]: of ``x @ F @ F^T``,
  x being what the norm reads, the linear that is the writer puts out so much less. A loader
  without lrc meets shapes it did not expect, and stops. ``format_version`` is 2 with such tables,
  and 1 without, which earlier versions read;
* the folder ``lrc/``: the recipe as given and written out, the plan file that a stage was given,
  the executed plan, the report, and ``manifest.json`` with the SHA-256 of every other file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lrc.compressors.io.shards import Header
from lrc.compressors.layers import FORMS, MEMBERS, Sharing
from lrc.configs.errors import CheckpointError

QUANT_METHOD = "lrc"
FORMAT_VERSION = 2
FIRST_VERSION = 1  # of what needs nothing newer, which earlier versions of lrc read too
AGAIN = "copy or download the checkpoint again, or compress again"
# What safetensors calls the types that a form prescribes.
STORED = {torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
FOLDER = "lrc"
RECIPE, RECIPE_GIVEN, PLAN, PLAN_GIVEN, REPORT, MANIFEST = (
    f"{FOLDER}/recipe.yaml",
    f"{FOLDER}/recipe.given.yaml",
    f"{FOLDER}/plan.json",
    f"{FOLDER}/plan.given.{{stage}}.json",
    f"{FOLDER}/report.json",
    f"{FOLDER}/manifest.json",
)


Expected = dict[str, tuple[list[int], torch.dtype | None]]
"""Tensor name -> the shape it must have, and the dtype where it is not the model's."""


def expected_tensors(
    name: str, d_out: int, d_in: int, spec: Mapping[str, Any], *, bias: bool
) -> Expected:
    """Return the tensors of one module, by their names in the file.

    Raises
    ------
    ValueError
        If no weight of that shape can have that spec.
    """
    shapes = FORMS[spec["form"]].stored(d_out, d_in, spec, bias=bias)
    return {f"{name}.{leaf}": facts for leaf, facts in shapes.items()}


def resized_tensors(shapes: Mapping[str, Sequence[int]]) -> Expected:
    """Return the weights of a table of shapes, those of linears that have no form."""
    return {f"{name}.weight": (list(shape), None) for name, shape in shapes.items()}


def misfits(expected: Expected, found: Mapping[str, Header]) -> list[str]:
    """Return one sentence for every tensor that is missing or not of the right kind."""
    problems = []
    for name, (shape, dtype) in expected.items():
        header = found.get(name)
        if header is None:
            problems.append(f"{name}: expected {shape}, found nothing")
        elif header.shape != shape:
            problems.append(f"{name}: expected {shape}, found {header.shape}")
        elif dtype is not None and header.dtype != STORED[dtype]:
            problems.append(f"{name}: expected {STORED[dtype]}, found {header.dtype}")
    return problems


def check_version(version: Any, where: str) -> None:
    """Refuse a checkpoint that was written by a later lrc.

    Raises
    ------
    CheckpointError
        If `version` is not a whole number, or above `FORMAT_VERSION`.
    """
    if version is True or not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"{where}: format_version must be a whole number in [1, {FORMAT_VERSION}], got "
            f"{version!r}; the file was edited: copy or download the checkpoint again"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version is {version}, this lrc reads up to {FORMAT_VERSION}; the "
            "checkpoint was written by a newer lrc: upgrade lrc to read it"
        )


def block(modules: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a checkpoint; empty if stock classes hold it.

    Parameters
    ----------
    modules : mapping
        Name of a linear -> its spec.
    tables : mapping
        Those of `TABLES` that are not empty.
    """
    if not modules and not tables:
        return {}
    newer = tables or any("scheme" in spec for spec in modules.values())
    version = FORMAT_VERSION if newer else FIRST_VERSION
    known = {"quant_method": QUANT_METHOD, "format_version": version}
    return {**known, "modules": dict(modules), **tables}


def check_modules(modules: Any, where: str) -> None:
    """Refuse a module table that this version cannot have written."""
    if not isinstance(modules, Mapping):
        raise CheckpointError(
            f"{where}: modules must map names to forms, got {modules!r:.60}; the file was edited: "
            "copy or download the checkpoint again"
        )
    for name, spec in modules.items():
        problem = _problem(spec, modules)
        if problem:
            what, remedy = problem
            raise CheckpointError(f"{where}: modules[{name!r}] {what}, got {spec!r:.200}; {remedy}")


def _problem(spec: Any, modules: Mapping[str, Any]) -> tuple[str, str] | None:
    """Say what is wrong with one entry of a module table and what helps; None if nothing is."""
    edited = f"the file was edited: {AGAIN}"
    if not isinstance(spec, Mapping) or not isinstance(spec.get("form"), str):
        return "must be {'form': NAME} with the sizes of the form", edited
    form = FORMS.get(spec["form"])
    if form is None:
        remedy = "a newer lrc may have written it: upgrade lrc to read it"
        return f"has none of the forms that this lrc reads, {', '.join(FORMS)}", remedy
    problem = form.problem(spec)
    if problem is None and issubclass(form, Sharing):
        owner, size = modules.get(spec["shares"]), form.WIDTH
        wanted = next(name for name, member in MEMBERS.items() if member == spec["form"])
        if not isinstance(owner, Mapping) or owner.get("form") != wanted:
            problem = f"must share with a {wanted} module of the table, not {owner!r:.60}"
        elif owner.get(size) != spec[size]:
            problem = f"must have the {size} of the module it shares, {owner.get(size)}"
    return (problem, edited) if problem else None
