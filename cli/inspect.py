"""`lrc inspect`: the contents of a checkpoint, read from its headers alone."""

from math import prod
from pathlib import Path
from typing import Any

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.plain import read_plain
from lrc.compressors.checkpoint.reader import check_files, read_config, read_object, verify_hashes
from lrc.compressors.io.shards import Header
from lrc.compressors.layers import FORMS
from lrc.compressors.layers.shapes import SHAPES
from lrc.configs.errors import CheckpointError, RecipeError


def describe(folder: Path, *, verify: bool) -> dict[str, Any]:
    """Return the facts of a compressed checkpoint.

    Raises
    ------
    CheckpointError
        Not a checkpoint of lrc, damaged, of a newer format, or, with `verify`, changed.
    """
    if not folder.is_dir():
        raise RecipeError(
            [f"{folder}: no such folder; the checkpoint of a run is its folder OUTPUT/checkpoint"]
        )
    config = read_config(folder)
    block = config.get("quantization_config")
    method = block.get("quant_method") if isinstance(block, dict) else None
    ours = method == layout.QUANT_METHOD  # else a plain model
    if not ours and not (folder / layout.MANIFEST).is_file():
        raise CheckpointError(
            f"{folder}: a model, but not one that lrc compressed; give the folder "
            "OUTPUT/checkpoint of a run, or measure a dense model with `lrc eval`"
        )
    headers = check_files(folder)
    if not ours:
        plain = {} if method is None else read_plain(folder, block or {}, headers)
        block = {"format_version": layout.FIRST_VERSION, "modules": plain}
    assert block is not None
    if verify and (problems := verify_hashes(folder)):
        raise CheckpointError(f"{folder}: {'; '.join(problems)}; {layout.AGAIN}")
    plan, report = (
        read_object(path) if path.is_file() else {}
        for path in (folder / layout.PLAN, folder / layout.REPORT)
    )
    table, shapes = block["modules"], block.get(SHAPES, {})
    modules = [_module(folder, name, spec, headers, sentinel=ours) for name, spec in table.items()]
    dense = layout.resized_tensors({n: shapes[n] for n in shapes if n not in table})
    if wrong := layout.misfits(dense, headers):
        raise CheckpointError(
            f"{folder}: the tensors do not fit config.json: {'; '.join(wrong[:5])}; {layout.AGAIN}"
        )
    return {
        "path": str(folder),
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "format_version": block["format_version"],
        "file_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "parameters": _parameters(table, modules, headers),
        "verified": verify,
        "modules": modules,
        SHAPES: shapes,
        "totals": plan.get("totals"),
        **{key: report.get(key) for key in ("slices", "evaluation", "environment", "recipe")},
    }


def _module(
    folder: Path, name: str, spec: dict[str, Any], headers: dict[str, Header], *, sentinel: bool
) -> dict[str, Any]:
    """Check the tensors of a compressed matrix against its form, and return its facts.

    `sentinel`: the file holds a tensor that stops loaders that do not know lrc.
    """
    form = FORMS[spec["form"]]
    shapes = {tensor: header.shape for tensor, header in headers.items()}
    try:
        d_out, d_in = spec["shape"] if "scheme" in spec else form.dense_shape(name, spec, shapes)
        bias = f"{name}.{form.BIAS}" in headers
        expected = layout.expected_tensors(name, d_out, d_in, spec, bias=bias)
        if not sentinel:
            del expected[f"{name}.weight"]
        problems = layout.misfits(expected, headers)
    except KeyError as error:
        problems = [f"{error.args[0]}: missing"]
    except (IndexError, ValueError) as error:
        problems = [f"{name}: {error}"]
    if problems:
        raise CheckpointError(
            f"{folder}: the tensors of {name} do not fit config.json: {'; '.join(problems)}; "
            f"{layout.AGAIN}"
        )
    sizes = {size: spec[size] for size in form.SIZES}
    return {
        "name": name,
        "form": spec["form"],
        **sizes,
        "pattern": spec.get("pattern"),
        "scheme": spec.get("scheme"),
        "shape": [d_out, d_in],
        "written": form.written(d_out, d_in, sizes),
    }


def _parameters(
    table: dict[str, dict[str, Any]], modules: list[dict[str, Any]], headers: dict[str, Header]
) -> int:
    """Count the numbers of a model: packed ones too, but neither scales nor indices."""
    count, packed = 0, set()
    for module in modules:
        if module["scheme"] is not None:
            name, form = module["name"], FORMS[module["form"]]
            d_out, d_in = module["shape"]
            sizes = {size: module[size] for size in form.SIZES}
            count += form.parameters_stored(d_out, d_in, scheme=module["scheme"], **sizes)
            spec = {**table[name], "bias": False}  # the bias is not packed
            packed |= {*layout.expected_tensors(name, d_out, d_in, spec, bias=False)}
    return count + sum(
        prod(header.shape)
        for name, header in headers.items()
        # Integers are sentinels and indices.
        if name not in packed and not header.dtype.startswith(("U", "I"))
    )
