"""`lrc inspect`: what is inside a checkpoint, read from its headers alone."""

from math import prod
from pathlib import Path
from typing import Any

from lrc.configs.errors import CheckpointError, RecipeError


def describe(folder: Path, *, verify: bool) -> dict[str, Any]:
    """Return the facts of a compressed checkpoint.

    Raises
    ------
    CheckpointError
        No checkpoint of lrc, damaged, of a newer format, or, with `verify`, changed.
    """
    from lrc.compressors.checkpoint import format as layout
    from lrc.compressors.checkpoint.format import AGAIN
    from lrc.compressors.checkpoint.reader import (
        check_files,
        read_config,
        read_object,
        verify_hashes,
    )

    if not folder.is_dir():
        raise RecipeError(
            [f"{folder}: no such folder; the checkpoint of a run is its folder OUTPUT/checkpoint"]
        )
    config = read_config(folder)
    block = config.get("quantization_config")
    if not isinstance(block, dict) or block.get("quant_method") != layout.QUANT_METHOD:
        raise CheckpointError(
            f"{folder}: a model, but not one that lrc compressed; give the folder "
            "OUTPUT/checkpoint of a run, or measure a dense model with `lrc eval`"
        )
    shapes = check_files(folder)
    if verify:
        problems = verify_hashes(folder)
        if problems:
            raise CheckpointError(f"{folder}: {'; '.join(problems)}; {AGAIN}")
    plan, report = (
        read_object(path) if path.is_file() else None
        for path in (folder / layout.PLAN, folder / layout.REPORT)
    )
    modules = []
    for name, spec in block["modules"].items():
        a, b = shapes.get(f"{name}.a.weight"), shapes.get(f"{name}.b.weight")
        if a is None or b is None or a[0] != spec["rank"] or b[1] != spec["rank"]:
            raise CheckpointError(
                f"{folder}: the tensors of {name} do not fit config.json (rank {spec['rank']}, "
                f"found {a or 'no'} and {b or 'no'} factor); {AGAIN}"
            )
        modules.append(
            {"name": name, "form": spec["form"], "rank": spec["rank"], "shape": [b[0], a[1]]}
        )
    return {
        "path": str(folder),
        "architecture": (config.get("architectures") or [config.get("model_type")])[0],
        "format_version": block["format_version"],
        "file_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "parameters": sum(prod(s) for n, s in shapes.items() if not _sentinel(n, block["modules"])),
        "verified": verify,
        "modules": modules,
        "totals": plan.get("totals") if plan else None,
        "evaluation": report.get("evaluation") if report else None,
        "environment": report.get("environment") if report else None,
        "recipe": report.get("recipe") if report else None,
    }


def _sentinel(name: str, modules: dict[str, Any]) -> bool:
    return name.removesuffix(".weight") in modules
