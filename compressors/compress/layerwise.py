"""Execute a plan: read weights, compress them and store the results, one layer at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from lrc.compressors.calibrate.statistics import routed_tokens
from lrc.compressors.compress.batches import batches
from lrc.compressors.compress.group import CompressedGroup, stored_weight
from lrc.compressors.compress.prefix import Prefix, measure, rounds
from lrc.compressors.compress.task_solver import Solved, TaskSolver
from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.io.background_writes import BackgroundWrites
from lrc.compressors.io.device_copies import to_host
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.tasks import LayerResult, LayerTask
from lrc.compressors.solvers.error_compensation import PrefixMoments
from lrc.compressors.solvers.moments import Statistics

COMPRESSED = "compressed"
"""Folder of the journal with the results."""
_RESULTS = TypeAdapter(dict[str, LayerResult])


def compress_layers(
    plan: Plan,
    reader: WeightReader,
    journal: Journal,
    statistics: Callable[..., Statistics],
    *,
    device: str,
    on_step: OnStep,
    prefix: Prefix | None = None,
    finished: Callable[[int], None] = lambda layer: None,
    processes: Processes = ALONE,
    solved: Solved = lambda batch: None,
) -> Plan:
    """Compress every weight of a plan.

    Parameters
    ----------
    plan : Plan
        Without pending tasks.
    statistics : callable
        Returns the calibration statistics of a weight, on `device`.
    prefix : Prefix, optional
        Required if a task compensates.
    finished : callable
        Called with the index of a layer when its results are stored and its statistics can be
        deleted, perhaps in another thread.
    processes : Processes
        They divide the tasks of a layer that are solved at the same time, and the first one writes
        the results.
    solved : callable
        Returns results of tasks that need not be solved.

    Returns
    -------
    Plan
        With the results of all tasks, in the first process. The journal has the tensors under their
        names in the checkpoint and in the dtype of the model; those of a group are in the file of
        its first layer.
    """
    layers = sorted({w.layer for task in plan.tasks for w in task.weights})
    # Hidden states are needed up to the last layer that still has to be refitted.
    refit = [task.layer for task in plan.tasks if task.compensate is not None]
    stored = [i for i in layers if journal.has(layer_file(i))]
    stored = processes.agree(stored)
    last = max((i for i in refit if i not in stored), default=-1)
    assert prefix is not None or last < 0
    with BackgroundWrites(device) as writes:
        solver = TaskSolver(reader, statistics, device, plan.seed, solved)
        work = _Compression(plan, solver, journal, processes, finished, writes)
        for index in range(max(layers[-1], last) + 1):
            follows = prefix if index <= last else None
            if index in layers:
                if index not in stored:
                    work.write_layer(index, follows)
                elif follows is not None:
                    names = [name for group in follows.groups(index) for name in group]
                    work.insert(names, {}, {}, follows)  # resumed: this layer is on disk
                if index in stored and processes.first:
                    finished(index)
                on_step("compress", layers.index(index) + 1, len(layers))
            if follows is not None and index < last:
                follows.advance(index)
    for index in layers if processes.first else []:
        plan = plan.with_results(read_results(journal, index))
    return plan


def layer_file(layer: int) -> str:
    """Return the journal's name for the compressed tensors of one decoder layer."""
    return f"{COMPRESSED}/layer-{layer:04d}.safetensors"


def read_results(journal: Journal, layer: int) -> dict[str, LayerResult]:
    """Read the results of the tasks that belong to a finished layer."""
    facts: Any = journal.read_facts(layer_file(layer))["results"]
    return _RESULTS.validate_python(facts)


