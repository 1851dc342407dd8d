"""The context of one run: the prepared recipe, the journal of its results, and the machine."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_windows import (
    FILE,
    SELF,
    provenance,
    sample_windows,
    take_windows,
    vocabulary_warning,
)
from lrc.compressors.corpus.documents import source_identity
from lrc.compressors.corpus.tokens import default_bos
from lrc.compressors.distributed.lifetime import watched
from lrc.compressors.distributed.processes import Processes
from lrc.compressors.io.journal import Journal, open_journal
from lrc.compressors.io.machine import Clock, Machine, OnStep
from lrc.compressors.io.versions import versions
from lrc.compressors.model_versions import ModelVersions
from lrc.compressors.planning.tasks import Weight
from lrc.compressors.prepare import Prepared
from lrc.compressors.solvers.moments import Statistics
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Calibration

T = TypeVar("T")


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
    def processes(self) -> Processes:
        """The processes that execute the run."""
        return self.machine.processes

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
        return ModelVersions(self.prepared, self.journal, self.machine, self.clock, self.windows)

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
        warning = vocabulary_warning(provenance(self.journal))
        if warning is not None and not known:
            self.machine.on_warning(warning)
        return windows

    def statistics(self, weight: Weight) -> Statistics:
        """Return the calibration statistics of a weight."""
        return statistics.load(self.journal, weight.layer, weight.name)

    def divided_calibration(self) -> CalibrationContext:
        """Return the context of work in which all processes take part, see `in_all_processes`."""
        context = self.models.calibration()
        limit = context.memory_limit_gib / self.processes.size
        return replace(context, processes=self.processes, memory_limit_gib=limit)

    def in_all_processes(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return ``work(session, *arguments)`` of this process, after all have called it.

        Called by the first process only: the others wait in `assist` for what it announces.
        `work` must be a function of a module; what it reads from the journal must be there.
        """
        if not self.processes.alone:
            _ = self.models.reader  # converts the source, if it has to be
            self.processes.agree((work, arguments))
        result = work(self, *arguments)
        self.processes.barrier()
        return result

    def assist(self) -> None:
        """Take part in what the first process announces, until it has finished the run."""
        while (announced := self.processes.agree(None)) is not None:
            work, arguments = announced
            work(self, *arguments)
            self.processes.barrier()


def _text_identity(source: str | Mapping[str, float]) -> str | list[list[str | float]]:
    if isinstance(source, str):
        return source_identity(source)
    return [[source_identity(name), fraction] for name, fraction in source.items()]


@contextmanager
def open_session(prepared: Prepared, machine: Machine) -> Iterator[Session]:
    """Say the warnings of a plan and enter the output folder; raises as `open_journal`.

    Ends the run of the other processes, unless an error is raised inside the context.
    """
    for warning in prepared.plan.warnings:
        machine.on_warning(warning)
    output, processes = Path(prepared.recipe.output).expanduser(), machine.processes
    _check_windows(prepared, processes)
    known = identity(prepared)
    with (
        machine.current(),
        open_journal(output, known, overwrite=machine.overwrite) as journal,
        watched(processes, journal.work, machine.on_lost),
    ):
        yield Session(prepared, journal, machine, Clock(journal))
        processes.agree(None)


@contextmanager
def join_session(prepared: Prepared, machine: Machine) -> Iterator[Session]:
    """Enter the output folder that the first process has opened; raises as `watched`."""
    journal = Journal(Path(prepared.recipe.output).expanduser())
    with machine.current(), watched(machine.processes, journal.work, machine.on_lost):
        yield Session(prepared, journal, machine, Clock(journal, keep=False))


def _check_windows(prepared: Prepared, processes: Processes) -> None:
    """Refuse more processes than there are calibration windows to divide."""
    samples = prepared.recipe.calibration.samples
    if processes.size > samples:
        raise RecipeError(
            f"calibration.samples: must be at least the number of processes, {processes.size}, "
            f"which divide the windows, got {samples}; start fewer processes, or raise it"
        )


def identity(prepared: Prepared) -> dict[str, Any]:
    """Return everything that determines the bytes of the checkpoint."""
    recipe = prepared.recipe.model_dump(mode="json", include={"calibration", "stages", "seed"})
    del recipe["calibration"]["memory_limit_gib"]
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
