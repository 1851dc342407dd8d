"""`lrc inspect`: what is inside a checkpoint, read from its headers and one layer of each form."""

from math import prod
from pathlib import Path
from typing import Any

from lrc.compressors.benchmark.fast_paths import stored_slow_forms
from lrc.compressors.benchmark.run_report import read_report
from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.manifest import Manifest, read_object
from lrc.compressors.checkpoint.reader import (
    Contents,
    is_ours,
    read_config,
    read_contents,
    stored_dtype,
)
from lrc.compressors.deltas.delta_format import read_delta
from lrc.compressors.io.files import folder_bytes
from lrc.compressors.layers.model_shapes import SHAPES
from lrc.configs.errors import CheckpointError, UsageError


def describe(folder: Path, *, verify: bool, device: str = "cpu") -> dict[str, Any]:
    """Return the facts of a compressed checkpoint, and which forms are slow on a device.

    Raises a `CheckpointError` for a folder that is no checkpoint of lrc, damaged, of a newer format
    or, with `verify`, changed.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; the checkpoint of a run is its folder OUTPUT/checkpoint"
        )
    if not is_ours(read_config(folder)) and not (folder / layout.FOLDER).is_dir():
        raise CheckpointError(
            f"{folder}: a model, but not one that lrc compressed; give the folder "
            "OUTPUT/checkpoint of a run, or measure a dense model with `lrc eval`"
        )
    contents = read_contents(folder)
    config, headers, modules = contents.config, contents.headers, contents.modules
    block = config.get("quantization_config") or {}
    plan, report = _read_records(folder, contents.manifest, verify=verify)
    counted = {*contents.stored_tensors()} - {f"{name}.bias" for name in modules}
    others = [h for name, h in headers.items() if name not in counted and h.is_number]
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
        "fast_paths": _fast_paths(folder, contents, device),
        layout.ELASTIC: (block.get(layout.ELASTIC) or {}).get("budgets"),
        SHAPES: block.get(SHAPES, {}),
        "totals": plan.get("totals"),
        **{
            key: report.get(key)
            for key in ("slices", "evaluation", "size", "environment", "recipe", "speed")
        },
    }


def describe_delta(folder: Path) -> dict[str, Any]:
    """Return the facts of a delta, whose files are always compared with their hashes.

    Raises a `DeltaError` if it is damaged or changed.
    """
    delta = read_delta(folder)
    keys = ("kind", "method", "base", "sizes")
    return {
        "path": str(folder),
        **{key: delta.description[key] for key in keys},
        "tensors": [
            {"name": each.name, "codec": each.codec, "shape": each.shape, "bits": each.bits}
            for each in delta.records.values()
        ],
        "file_bytes": folder_bytes(folder),
        "verified": True,
    }


def _fast_paths(folder: Path, contents: Contents, device: str) -> dict[str, Any]:
    """Return what has no fast path; needs one layer of each configuration at a time in memory."""
    dtype = stored_dtype(contents)
    forms = stored_slow_forms(folder, contents, device, dtype)
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "slow_forms": [form.to_json() for form in forms],
    }


def _read_records(
    folder: Path, manifest: Manifest | None, *, verify: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the plan and the report of a checkpoint, which must be as they were written."""
    plan, report = folder / layout.PLAN, folder / layout.REPORT
    if manifest is None:
        if verify:
            raise CheckpointError(
                f"{folder}: has no {layout.MANIFEST} with the hashes to compare; "
                f"{layout.COPY_AGAIN}"
            )
        return {}, {}
    manifest.check_hashes(manifest.hashes if verify else ["config.json", layout.PLAN])
    if verify:
        manifest.check_names(loaded_only=False)
    record = read_report(folder) if report.is_file() else {}
    return read_object(plan), record