def write_results(
    journal: Journal,
    layer: int,
    results: Mapping[str, LayerResult],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write results and tensors of a layer; a layer whose file exists is finished."""
    facts = _RESULTS.dump_python(dict(results), mode="json")
    # A safetensors file needs at least one tensor, and a layer may stay dense as a whole.
    stored = tensors or {"none": torch.zeros(1)}
    journal.write_tensors(layer_file(layer), stored, {"results": facts})


def relative_cost(task: LayerTask) -> float:
    """Return about how long a task takes to solve, relative to others of its plan."""
    if not task.compressed:
        return 0.0
    return float(len(task.weights) * prod(task.shape) * min(task.shape))


@dataclass(frozen=True)
class _Compression:
    """Compresses the layers of a plan one after the other; see `compress_layers`."""

    plan: Plan
    solver: TaskSolver
    journal: Journal
    processes: Processes
    finished: Callable[[int], None]
    writes: BackgroundWrites

    def write_layer(self, layer: int, prefix: Prefix | None) -> None:
        """Compress the tasks of a layer and write its file, which may end in the background."""
        results: dict[str, LayerResult] = {}
        tensors: dict[str, Tensor] = {}

        device = self.solver.device
        tasks = [task for task in self.plan.tasks if task.layer == layer]
        routed: dict[str, tuple[int, int]] = {}
        for other in sorted({weight.layer for task in tasks for weight in task.weights}):
            routed |= routed_tokens(self.journal, other)

        def store(done: CompressedGroup) -> None:
            counts = [routed[w.name][0] for w in done.task.weights if w.name in routed]
            n_tokens = tuple(counts) if len(counts) > 1 else next(iter(counts), None)
            results[done.task.name] = replace(self._predicted(done), n_tokens=n_tokens)
            tensors.update(done.tensors)

        refit = {t.name: t for t in tasks if t.compensate is not None and prefix is not None}
        together = batches([task for task in tasks if task.name not in refit], device)
        self._divide(together, self.solver.compress_batch, store)
        if prefix is not None:
            # Weights compressed so far are inserted before the next inputs are measured.
            groups = prefix.groups(layer)
            for several in rounds(groups, refit):
                measured: dict[str, PrefixMoments] = {}
                for names in several:
                    targets = [refit[name] for name in names if name in refit]
                    if targets:
                        last = names == groups[-1]
                        moments = measure(prefix, layer, names, targets, last=last)
                        measured |= {task.name: moments for task in targets}
                if waiting := [refit.pop(name) for name in measured]:
                    alone = len(several) == 1
                    split = [[t] for t in waiting] if alone else batches(waiting, device)
                    self._divide(split, partial(self.solver.refit_batch, measured=measured), store)
                for names in several:
                    self.insert(names, results, tensors, prefix)
            # Those that the model does not execute, like an unused expert.
            self._divide([[task] for task in refit.values()], self.solver.compress_batch, store)

        def write() -> None:
            write_results(self.journal, layer, results, tensors)
            self.finished(layer)

        if self.processes.first:
            self.writes.add(sum(tensor.nbytes for tensor in tensors.values()), lambda: write)

    def _divide(
        self,
        together: Sequence[Sequence[LayerTask]],
        solve: Callable[[Sequence[LayerTask]], list[CompressedGroup]],
        store: Callable[[CompressedGroup], None],
    ) -> None:
        """Solve batches of tasks that do not depend on each other; store those of all processes."""
        costs = [sum(relative_cost(task) for task in batch) for batch in together]
        owners = self.processes.owners(costs)
        solved: dict[str, CompressedGroup] = {}
        for batch, owner in zip(together, owners, strict=True):
            if owner == self.processes.rank:
                solved |= {done.task.name: done for done in solve(batch)}
        for batch, owner in zip(together, owners, strict=True):
            for task in batch:
                done = solved.get(task.name, CompressedGroup(task, LayerResult(task.config)))
                tensors, result = self.processes.exchange(owner, done.tensors, done.result)
                tensors = {name: to_host(tensor) for name, tensor in tensors.items()}
                store(CompressedGroup(task, result, tensors))

    def insert(
        self,
        names: Sequence[str],
        results: Mapping[str, LayerResult],
        tensors: Mapping[str, Tensor],
        prefix: Prefix,
    ) -> None:
        """Insert compressed weights into the prefix; those of finished layers are on disk."""
        task_of = {w.name: task for task in self.plan.tasks for w in task.weights}
        for name in names:
            if name not in task_of:
                continue
            task = task_of[name]
            file = layer_file(task.layer)
            result = results.get(task.name)
            if result is None:
                self.writes.finish()
                self.processes.barrier()  # the first process may still be writing
                result = read_results(self.journal, task.layer)[task.name]

            def read(key: str, file: str = file) -> Tensor:
                known = tensors[key] if key in tensors else self.journal.read_tensor(file, key)
                return known.to(self.solver.device)

            if result.config.compressed or result.refit:
                prefix.insert(name, stored_weight(task, result, name, read))

    def _predicted(self, done: CompressedGroup) -> LayerResult:
        """Return the result with the allocator's prediction where the solver made none."""
        planned, result = self.plan.results.get(done.task.name), done.result
        if planned is None or result.predicted_nats is not None or planned.config != result.config:
            return result
        return replace(result, predicted_nats=planned.predicted_nats)
