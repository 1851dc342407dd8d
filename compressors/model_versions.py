"""The models of a run: the source as safetensors, and what every slicing stage leaves."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from lrc.compressors.calibrate.activation_cache import cache_files
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_windows import counted_tokens
from lrc.compressors.calibrate.layer_check import build_checked, simulated_calls
from lrc.compressors.checkpoint.companions import copy_companions
from lrc.compressors.corpus.pairs import Pairs
from lrc.compressors.corpus.sentences import Sentences
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import Clock, Machine
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.configuration import read_config
from lrc.compressors.models.source import Source, load_dense
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import SliceRecord
from lrc.compressors.prepare import Prepared
from lrc.compressors.slicing.slices import (
    apply_slice,
    config_changes,
    read_facts,
    sliced_source,
)
from lrc.compressors.streamed.streamed_model import ModelFiles
from lrc.configs.recipe import Calibration
from lrc.configs.slice import Slice, SliceBase

_OPTIONS: TypeAdapter[SliceBase] = TypeAdapter(Slice)


@dataclass(frozen=True)
class ModelVersions:
    """The models of a run: each is a folder of safetensors and an architecture."""

    prepared: Prepared
    journal: Journal
    machine: Machine
    clock: Clock
    windows: Callable[[], Tensor]
    """Returns the calibration windows [samples, length]."""
    sentences: Callable[[], Sentences | Pairs] | None = None
    """Returns the calibration texts of an encoder or an encoder-decoder model."""

    @cached_property
    def weights(self) -> Path:
        """Folder of the source as safetensors; a GGUF file is converted once."""
        source = self.prepared.source
        if source.gguf is None:
            return source.folder
        if not self.journal.has("source"):
            # It imports the package gguf, which takes a third of a second.
            from lrc.compressors.checkpoint.gguf_conversion import convert_gguf

            with self.clock("convert"), self.journal.new_folder("source") as folder:
                convert_gguf(source, folder)
        return self.journal.path("source")

    @cached_property
    def architecture(self) -> Architecture:
        """Architecture of the model that is decomposed, after all slicing stages."""
        return self._architecture(self._last)

    @cached_property
    def reader(self) -> WeightReader:
        """Reader of the model that is decomposed."""
        return WeightReader(self._folder(self._last), self.architecture)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which whole models run; CPUs are slow and inexact in 16 bits."""
        return torch.float32 if self.machine.chosen == "cpu" else self.prepared.source.dtype

    def load_dense(self, dtype: torch.dtype) -> Any:
        """Load the source model."""
        device = self.machine.chosen
        return load_dense(self.prepared.source, self.weights, dtype=dtype, device=device)

    def dense_files(self) -> ModelFiles:
        """Return the source model, to be read layer by layer."""
        dense = self.prepared.dense
        reader = WeightReader(self.weights, dense)
        return ModelFiles(dense, reader, simulated_calls(dense), self.dtype)

    def load_sliced(self, dtype: torch.dtype) -> Any:
        """Load the model after all slicing stages."""
        source, folder = self._source(self._last), self._folder(self._last)
        return load_dense(source, folder, dtype=dtype, device=self.machine.chosen)

    def slice(self) -> list[SliceRecord]:
        """Carry out the slicing stages; return their records with what calibration decided."""
        plan = self.prepared.plan
        for number, record in enumerate(plan.slices):
            if not self.journal.has(slice_folder(number)):
                self._slice(number, record)
        return [
            replace(
                record,
                facts=read_facts(self._folder(number + 1)),
                config=config_changes(self._source(number).config, self._source(number + 1).config),
            )
            for number, record in enumerate(plan.slices)
        ]

    def calibration(self, stages: int | None = None) -> CalibrationContext:
        """Return the context to calibrate the model after some slicing stages, by default all."""
        stages = self._last if stages is None else stages
        calibration = Calibration.model_validate(self.prepared.plan.calibration)
        architecture = self._architecture(stages)
        return CalibrationContext(
            architecture,
            WeightReader(self._folder(stages), architecture),
            self.windows,
            self.journal,
            self.machine.chosen,
            calibration.memory_limit_gib,
            self.prepared.plan.seed,
            self.machine.on_step,
            calibration.labels,
            self.sentences,
            lambda: counted_tokens(self.journal),
        )

    def _slice(self, number: int, record: SliceRecord) -> None:
        source, before = self.prepared.source, self._folder(number)
        options = _OPTIONS.validate_python(record.options)
        name = slice_folder(number)
        with self.clock("slice"), self.journal.new_folder(name) as folder:
            apply_slice(
                folder, self.calibration(number), options, self.prepared.sliced[number], source
            )
            generation = before / "generation_config.json"
            if generation.is_file():
                shutil.copyfile(generation, folder / generation.name)
            copy_companions(source, folder)
        self.journal.forget(*cache_files(self.journal))

    @property
    def _last(self) -> int:
        return len(self.prepared.sliced)

    def _folder(self, stages: int) -> Path:
        """Return the folder of the model after a number of slicing stages."""
        return self.journal.path(slice_folder(stages - 1)) if stages else self.weights

    def _architecture(self, stages: int) -> Architecture:
        return build_checked(self._source(stages)) if stages else self.prepared.dense

    def _source(self, stages: int) -> Source:
        source = self.prepared.source
        if not stages:
            return source
        folder = self._folder(stages)
        return sliced_source(source, read_config(folder, source.spec, ours=True), folder)


def slice_folder(number: int) -> str:
    """Return the journal's name for the model after slicing stage `number`, from 0."""
    return f"sliced-{number}"
