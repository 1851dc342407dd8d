"""The context of one run: the prepared recipe, the journal of its results, and the machine."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.calibration_sentences import take_sentences
from lrc.compressors.calibrate.calibration_windows import (
    FILE,
    SELF,
    provenance,
    sample_windows,
    take_windows,
    vocabulary_warning,
)
from lrc.compressors.corpus.documents import source_identity
from lrc.compressors.corpus.examples import task_identity
from lrc.compressors.corpus.sentences import Sentences
from lrc.compressors.corpus.tokens import default_bos
from lrc.compressors.io.journal import Journal, open_journal
from lrc.compressors.io.machine import Clock, Machine, OnStep
from lrc.compressors.io.versions import versions
from lrc.compressors.model_versions import ModelVersions
from lrc.compressors.planning.tasks import Weight
from lrc.compressors.prepare import Prepared
from lrc.compressors.solvers.moments import Statistics
from lrc.configs.recipe import Calibration


@dataclass(frozen=True)
class Session:
    """A prepared recipe in its output folder."""

    prepared: Prepared
    journal: Journal
    machine: Machine
    clock: Clock

    @property
    def device(self) -> str:
        """The device that the run uses."""
        return self.machine.chosen

    @property
    def on_step(self) -> OnStep:
        """Progress callback."""
        return self.machine.on_step

    @property
    def calibration(self) -> Calibration:
        """Calibration options of the plan."""
        return Calibration.model_validate(self.prepared.plan.calibration)

    @property
    def checkpoint(self) -> Path:
        """Folder of the compressed checkpoint."""
        return self.journal.output / "checkpoint"

    @cached_property
    def models(self) -> ModelVersions:
        """The source model and what slicing leaves of it."""
        return ModelVersions(
            self.prepared,
            self.journal,
            self.machine,
            self.clock,
            self.windows,
            self.sentences if self.prepared.dense.kind.encoder else None,
        )

    def sampled_windows(self, samples: int, length: int, *, seed: int) -> Tensor:
        """Return windows [samples, length] of text that the dense model writes.

        If the calibration text is such a text, with windows of that length, these are returned.
        """
        if self.calibration.source == SELF and self.calibration.length == length:
            return self.windows()
        return sample_windows(
            self.models.load_dense(self.models.dtype),
            (samples, length),
            bos=default_bos(self.prepared.tokenizer),
            generator=torch.Generator().manual_seed(seed),
            on_step=self.on_step,
        )

    def windows(self) -> Tensor:
        """Return the calibration windows [samples, length], drawn once per run."""
        if self.prepared.dense.kind.encoder:
            return self.sentences().tokens
        known = self.journal.has(FILE)
        windows = take_windows(
            self.calibration,
            self.prepared.tokenizer,
            self.journal,
            seed=self.prepared.plan.seed,
            embedding=self.prepared.dense.model.get_input_embeddings(),
            dense=lambda: self.models.load_dense(self.models.dtype),
            on_step=self.on_step,
        )
        self._warn_of_little_text(known=known)
        return windows

    def sentences(self) -> Sentences:
        """Return the calibration texts of an encoder, drawn once per run."""
        known, dense = self.journal.has(FILE), self.prepared.dense
        found = take_sentences(
            self.calibration,
            self.prepared.tokenizer,
            self.journal,
            seed=self.prepared.plan.seed,
            embedding=dense.model.get_input_embeddings(),
            classes=dense.model.config.id2label if dense.kind.classifies else None,
        )
        self._warn_of_little_text(known=known)
        return found

    def _warn_of_little_text(self, *, known: bool) -> None:
        warning = vocabulary_warning(provenance(self.journal))
        if warning is not None and not known:
            self.machine.on_warning(warning)

    def statistics(self, weight: Weight) -> Statistics:
        """Return the calibration statistics of a weight."""
        return statistics.load(self.journal, weight.layer, weight.name)


def _text_identity(source: str | Mapping[str, float]) -> str | list[list[str | float]]:
    if isinstance(source, str):
        return source_identity(source)
    return [[source_identity(name), fraction] for name, fraction in source.items()]


@contextmanager
def open_session(prepared: Prepared, machine: Machine) -> Iterator[Session]:
    """Say the warnings of a plan and enter the output folder; raises as `open_journal`."""
    for warning in prepared.plan.warnings:
        machine.on_warning(warning)
    output = Path(prepared.recipe.output).expanduser()
    known = identity(prepared)
    with machine.current(), open_journal(output, known, overwrite=machine.overwrite) as journal:
        yield Session(prepared, journal, machine, Clock(journal))


def identity(prepared: Prepared) -> dict[str, Any]:
    """Return everything that determines the bytes of the checkpoint."""
    recipe = prepared.recipe.model_dump(mode="json", include={"calibration", "stages", "seed"})
    del recipe["calibration"]["memory_limit_gib"]
    if (task := prepared.recipe.calibration.task) is not None:
        recipe["calibration"]["task"]["data"] = task_identity(task)
    texts = [recipe["calibration"], *(o for stage in recipe["stages"] for o in stage.values())]
    for options in texts:
        if options.get("source") is not None:
            options["source"] = _text_identity(options["source"])
    installed, times = versions(), prepared.plan.times
    return {
        "model": prepared.source.fingerprint(),
        **recipe,
        **({} if times is None else {"latency_table": times.table.digest}),
        "user_plans": {str(k): v for k, v in prepared.plan.user_plans.items()},
        "versions": {name: installed[name] for name in ("lrc", "torch", "transformers")},
    }
