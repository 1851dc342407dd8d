"""The model on its way: the source as safetensors, then what every slicing stage leaves of it."""

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lrc.compressors.calibrate.activation_cache import cache_files
from lrc.compressors.calibrate.calibration_windows import take_windows
from lrc.compressors.checkpoint.writer import new_folder
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import Clock, Machine
from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.configuration import read_config
from lrc.compressors.models.source import Source, convert_gguf, load_dense
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import SliceRecord
from lrc.compressors.prepare import Prepared
from lrc.compressors.slicing.slice_context import SliceContext
from lrc.compressors.slicing.slice_stage import (
    apply_slice,
    config_changes,
    read_facts,
    sliced_source,
)


@dataclass(frozen=True)
class Lineage:
    """The models of a run: each a folder of safetensors and an architecture."""

    prepared: Prepared
    journal: Journal
    machine: Machine
    clock: Clock

    @cached_property
    def weights(self) -> Path:
        """Folder of safetensors for the source; a GGUF file is converted once."""
        source = self.prepared.source
        if source.gguf is None:
            return source.folder
        if not self.journal.has("source"):
            with self.clock("convert"), new_folder(self.journal.path("source")) as folder:
                convert_gguf(source, folder)
        return self.journal.path("source")

    @cached_property
    def architecture(self) -> Architecture:
        """What is decomposed: the last of the models, once it is there."""
        return self._architecture(len(self.prepared.sliced))

    @cached_property
    def reader(self) -> WeightReader:
        """Reads what is decomposed, at the precision of the reference model."""
        return WeightReader(self._folder(len(self.prepared.sliced)), self.architecture)

    def windows(self) -> torch.Tensor:
        """Return the calibration windows [samples, length]; drawn once."""
        return take_windows(
            self.prepared.recipe.calibration,
            self.prepared.tokenizer,
            self.journal,
            seed=self.prepared.recipe.seed,
            embedding=self.prepared.dense.model.get_input_embeddings(),
            dense=lambda: self.load_dense(self.dtype),
            on_step=self.machine.on_step,
        )

    @property
    def dtype(self) -> torch.dtype:
        """What a whole model runs in: CPUs are slow and inexact in 16 bits."""
        return torch.float32 if self.machine.chosen == "cpu" else self.prepared.source.dtype

    def load_dense(self, dtype: torch.dtype) -> Any:
        """Load the whole model as it came."""
        return load_dense(
            self.prepared.source, self.weights, dtype=dtype, device=self.machine.chosen
        )

    def load_sliced(self, dtype: torch.dtype) -> Any:
        """Load the whole model as the slicing stages leave it."""
        return load_dense(
            self._source(len(self.prepared.sliced)),
            self._folder(len(self.prepared.sliced)),
            dtype=dtype,
            device=self.machine.chosen,
        )

    def slice(self) -> list[SliceRecord]:
        """Cut away what the slicing stages ask for, and return what they had to decide."""
        recipe = self.prepared.recipe
        for stage, (options, config) in enumerate(
            zip(recipe.stages_of("slice").values(), self.prepared.sliced, strict=True)
        ):
            if self.journal.has(slice_folder(stage)):
                continue
            before, architecture = self._folder(stage), self._architecture(stage)
            context = SliceContext(
                architecture,
                WeightReader(before, architecture),
                self.windows,
                self.journal,
                self.machine.chosen,
                recipe.calibration.memory_limit_gib,
                recipe.seed,
                self.machine.on_step,
                recipe.calibration.labels,
            )
            final = self.journal.path(slice_folder(stage))
            with self.clock("slice"), new_folder(final) as folder:
                apply_slice(folder, context, options, config, self.prepared.source)
                generation = before / "generation_config.json"
                if generation.is_file():
                    shutil.copy(generation, folder)
                if self.prepared.source.spec.trust_remote_code:
                    for code in self.prepared.source.folder.glob("*.py"):
                        shutil.copy(code, folder)
            self.journal.forget(*cache_files(self.journal))
        return [
            replace(
                cut,
                facts=read_facts(self._folder(cut.stage + 1)),
                config=config_changes(
                    self._source(cut.stage).config, self._source(cut.stage + 1).config
                ),
            )
            for cut in self.prepared.plan.slices
        ]

    def _folder(self, stages: int) -> Path:
        """Return the folder of the model behind so many slicing stages."""
        return self.journal.path(slice_folder(stages - 1)) if stages else self.weights

    def _architecture(self, stages: int) -> Architecture:
        return build(self._source(stages)) if stages else self.prepared.dense

    def _source(self, stages: int) -> Source:
        source = self.prepared.source
        if not stages:
            return source
        folder = self._folder(stages)
        return sliced_source(source, read_config(folder, source.spec, ours=True), folder)


def slice_folder(stage: int) -> str:
    """Return the journal's name for the model behind a slicing stage."""
    return f"sliced-{stage}"
