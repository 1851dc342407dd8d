"""The context of one run: the prepared recipe, the journal of its results, and the machine."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_pairs import take_pairs
from lrc.compressors.calibrate.calibration_sentences import take_sentences
from lrc.compressors.calibrate.calibration_windows import (
    FILE,
    SELF,
    provenance,
    take_windows,
    vocabulary_warning,
)
from lrc.compressors.calibrate.sampled_windows import (
    SAMPLED_LOGITS,
    SAMPLED_TOGETHER,
    loaded_by_layer,
    sample_windows,
    windows_together,
)
from lrc.compressors.calibrate.segments import (
    SegmentedStatistics,
)
from lrc.compressors.compress.layerwise import layer_file
from lrc.compressors.compress.task_solver import Solved
from lrc.compressors.corpus.pairs import Pairs
from lrc.compressors.corpus.sentences import Sentences
from lrc.compressors.corpus.tokens import default_bos
from lrc.compressors.distributed.lifetime import watched
from lrc.compressors.distributed.processes import Processes
from lrc.compressors.evaluate.streaming_rule import FRACTION
from lrc.compressors.io.journal import Journal, open_journal
from lrc.compressors.io.machine import Clock, Machine, OnStep, free_memory
from lrc.compressors.model_versions import ModelVersions
from lrc.compressors.planning.coverage import measured_coverage, refuse_starved
from lrc.compressors.planning.required_statistics import required_statistics
from lrc.compressors.planning.tasks import Weight
from lrc.compressors.prepare import Prepared
from lrc.compressors.run_identity import identity
from lrc.compressors.solvers.moments import Statistics
from lrc.compressors.statistic_division import statistic_segments
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Calibration
from lrc.configs.size import GIB

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """A prepared recipe in its output folder."""

    prepared: Prepared
    journal: Journal
    machine: Machine
    clock: Clock
    solved: Solved = lambda batch: None
    """Returns results of tasks that need not be solved."""

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
        return ModelVersions(
            self.prepared,
            self.journal,
            self.machine,
            self.clock,
            self.windows,
            self.sentences if self.prepared.dense.kind.padded else None,
        )

    def sampled_windows(self, samples: int, length: int, *, seed: int) -> Tensor:
        """Return windows [samples, length] of text that the dense model writes.

        If the calibration text is such a text, with windows of that length, these are returned.
        """
        if self.calibration.source == SELF and self.calibration.length == length:
            return self.windows()
        return self._sample((samples, length), torch.Generator().manual_seed(seed))

    def continued_windows(self, starts: Tensor, length: int, *, seed: int) -> Tensor:
        """Return windows [samples, length] in which the dense model continues `starts`.

        These are [samples, n], with BOS if there is one.
        """
        generator = torch.Generator().manual_seed(seed)
        return self._sample((len(starts), length), generator, starts)

    def windows(self) -> Tensor:
        """Return the calibration windows [samples, length], drawn once per run."""
        if self.prepared.dense.kind.padded:
            return self.sentences().tokens
        return self._windows_of_text()

    def _windows_of_text(self) -> Tensor:
        known = self.journal.has(FILE)
        windows = take_windows(
            self.calibration,
            self.prepared.tokenizer,
            self.journal,
            seed=self.prepared.plan.seed,
            embedding=self.prepared.dense.model.get_input_embeddings(),
            sample=self._sample,
        )
        self._warn_of_little_text(known=known)
        return windows

    def sentences(self) -> Sentences | Pairs:
        """Return the padded calibration texts, drawn once per run.

        Those of an encoder, or pairs for an encoder-decoder model.
        """
        known, dense = self.journal.has(FILE), self.prepared.dense
        found: Sentences | Pairs
        if dense.kind.translates:
            found = take_pairs(
                self.calibration,
                self.prepared.tokenizer,
                self.journal,
                seed=self.prepared.plan.seed,
                model=dense.model,
                windows=self._windows_of_text,
            )
            if self.calibration.task is not None:
                self._warn_of_little_text(known=known)
            return found
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

    def _sample(
        self, shape: tuple[int, int], generator: torch.Generator, starts: Tensor | None = None
    ) -> Tensor:
        """Sample windows from the dense model, layer by layer if it does not fit into memory."""
        bos = default_bos(self.prepared.tokenizer)
        sample = partial(
            sample_windows, bos=bos, generator=generator, on_step=self.on_step, starts=starts
        )
        models, free = self.models, free_memory(self.device)
        n_bytes = self.prepared.plan.dense_parameters * models.dtype.itemsize
        samples, length = shape
        together = windows_together(self.prepared.dense, length, dtype=models.dtype, free=free)
        if n_bytes <= FRACTION * free:
            dense, most = models.load_dense(models.dtype), SAMPLED_TOGETHER
            if self.device != "cpu":
                most = max(1, SAMPLED_LOGITS // dense.config.get_text_config().vocab_size)
            return sample(dense, shape, together=min(most, together))
        files = models.dense_files()
        times = math.ceil(samples / together) * (length - 1)
        self.machine.on_warning(
            f"source: self: the model does not fit into memory ({n_bytes / GIB:.1f} GiB of weights,"
            f" {free / GIB:.1f} GiB are free), so that its layers are read once per token:"
            f" {times * n_bytes / GIB:,.0f} GiB in all; shorter windows need fewer reads, and a"
            " text as the source none"
        )
        with loaded_by_layer(
            files.architecture, files.reader, device=self.device, dtype=models.dtype
        ) as model:
            return sample(model, shape, together=together)

    @cached_property
    def segments(self) -> SegmentedStatistics | None:
        """Collects statistics when they are used; None if those of all layers are collected first.

        Layers that are compressed already need none.
        """
        found = statistic_segments(self.prepared) if self.processes.alone else None
        if found is None:
            return None
        tasks = self.prepared.plan.tasks
        left = [task for task in tasks if not self.journal.has(layer_file(task.layer))]
        return SegmentedStatistics(self.models.calibration(), required_statistics(left), found)

    def statistics(self, weight: Weight, *, with_inputs: bool = True) -> Statistics:
        """Return the calibration statistics of a weight, on the device of the run."""
        if self.segments is not None:
            collected = self.segments.collect_for(weight.layer)
            self.check_coverage(collected)
        return statistics.load(
            self.journal, weight.layer, weight.name, self.device, with_inputs=with_inputs
        )

    def check_coverage(self, layers: Iterable[int]) -> None:
        """Raise a `DataError` if most experts of some layers received too few tokens."""
        counts = statistics.expert_tokens(self.journal, layers)
        refuse_starved(
            measured_coverage(counts), self.calibration.samples * self.calibration.length
        )

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


@contextmanager
def open_session(
    prepared: Prepared, machine: Machine, solved: Solved = lambda batch: None
) -> Iterator[Session]:
    """Say the warnings of a plan and enter the output folder; raises as `open_journal`.

    Ends the run of the other processes, unless an error is raised inside the context.
    """
    for warning in prepared.plan.warnings:
        machine.on_warning(warning)
    output, processes = Path(prepared.recipe.output).expanduser(), machine.processes
    check_division(prepared, processes.size)
    known = identity(prepared)
    with (
        machine.current(),
        open_journal(output, known, overwrite=machine.overwrite) as journal,
        watched(processes, journal.work, machine.on_lost),
    ):
        clock = Clock(journal)
        watching = replace(machine, on_step=clock.disk.watching(machine.on_step))
        yield Session(prepared, journal, watching, clock, solved)
        processes.agree(None)


@contextmanager
def join_session(prepared: Prepared, machine: Machine) -> Iterator[Session]:
    """Enter the output folder that the first process has opened; raises as `watched`."""
    journal = Journal(Path(prepared.recipe.output).expanduser())
    with machine.current(), watched(machine.processes, journal.work, machine.on_lost):
        yield Session(prepared, journal, machine, Clock(journal, keep=False))


def check_division(prepared: Prepared, processes: int) -> None:
    """Raise a `RecipeError` if a number of processes cannot divide a run."""
    if processes == 1:
        return
    if prepared.dense.kind.padded:
        what = "encoder" if prepared.dense.kind.encoder else "encoder-decoder model"
        raise RecipeError(
            f"model: is an {what}, whose texts cannot be divided between {processes} "
            "processes; start one"
        )
    if statistic_segments(prepared) is not None:
        raise RecipeError(
            "calibration.disk_limit_gib: the statistics of all layers must fit on the disk if "
            f"{processes} processes share them; start one, raise it, or choose an output "
            "folder with more room"
        )
    samples = prepared.recipe.calibration.samples
    if processes > samples:
        raise RecipeError(
            f"calibration.samples: must be at least the number of processes, {processes}, "
            f"which divide the windows, got {samples}; start fewer processes, or raise it"
        )
