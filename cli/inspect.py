"""`lrc inspect`: what is inside a checkpoint, read from its headers alone."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrc.configs.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    from lrc.compressors.io.shards import Header


def describe(folder: Path, *, verify: bool) -> dict[str, Any]:
    """Return the facts of a compressed checkpoint.

    Raises
    ------
    CheckpointError
        No checkpoint of lrc, damaged, of a newer format, or, with `verify`, changed.
    """
    from lrc.compressors.checkpoint import format as layout
    from lrc.compressors.checkpoint.format import AGAIN
    from lrc.compressors.checkpoint.plain import read_plain
    from lrc.compressors.checkpoint.reader import (
        check_files,
        read_config,
        read_object,
        verify_hashes,
    )
    from lrc.compressors.layers.model_shapes import SHAPES

    if not folder.is_dir():
        raise RecipeError(
            [f"{folder}: no such folder; the checkpoint of a run is its folder OUTPUT/checkpoint"]
        )
    config = read_config(folder)
    block = config.get("quantization_config")
    method = block.get("quant_method") if isinstance(block, dict) else None
    if method != layout.QUANT_METHOD and not (folder / layout.MANIFEST).is_file():
        raise CheckpointError(
            f"{folder}: a model, but not one that lrc compressed; give the folder "
            "OUTPUT/checkpoint of a run, or measure a dense model with `lrc eval`"
        )
    headers = check_files(folder)
    if method != layout.QUANT_METHOD:  # a plain model
        plain = {} if method is None else read_plain(folder, block or {}, headers)
        block = {"format_version": layout.FIRST_VERSION, "modules": plain}
    assert block is not None
    if verify:
        problems = verify_hashes(folder)
        if problems:
            raise CheckpointError(f"{folder}: {'; '.join(problems)}; {AGAIN}")
    plan, report = (
        read_object(path) if path.is_file() else None
        for path in (folder / layout.PLAN, folder / layout.REPORT)
    )
    table, shapes = block["modules"], block.get(SHAPES, {})
    stopped = method == layout.QUANT_METHOD  # by a sentinel, without lrc
    modules = [_module(folder, name, spec, headers, stopped) for name, spec in table.items()]
    dense = layout.resized_tensors({n: shapes[n] for n in shapes if n not in table})
    if wrong := layout.misfits(dense, headers):
        raise CheckpointError(
            f"{folder}: the tensors do not fit config.json: {'; '.join(wrong[:5])}; {AGAIN}"
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
        "slices": report.get("slices") if report else None,
        "totals": plan.get("totals") if plan else None,
        "evaluation": report.get("evaluation") if report else None,
        "environment": report.get("environment") if report else None,
        "recipe": report.get("recipe") if report else None,
    }


def _module(
    folder: Path, name: str, spec: dict[str, Any], headers: "dict[str, Header]", stopped: bool
) -> dict[str, Any]:
    """Return the facts of one compressed matrix, once its tensors are what its form prescribes."""
    from lrc.compressors.checkpoint import format as layout
    from lrc.compressors.layers import FORMS

    form = FORMS[spec["form"]]
    shapes = {tensor: header.shape for tensor, header in headers.items()}
    try:
        d_out, d_in = spec["shape"] if "scheme" in spec else form.dense_shape(name, spec, shapes)
        bias = f"{name}.{form.BIAS}" in headers
        expected = layout.expected_tensors(name, d_out, d_in, spec, bias=bias)
        if not stopped:
            del expected[f"{name}.weight"]
        problems = layout.misfits(expected, headers)
    except KeyError as error:
        problems = [f"{error.args[0]}: found nothing"]
    except (IndexError, ValueError) as error:
        problems = [f"{name}: {error}"]
    if problems:
        raise CheckpointError(
            f"{folder}: the tensors of {name} do not fit config.json: {'; '.join(problems)}; "
            f"{layout.AGAIN}"
        )
    sizes = {size: spec[size] for size in form.SIZES}
    written = form.written(d_out, d_in, sizes)
    return {
        "name": name,
        "form": spec["form"],
        **sizes,
        "pattern": spec.get("pattern"),
        "scheme": spec.get("scheme"),
        "shape": [d_out, d_in],
        "written": written,
    }


def _parameters(
    table: dict[str, dict[str, Any]], modules: list[dict[str, Any]], headers: "dict[str, Header]"
) -> int:
    """Count the numbers of a model: those that are packed, and no scales of them."""
    from lrc.compressors.checkpoint import format as layout
    from lrc.compressors.layers import FORMS

    counted, packed = 0, set()
    for module in modules:
        if module["scheme"] is not None:
            name, form = module["name"], FORMS[module["form"]]
            d_out, d_in = module["shape"]
            sizes = {size: module[size] for size in form.SIZES}
            scheme = module["scheme"]
            counted += form.parameters_stored(d_out, d_in, scheme=scheme, **sizes)
            spec = {**table[name], "bias": False}  # which is no part of what is packed
            packed |= {*layout.expected_tensors(name, d_out, d_in, spec, bias=False)}
    rest = (header for name, header in headers.items() if name not in packed and _counts(header))
    return counted + sum(prod(header.shape) for header in rest)


def _counts(header: "Header") -> bool:
    """Say whether a tensor holds parameters: sentinels and indices are integers."""
    return not header.dtype.startswith(("U", "I"))
