"""Write a smaller budget of an elastic checkpoint as a checkpoint of its own."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.elastic_budgets import BUDGET, budget_index, parse_budgets
from lrc.compressors.checkpoint.manifest import UNLISTED, read_object, write_manifest
from lrc.compressors.checkpoint.reader import Contents, check_checkpoint
from lrc.compressors.checkpoint.writer import INDEX, write_weights
from lrc.compressors.io.files import new_folder
from lrc.compressors.io.shards import Header
from lrc.compressors.layers import ComponentConfig
from lrc.compressors.layers.config import stored_tensors
from lrc.compressors.layers.low_rank import cut_tensor
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.tasks import LayerResult


def export_budget(folder: Path, output: Path, keep: float, *, key: str = BUDGET) -> None:
    """Write the part of an elastic checkpoint that belongs to one of its budgets.

    The result is not elastic. It has the recipe and the plan of the run, but neither its report nor
    its model card, whose numbers hold for the largest budget. One shard is in memory at a time.

    Parameters
    ----------
    folder, output : Path
        A checkpoint, and the folder to create.
    keep : float
        A budget that the checkpoint offers.
    key : str
        Name of `keep` in error messages.

    Raises
    ------
    CheckpointError
        If the checkpoint is damaged, not elastic, or has no such budget.
    OutputError
        If `output` cannot be written.
    """
    contents = check_checkpoint(folder)
    block = contents.config.get("quantization_config") or {}
    budgets = parse_budgets(block.get(layout.ELASTIC), contents.modules, str(folder))
    index = budget_index(budgets, keep, where=str(folder), key=key)
    if (manifest := contents.manifest) is not None:  # recipe and plan get new hashes
        manifest.check_hashes(manifest.hashes.keys() - {*manifest.loaded_files()})
    with new_folder(output) as out:
        _write_weights(out, contents, index)
        _write_config(out, contents, index)
        _copy_files(folder, out, contents, index)
        if contents.manifest is not None:
            write_manifest(out, plain=False)


def _write_weights(out: Path, contents: Contents, index: int) -> None:
    shapes: dict[str, list[int]] = {}
    cuts: dict[str, tuple[str, ComponentConfig]] = {}
    for module, config in contents.modules.items():
        for component in config.components:
            if component.ranks:
                for leaf in stored_tensors(*config.shape, component):
                    cuts[f"{module}.{component.type}.{leaf}"] = leaf, component
        for leaf, spec in config.at_budget(index).tensors().items():
            shapes[f"{module}.{leaf}"] = spec.shape
    meta: dict[str, Tensor] = {}
    read: dict[str, Callable[[], Tensor]] = {}
    for name, header in contents.headers.items():
        if name in cuts and name not in shapes:
            continue  # this budget lacks the component
        read[name] = partial(_read, header, name)
        if name in cuts:
            read[name] = partial(_read_cut, header, name, *cuts[name], index)
        shape = shapes.get(name, list(header.shape))
        meta[name] = torch.empty(shape, dtype=_dtype(header, name), device="meta")
    write_weights(out, meta, lambda name: read[name]())


def _dtype(header: Header, name: str) -> torch.dtype:
    with safe_open(header.file, framework="pt") as file:
        found: Tensor = file.get_slice(name)[:0] if header.shape else file.get_tensor(name)
    return found.dtype


def _read(header: Header, name: str) -> Tensor:
    with safe_open(header.file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _read_cut(header: Header, name: str, leaf: str, config: ComponentConfig, index: int) -> Tensor:
    return cut_tensor(leaf, _read(header, name), config, config.ranks[index])


def _write_config(out: Path, contents: Contents, index: int) -> None:
    config = {**contents.config, BUDGET: None}
    block = {k: v for k, v in config["quantization_config"].items() if k != layout.ELASTIC}
    modules = {name: c.at_budget(index).to_json() for name, c in contents.modules.items()}
    config["quantization_config"] = {**block, "modules": modules}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def _copy_files(folder: Path, out: Path, contents: Contents, index: int) -> None:
    """Copy tokenizer, code, recipe and the like, and write the plan of the budget."""
    manifest = contents.manifest
    names = [file.name for file in folder.iterdir() if file.is_file()]
    if manifest is not None:
        names = [*manifest.hashes]
    for name in names:
        left_out = name in ("config.json", INDEX, layout.PLAN, *UNLISTED)
        if not left_out and not name.endswith(".safetensors"):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, out / name)
    if manifest is not None:
        plan = Plan.from_json(read_object(folder / layout.PLAN))
        text = json.dumps(cut_plan(plan, index).to_json(), indent=1) + "\n"
        (out / layout.PLAN).write_text(text, encoding="utf-8")


def cut_plan(plan: Plan, index: int) -> Plan:
    """Return an executed plan as it would be for one of its budgets, without predicted losses."""
    tasks = [replace(task, config=task.config.at_budget(index)) for task in plan.tasks]
    results = {name: _cut_result(result, index) for name, result in plan.results.items()}
    return replace(plan.with_tasks(tasks), results=results, elastic=())


def _cut_result(result: LayerResult, index: int) -> LayerResult:
    config = result.config.at_budget(index)
    if config == result.config.at_budget(0):
        return replace(result, config=config)
    return replace(result, config=config, relative_error=None, predicted_nats=None)
