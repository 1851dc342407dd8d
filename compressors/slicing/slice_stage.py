"""The slicing stages of a recipe: planned from shapes, then carried out one after the other."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from lrc.compressors.checkpoint.format import block
from lrc.compressors.checkpoint.writer import MAX_SHARD_BYTES, write_config, write_weights
from lrc.compressors.layers.shapes import tables_of
from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.source import Source
from lrc.compressors.planning.budget import Whole
from lrc.compressors.planning.plan import Cut
from lrc.compressors.slicing import METHODS
from lrc.compressors.slicing.slice_method import Budget, Work
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Recipe
from lrc.configs.size import parse_size
from lrc.configs.slice import SliceBase

FACTS = "lrc-slice.json"
PENDING = "pending"
"""Fact of a planned cut: what only data will decide."""
# What a config says of where and how it was read, which no method changes.
CIRCUMSTANCES = {"dtype", "_name_or_path", "quantization_config", "transformers_version"}


def plan_slices(
    recipe: Recipe, source: Source, architecture: Architecture
) -> tuple[list[Cut], list[PreTrainedConfig], Architecture]:
    """Plan every slicing stage on what the one before it leaves; no weight is read.

    Returns
    -------
    cuts : list of Cut
    configs : list of PreTrainedConfig
        Of the model behind each stage.
    architecture : Architecture
        Of the model behind the last one.

    Raises
    ------
    RecipeError
        What `SliceMethod.plan` refuses, and a budget that is none.
    """
    cuts: list[Cut] = []
    configs: list[PreTrainedConfig] = []
    for number, options in recipe.stages_of("slice").items():
        before, old = Whole(architecture.stored_parameters()), architecture.model.config
        budget = _budget(options, before, number)
        method = METHODS[options.method]
        if tables_of(old):
            raise RecipeError(
                [
                    f"{budget.where.rpartition('.')[0]}: cannot stand behind stages[{number - 1}], "
                    "which leaves layers that the config does not describe; put that stage last "
                    "of the slices"
                ]
            )
        config = method.plan(architecture, options, budget)
        pending = method.pending(options, config)
        architecture = build(sliced_source(source, config))
        after = Whole(architecture.stored_parameters())
        assert after.bytes <= budget.bytes, f"{options.method} planned beyond its budget"
        if after.bytes == before.bytes:
            raise RecipeError(
                [f"{budget.where}: leaves the model as it is: nothing would be smaller; lower it"]
            )
        cuts.append(
            Cut(
                stage=number,
                method=options.method,
                parameters=(before.parameters, after.parameters),
                bytes=(before.bytes, after.bytes),
                config=changes(old, config),
                facts={PENDING: pending} if pending else {},
            )
        )
        configs.append(config)
    return cuts, configs, architecture


def warnings(recipe: Recipe, architecture: Architecture) -> list[str]:
    """Name what will work but should be known, for a model as it came."""
    tokens = recipe.calibration.samples * recipe.calibration.length
    advised = {each.method: METHODS[each.method] for each in recipe.stages_of("slice").values()}
    return [
        f"calibration: {tokens} tokens are few for {name}; "
        f"{method.advised_tokens(architecture)} or more are advised"
        for name, method in advised.items()
        if tokens < method.advised_tokens(architecture)
    ]


def sliced_source(source: Source, config: PreTrainedConfig, folder: Path | None = None) -> Source:
    """Return the source as a slicing stage leaves it: another config, and weights of its own."""
    return replace(source, config=config, folder=folder or source.folder, gguf=None)


def carry_out(
    folder: Path, work: Work, options: SliceBase, config: PreTrainedConfig, source: Source
) -> None:
    """Slice the model of `work` and write what is left, a model too, into an empty folder."""
    sliced = METHODS[options.method].carry_out(work, options, config)
    small = build(sliced_source(source, sliced.config))
    stored = small.stored_parameters()
    # No tensor larger than a shard: those would be asked for before their turn.
    largest = max(t.numel() * t.element_size() for t in stored.values())
    write_weights(
        folder,
        stored,
        _in_order(sliced.tensors, stored),
        max_shard_bytes=max(MAX_SHARD_BYTES, largest),
    )
    write_config(folder, sliced.config, block({}, tables_of(sliced.config)), source.spec.dtype)
    text = json.dumps(sliced.facts, indent=1) + "\n"
    (folder / FACTS).write_text(text, encoding="utf-8")


def facts_of(folder: Path) -> dict[str, Any]:
    """Return what a method had to say of a model that `carry_out` has written."""
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def _in_order(
    tensors: Iterator[tuple[str, Tensor]], stored: Mapping[str, Tensor]
) -> Callable[[str], Tensor]:
    """Return a reader of tensors that come in the order in which they are asked for."""

    def read(name: str) -> Tensor:
        found, tensor = next(tensors)
        assert found == name, f"sliced {found} where the file needs {name}"
        assert tensor.shape == stored[name].shape, f"{name} is {list(tensor.shape)}"
        return tensor

    return read


def _budget(options: SliceBase, whole: Whole, number: int) -> Budget:
    where = f"stages[{number}].slice"
    if options.keep is not None:
        return Budget(f"{where}.keep", int(options.keep * whole.bytes), whole.bytes)
    assert options.size is not None
    header = whole.header_bytes([])
    wanted = parse_size(options.size) - header
    if not 0 < wanted < whole.bytes:
        raise RecipeError(
            [
                f"{where}.size: must be above the {header:,} bytes of headers and below the "
                f"{whole.bytes + header:,} of the model that is sliced, got {options.size}; "
                f"{'raise' if wanted <= 0 else 'lower'} size"
            ]
        )
    return Budget(f"{where}.size", wanted, whole.bytes)


def changes(old: PreTrainedConfig, new: PreTrainedConfig) -> dict[str, list[Any]]:
    """Return what a stage changes in the config: key -> before, after.

    Tables that say how the model differs from the config stand under their own keys.
    """
    before, after = (
        {k: v for k, v in config.to_dict().items() if k not in CIRCUMSTANCES} | tables_of(config)
        for config in (old, new)
    )
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return {key: [before.get(key), after.get(key)] for key in keys}
