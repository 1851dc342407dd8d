"""Put a compressed checkpoint together from the source, the factors and the plan."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.plain import compressed_tensors_config, is_plain
from lrc.compressors.checkpoint.writer import write_config, write_manifest, write_weights
from lrc.compressors.layers import FORMS
from lrc.compressors.layers.shapes import tables_of
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.source import Source
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Plan
from lrc.configs.load import LoadedRecipe, dump_recipe


def write_checkpoint(
    folder: Path,
    *,
    plan: Plan,
    loaded: LoadedRecipe,
    source: Source,
    architecture: Architecture,
    reader: WeightReader,
    tokenizer: Any,
    factors: Callable[[int, str], Tensor],
) -> None:
    """Fill an empty folder with a checkpoint that `from_pretrained` loads.

    Parameters
    ----------
    plan : Plan
        As executed.
    factors : callable
        Returns a factor by decoder layer and the name it is stored with.
    """
    modules = plan.modules()
    tables = tables_of(architecture.model.config)
    plain = is_plain(modules) and not tables
    layer_of = plan.homes()
    refitted = {m.name for m in plan.matrices if m.form == "dense" and m.refit}
    origin: dict[str, Callable[[], Tensor]] = {}
    meta: dict[str, Tensor] = {}

    def from_source(name: str) -> Callable[[], Tensor]:
        return lambda: reader.read(name)

    def from_factors(name: str, layer: int) -> Callable[[], Tensor]:
        return lambda: factors(layer, name)

    for name, parameter in architecture.stored_parameters().items():
        module, _, leaf = name.rpartition(".")
        if module not in modules:
            refit = leaf == "weight" and module in refitted
            meta[name] = parameter
            origin[name] = from_factors(name, layer_of[module]) if refit else from_source(name)
            continue
        spec = modules[module]
        if leaf == "bias":
            if not spec.get("bias"):  # one of the spec's own comes with the factors
                stored = f"{module}.{FORMS[spec['form']].BIAS}"
                meta[stored], origin[stored] = parameter, from_source(name)
            continue
        d_out, d_in = parameter.shape
        tensors = layout.expected_tensors(module, d_out, d_in, spec, bias=False)
        for stored, (shape, dtype) in tensors.items():
            if plain and stored == name:
                continue  # a sentinel: without forms of ours nobody needs to be stopped
            meta[stored] = torch.empty(shape, dtype=dtype or parameter.dtype, device="meta")
            origin[stored] = from_factors(stored, layer_of[module])
    write_weights(folder, meta, lambda name: origin[name]())
    block = layout.block(modules, tables)
    if plain and modules:
        kinds = architecture.model.named_modules()
        linears = [name for name, module in kinds if isinstance(module, nn.Linear)]
        block = compressed_tensors_config(modules, linears)
    write_config(folder, architecture.model.config, block, plan.dtype)
    generation = getattr(architecture.model, "generation_config", None)
    stored_generation = reader.folder / "generation_config.json"
    if stored_generation.is_file():
        shutil.copy(stored_generation, folder)
    elif generation is not None:
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if source.spec.trust_remote_code:
        for code in source.folder.glob("*.py"):
            shutil.copy(code, folder)
    (folder / layout.FOLDER).mkdir()
    _write(folder / layout.RECIPE_GIVEN, loaded.text)
    _write(folder / layout.RECIPE, dump_recipe(loaded.recipe))
    _write(folder / layout.PLAN, json.dumps(plan.to_json(), indent=1) + "\n")
    for stage, text in plan.given.items():
        _write(folder / layout.PLAN_GIVEN.format(stage=stage), text)
    write_manifest(folder, plain=plain)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
