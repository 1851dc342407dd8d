"""Plan the slicing stages of a recipe from shapes, then apply them one after another."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.layer_check import build_checked
from lrc.compressors.checkpoint.format import quantization_config
from lrc.compressors.checkpoint.writer import MAX_SHARD_BYTES, write_config, write_weights
from lrc.compressors.layers.model_shapes import tables_of
from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.configuration import first_line
from lrc.compressors.models.expert_tensors import with_fused
from lrc.compressors.models.source import Source
from lrc.compressors.planning.plan import SliceRecord
from lrc.compressors.planning.size_budget import WholeModel
from lrc.compressors.slicing import METHODS
from lrc.compressors.slicing.slice_method import Budget
from lrc.configs.errors import RecipeError
from lrc.configs.size import least_text, most_text, parse_size, unit_of
from lrc.configs.slice import SliceBase

FACTS = "lrc-slice.json"
PENDING = "pending"
"""Key in the facts of a planned slice: the shapes that calibration will choose."""
# Config keys that record how a model was stored and read. No slicing method changes them.
PROVENANCE = {
    "architectures",
    "dtype",
    "_name_or_path",
    "quantization_config",
    "transformers_version",
}


def plan_slices(
    stages: Mapping[int, SliceBase], source: Source, architecture: Architecture
) -> tuple[list[SliceRecord], list[PreTrainedConfig], Architecture]:
    """Plan every slicing stage on the result of the one before it, without reading weights.

    Returns a record and a config for each stage, and the architecture after the last one.
    """
    records: list[SliceRecord] = []
    configs: list[PreTrainedConfig] = []
    for number, options in stages.items():
        before, old = WholeModel(architecture.stored_parameters()), architecture.model.config
        budget = _budget(options, before, number)
        method = METHODS[options.method]
        if tables_of(old):
            raise RecipeError(
                f"stages[{number}].slice: cannot follow stages[{number - 1}], which produces "
                "layer shapes that config.json cannot describe; make that stage the last slice"
            )
        config = method.plan(architecture, options, budget)
        try:
            type(config).from_dict(config.to_dict())  # as the result will be read
        except Exception as error:  # validators of configs raise nearly anything
            raise budget.refusal(
                f"{type(config).__name__} does not accept the changes of {options.method} "
                f"({first_line(error)}); use another method"
            ) from error
        pending = method.pending(options, config)
        architecture = build_checked(sliced_source(source, config))
        after = WholeModel(architecture.stored_parameters())
        if after.bytes > budget.bytes:  # the class reads other keys than those that were changed
            raise budget.refusal(
                f"{type(architecture.model).__name__} does not take its sizes from the config keys "
                f"that {options.method} changes ({', '.join(config_changes(old, config))}); use "
                "another method"
            )
        if after.bytes == before.bytes:
            raise budget.refusal("allows the whole model, so nothing would be removed; lower it")
        records.append(
            SliceRecord(
                stage=number,
                method=options.method,
                options=options.model_dump(mode="json"),
                parameters=(before.parameters, after.parameters),
                bytes=(before.bytes, after.bytes),
                config=config_changes(old, config),
                facts={PENDING: pending} if pending else {},
            )
        )
        configs.append(config)
    return records, configs, architecture


def slice_warnings(
    stages: Mapping[int, SliceBase], tokens: int, architecture: Architecture
) -> list[str]:
    """Return warnings about stages that work but may give poor results on the source model."""
    recommended = {
        each.method: METHODS[each.method].recommended_tokens(architecture)
        for each in stages.values()
    }
    return [
        f"calibration: {tokens} tokens are few for {name}; {minimum} or more are recommended"
        for name, minimum in recommended.items()
        if tokens < minimum
    ]


def sliced_source(source: Source, config: PreTrainedConfig, folder: Path | None = None) -> Source:
    """Return the source of a sliced model: a different config and folder of weights."""
    return replace(source, config=config, folder=folder or source.folder, gguf=None)


def apply_slice(
    folder: Path,
    context: CalibrationContext,
    options: SliceBase,
    config: PreTrainedConfig,
    source: Source,
) -> None:
    """Slice the model of the context and write the smaller model into an empty folder."""
    sliced = METHODS[options.method].apply(context, options, config)
    architecture = build(sliced_source(source, sliced.config))
    stored = architecture.stored_parameters()
    # The writer asks for a tensor larger than a shard out of order, which a stream cannot serve.
    meta, read = with_fused(architecture, stored, _sequential_reader(sliced.tensors, stored))
    largest = max(t.numel() * t.element_size() for t in meta.values())
    write_weights(folder, meta, read, max_shard_bytes=max(MAX_SHARD_BYTES, largest))
    block = quantization_config({}, tables_of(sliced.config))
    write_config(folder, architecture.model, block, source.spec.dtype)
    text = json.dumps(sliced.facts, indent=1) + "\n"
    (folder / FACTS).write_text(text, encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the method's facts about a model that `apply_slice` has written."""
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def config_changes(old: PreTrainedConfig, new: PreTrainedConfig) -> dict[str, list[Any]]:
    """Return the config keys and tables that differ, each with its values before and after."""
    before, after = (
        {k: v for k, v in config.to_dict().items() if k not in PROVENANCE} | tables_of(config)
        for config in (old, new)
    )
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return {key: [before.get(key), after.get(key)] for key in keys}


def _sequential_reader(
    tensors: Iterator[tuple[str, Tensor]], stored: Mapping[str, Tensor]
) -> Callable[[str], Tensor]:
    """Return a reader by name of tensors that are requested in the order of the iterator.

    Those that are passed over, as the other matrices of an expert while one of all experts is
    joined, are held until they are requested.
    """
    held: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        while name not in held:
            found, held[found] = next(tensors)
        tensor = held.pop(name)
        assert tensor.shape == stored[name].shape, f"{name} is {list(tensor.shape)}"
        return tensor

    return read


def _budget(options: SliceBase, whole: WholeModel, number: int) -> Budget:
    where = f"stages[{number}].slice"
    if options.keep is not None:
        return Budget(f"{where}.keep", int(options.keep * whole.bytes), whole.bytes)
    assert options.size is not None
    header = whole.header_bytes([])
    allowed = parse_size(options.size) - header
    if not 0 < allowed < whole.bytes:
        unit = unit_of(options.size)
        raise RecipeError(
            f"{where}.size: must be above the {least_text(header, unit)} of file headers and below "
            f"the {most_text(whole.bytes + header, unit)} of the model to slice, got "
            f"{options.size}; "
            f"{'raise' if allowed <= 0 else 'lower'} size"
        )
    return Budget(f"{where}.size", allowed, whole.bytes, header)
