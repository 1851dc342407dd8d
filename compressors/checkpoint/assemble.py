"""Write a compressed checkpoint from the source, the compressed tensors and the plan."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.companions import copy_companions
from lrc.compressors.checkpoint.elastic_budgets import elastic_table
from lrc.compressors.checkpoint.manifest import write_manifest
from lrc.compressors.checkpoint.plain import (
    compressed_tensors_config,
    is_plain,
    loads_packed,
    plain_name,
)
from lrc.compressors.checkpoint.writer import reading_threads, write_config, write_weights
from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.layers import sentinel
from lrc.compressors.layers.experts import ordinary_linears, split_modules
from lrc.compressors.layers.model_shapes import tables_of
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.expert_tensors import with_fused
from lrc.compressors.models.source import Source
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Plan
from lrc.configs.load import LoadedRecipe, dump_recipe


def write_tensors(
    folder: Path,
    *,
    plan: Plan,
    architecture: Architecture,
    reader: WeightReader,
    compressed: Callable[[int, str], Tensor],
    trained: Mapping[str, Callable[[], Tensor]],
    processes: Processes = ALONE,
) -> list[Path]:
    """Write the weights of a checkpoint, with names that `from_pretrained` finds.

    Parameters
    ----------
    plan : Plan
        With results.
    compressed : callable
        Returns a compressed tensor by the layer in whose file it is, and its full name. Called in
        several threads.
    trained : mapping of str to callable
        Return tensors that take the place of stored ones, by their full names.
    processes : Processes
        All of them call this function, and write some of the files each.

    Returns
    -------
    list of Path
        The files that this process has written.
    """
    modules, plain = plan.modules(), _is_plain(plan, architecture)
    owners = plan.owner_layers()
    refit = {name for name, result in plan.results.items() if result.refit} - {*modules}
    origin: dict[str, Callable[[], Tensor]] = {}
    meta: dict[str, Tensor] = {}

    for name, parameter in architecture.stored_parameters().items():
        module, _, leaf = name.rpartition(".")
        if module not in modules:
            meta[name], origin[name] = parameter, partial(reader.read, name)
            if leaf == "weight" and module in refit:
                origin[name] = partial(compressed, owners[module], name)
            origin[name] = trained.get(name, origin[name])
            continue
        config = modules[module]
        if leaf == "bias":
            if not config.bias:
                meta[name] = parameter
                origin[name] = trained.get(name, partial(reader.read, name))
            continue
        for stored, (shape, dtype, _) in layout.expected_tensors(
            module, config, bias=False
        ).items():
            final = plain_name(stored) if plain else stored
            if stored == name:
                if plain:
                    continue  # a sentinel is only needed where lrc is needed for loading
                origin[final] = sentinel
            else:
                kept = partial(compressed, owners[module], stored)
                origin[final] = trained.get(stored, kept)
            meta[final] = torch.empty(shape, dtype=dtype or parameter.dtype, device="meta")
    experts = tuple(f"{name}." for name, _ in split_modules(architecture.model))

    def read(name: str) -> Tensor:
        return origin[name]()

    split = any(name.startswith(experts) for name in modules)
    tensors = (meta, read) if split else with_fused(architecture, meta, read)
    return write_weights(folder, *tensors, processes, threads=reading_threads())


def write_checkpoint(
    folder: Path,
    *,
    plan: Plan,
    loaded: LoadedRecipe,
    source: Source,
    architecture: Architecture,
    reader: WeightReader,
    tokenizer: Any,
    user_plans: Mapping[int, str],
) -> None:
    """Complete a checkpoint, after `write_tensors`, so that `from_pretrained` loads it.

    Parameters
    ----------
    plan : Plan
        With results.
    user_plans : mapping of int to str
        Texts of plan files by stage.
    """
    modules, plain = plan.modules(), _is_plain(plan, architecture)
    tables, linears = tables_of(architecture.model.config), ordinary_linears(architecture.model)
    budgets = elastic_table(modules, plan.elastic)
    block = layout.quantization_config(modules, {**tables, **budgets})
    if plain and modules:
        block = compressed_tensors_config(modules, linears)
    write_config(folder, architecture.model, block, plan.model.dtype)
    generation = getattr(architecture.model, "generation_config", None)
    stored_generation = reader.folder / "generation_config.json"
    if stored_generation.is_file():
        shutil.copyfile(stored_generation, folder / stored_generation.name)
    elif generation is not None:
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    copy_companions(source, folder)
    (folder / layout.FOLDER).mkdir()
    _write(folder / layout.RECIPE_GIVEN, loaded.text)
    _write(folder / layout.RECIPE, dump_recipe(loaded.recipe))
    _write(folder / layout.PLAN, json.dumps(plan.to_json(), indent=1) + "\n")
    for stage, text in user_plans.items():
        _write(folder / layout.PLAN_GIVEN.format(stage=stage), text)
    write_manifest(folder, plain=plain)


def _is_plain(plan: Plan, architecture: Architecture) -> bool:
    """Return whether transformers alone can load the checkpoint."""
    modules, linears = plan.modules(), ordinary_linears(architecture.model)
    # Budgets in time are met by the layers of lrc; transformers alone expands integers.
    plain = is_plain(modules, linears) and not tables_of(architecture.model.config)
    return plain and plan.times is None and loads_packed(architecture.model, modules)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
