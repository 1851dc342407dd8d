"""`lrc inspect`: what is inside a checkpoint, read from its headers alone."""

from math import prod
from pathlib import Path
from typing import Any

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.plain import plain_name, read_plain
from lrc.compressors.checkpoint.reader import check_files, read_config, read_object, verify_hashes
from lrc.compressors.io.shards import Header
from lrc.compressors.layers import TensorSpecs
from lrc.compressors.layers.model_shapes import SHAPES
from lrc.configs.errors import CheckpointError, RecipeError


def describe(folder: Path, *, verify: bool) -> dict[str, Any]:
    """Return the facts of a compressed checkpoint.

    Raises a `CheckpointError` for a folder that is no checkpoint of lrc, damaged, of a newer format
    or, with `verify`, changed.
    """
    if not folder.is_dir():
        raise RecipeError(
            f"{folder}: no such folder; the checkpoint of a run is its folder OUTPUT/checkpoint"
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
    stopped = method == layout.QUANT_METHOD  # loaders without lrc, by a sentinel
    if stopped:
        assert block is not None
        modules = layout.parse_modules(block.get("modules", {}), f"{folder}/config.json")
    else:
        modules = {} if method is None else read_plain(folder, block or {}, headers)
    if verify and (problems := verify_hashes(folder)):
        raise CheckpointError(f"{folder}: {'; '.join(problems)}; {layout.COPY_AGAIN}")
    plan, report = (
        read_object(path) if path.is_file() else {}
        for path in (folder / layout.PLAN, folder / layout.REPORT)
    )
    shapes = (block or {}).get(SHAPES, {})
    expected: TensorSpecs = {}
    for name, weight in modules.items():
        specs = layout.expected_tensors(name, weight, bias=f"{name}.bias" in headers)
        if not stopped:
            del specs[f"{name}.weight"]
            specs = {plain_name(tensor): spec for tensor, spec in specs.items()}
        expected |= specs
    counted = {*expected} - {f"{name}.bias" for name in modules}
    expected |= layout.resized_tensors({n: shapes[n] for n in shapes if n not in modules})
    if wrong := layout.mismatches(expected, headers):
        raise CheckpointError(
            f"{folder}: the tensors do not match config.json: {'; '.join(wrong[:5])}; "
            f"{layout.COPY_AGAIN}",
            code="tensor-mismatch",
        )
    others = [h for name, h in headers.items() if name not in counted and _is_number(h)]
    return {
        "path": str(folder),
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "format_version": layout.FORMAT_VERSION,
        "file_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "parameters": sum(c.parameters() for c in modules.values())
        + sum(prod(header.shape) for header in others),
        "verified": verify,
        "modules": [
            {
                "name": name,
                **config.to_json(),
                "types": config.types,
                "quantization": None if config.quantization is None else str(config.quantization),
                "description": config.description,
            }
            for name, config in modules.items()
        ],
        SHAPES: shapes,
        "totals": plan.get("totals"),
        **{
            key: report.get(key)
            for key in ("slices", "evaluation", "size", "environment", "recipe")
        },
    }


def _is_number(header: Header) -> bool:
    """Return whether a tensor contains parameters; sentinels and indices are integers."""
    return not header.dtype.startswith(("U", "I"))
