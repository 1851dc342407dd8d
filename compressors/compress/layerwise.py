"""Execute a plan: read weights, compress them and store the results, one layer at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from lrc.compressors.calibrate.statistics import routed_tokens
from lrc.compressors.compress.batches import batches, compress_together
from lrc.compressors.compress.group import (
    CompressedGroup,
    WeightGroup,
    joined,
    left_dense,
    stored_weight,
)
from lrc.compressors.compress.prefix import Prefix, measure, rounds
from lrc.compressors.compress.refine import refine
from lrc.compressors.compress.solve import refit_dense
from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.io.background_writes import BackgroundWrites
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep, to_host
from lrc.compressors.layers import layer_tensors
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.required_statistics import solver_statistics
from lrc.compressors.planning.tasks import LayerResult, LayerTask, Weight
from lrc.compressors.solvers.error_compensation import PrefixMoments, refit_target
from lrc.compressors.solvers.moments import Moment, Statistics, needed_tokens

Solved = Callable[[Sequence[LayerTask]], list[CompressedGroup] | None]
"""Returns the results of tasks that are solved together, if they are known already."""
COMPRESSED = "compressed"
"""Folder of the journal with the results."""
_RESULTS = TypeAdapter(dict[str, LayerResult])


def compress_layers(
    plan: Plan,
    reader: WeightReader,
    journal: Journal,
    statistics: Callable[[Weight], Statistics],
    *,
    device: str,
    on_step: OnStep,
    prefix: Prefix | None = None,
    finished: Callable[[int], None] = lambda layer: None,
    folder: str = COMPRESSED,
    base: str | None = None,
    processes: Processes = ALONE,
    solved: Solved = lambda batch: None,
) -> Plan:
    """Compress every weight of a plan.

    Parameters
    ----------
    plan : Plan
        Without pending tasks.
    statistics : callable
        Returns the calibration statistics of a weight.
    prefix : Prefix, optional
        Required if a task compensates.
    finished : callable
        Called with the index of a layer when its results are stored and its statistics can be
        deleted, perhaps in another thread.
    folder : str
        Of the journal, for the results.
    base : str, optional
        Folder with the results of the same plan at its smallest budget. Tasks that compensate then
        only add refinements to them.
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
    stored = [i for i in layers if journal.has(layer_file(i, folder))]
    stored = processes.agree(stored)
    last = max((i for i in refit if i not in stored), default=-1)
    assert prefix is not None or last < 0
    with BackgroundWrites(device) as writes:
        work = Compression(
            plan,
            reader,
            journal,
            statistics,
            device,
            folder=folder,
            base=base,
            processes=processes,
            solved=solved,
            finished=finished,
            writes=writes,
        )
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
        plan = plan.with_results(read_results(journal, index, folder))
    return plan


def layer_file(layer: int, folder: str = COMPRESSED) -> str:
    """Return the journal's name for the compressed tensors of one decoder layer."""
    return f"{folder}/layer-{layer:04d}.safetensors"


def read_results(journal: Journal, layer: int, folder: str = COMPRESSED) -> dict[str, LayerResult]:
    """Read the results of the tasks that belong to a finished layer."""
    facts: Any = journal.read_facts(layer_file(layer, folder))["results"]
    return _RESULTS.validate_python(facts)


def write_results(
    journal: Journal,
    layer: int,
    results: Mapping[str, LayerResult],
    tensors: Mapping[str, Tensor],
    folder: str = COMPRESSED,
) -> None:
    """Write results and tensors of a layer; a layer whose file exists is finished."""
    facts = _RESULTS.dump_python(dict(results), mode="json")
    # A safetensors file needs at least one tensor, and a layer may stay dense as a whole.
    stored = tensors or {"none": torch.zeros(1)}
    journal.write_tensors(layer_file(layer, folder), stored, {"results": facts})


def relative_cost(task: LayerTask) -> float:
    """Return about how long a task takes to solve, relative to others of its plan."""
    if not task.compressed:
        return 0.0
    return float(len(task.weights) * prod(task.shape) * min(task.shape))


@dataclass(frozen=True)
class Compression:
    """Compresses the tasks of a plan one after the other."""

    plan: Plan
    reader: WeightReader
    journal: Journal
    statistics: Callable[[Weight], Statistics]
    device: str
    folder: str = COMPRESSED
    base: str | None = None
    processes: Processes = ALONE
    solved: Solved = lambda batch: None
    finished: Callable[[int], None] = lambda layer: None
    writes: BackgroundWrites = field(default_factory=lambda: BackgroundWrites("cpu"))

    def write_layer(self, layer: int, prefix: Prefix | None) -> None:
        """Compress the tasks of a layer and write its file, which may end in the background."""
        results: dict[str, LayerResult] = {}
        tensors: dict[str, Tensor] = {}

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
        together = batches([task for task in tasks if task.name not in refit], self.device)
        self._divide(together, self._compress_batch, store)
        if prefix is not None:
            # Weights compressed so far are inserted before the next inputs are measured.
            for several in rounds(prefix.groups(layer), refit):
                measured: dict[str, PrefixMoments] = {}
                for names in several:
                    targets = [refit[name] for name in names if name in refit]
                    if targets:
                        moments = measure(prefix, layer, names, targets)
                        measured |= {task.name: moments for task in targets}
                if waiting := [refit.pop(name) for name in measured]:
                    alone = len(several) == 1
                    split = [[t] for t in waiting] if alone else batches(waiting, self.device)
                    self._divide(split, partial(self._refit_batch, measured=measured), store)
                for names in several:
                    self.insert(names, results, tensors, prefix)
            # Those that the model does not execute, like an unused expert.
            self._divide([[task] for task in refit.values()], self._compress_batch, store)

        def write() -> None:
            write_results(self.journal, layer, results, tensors, self.folder)
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
            file = layer_file(task.layer, self.folder)
            result = results.get(task.name)
            if result is None:
                self.writes.finish()
                self.processes.barrier()  # the first process may still be writing
                result = read_results(self.journal, task.layer, self.folder)[task.name]

            def read(key: str, file: str = file) -> Tensor:
                known = tensors[key] if key in tensors else self.journal.read_tensor(file, key)
                return known.to(self.device)

            if result.config.compressed or result.refit:
                prefix.insert(name, stored_weight(task, result, name, read))

    def compress(self, task: LayerTask) -> CompressedGroup:
        """Compress a task with the statistics of the dense model."""
        (done,) = self._compress_batch([task])
        return done

    def _compress_batch(self, batch: Sequence[LayerTask]) -> list[CompressedGroup]:
        """Compress tasks of equal configurations with the statistics of the dense model."""
        if not batch[0].config.compressed:
            return [left_dense(task) for task in batch]
        if (known := self.solved(batch)) is not None:
            return known
        groups = []
        for task in batch:
            weights = [self._weight(w) for w in task.weights]
            groups.append(self._group(task, weights, weights[0].dtype))
        return compress_together(groups)

    def _refit_batch(
        self, batch: Sequence[LayerTask], measured: Mapping[str, PrefixMoments]
    ) -> list[CompressedGroup]:
        """Fit weights to the dense outputs on the compressed model's inputs, and compress them."""
        done: dict[str, CompressedGroup] = {}
        begun: list[tuple[WeightGroup, str | None]] = []
        for task in batch:
            found = self._refit(task, measured[task.name])
            if isinstance(found, CompressedGroup):
                done[task.name] = found
            else:
                begun.append(found)
        solved = compress_together([group for group, _ in begun])
        for (group, note), each in zip(begun, solved, strict=True):
            task, fallback = group.task, joined(note, each.result.fallback)
            if each.result.config.compressed:
                result = replace(each.result, refit=True, fallback=fallback)
                done[task.name] = replace(each, result=result)
            else:
                done[task.name] = refit_dense(task, group.weights[0], group.dtype, fallback)
        return [done[task.name] for task in batch]

    def _refit(
        self, task: LayerTask, measured: PrefixMoments
    ) -> CompressedGroup | tuple[WeightGroup, str | None]:
        """Fit a weight; return it with a note, to be compressed, or what is compressed already."""
        compensate, n_tokens = task.compensate, measured.n_tokens
        assert compensate is not None
        if n_tokens is not None and n_tokens < needed_tokens(task.shape[1]):
            return self.compress(task)  # an expert with too few tokens to be fitted to
        W = self._weight(task.weights[0])
        V, note = refit_target(
            W,
            measured.H,
            measured.cross,
            mix=compensate.mix,
            damp=compensate.damp,
            deficit=measured.deficit.get(task.name),
            residual=compensate.residual,
        )
        inputs = Moment.of(measured.H)
        if n_tokens is not None and task.statistics:  # to their scale, see `build_statistics`
            inputs = inputs.scaled(self.statistics(task.weights[0]).n_tokens / n_tokens)
        if self.base is not None:
            group = self._group(task, [V], W.dtype, inputs=inputs)
            return refine(group, self._at_smallest(task, self.base))
        if not task.config.compressed:
            return refit_dense(task, V, W.dtype, note)
        return self._group(task, [V], W.dtype, inputs=inputs), note

    def _at_smallest(self, task: LayerTask, folder: str) -> CompressedGroup:
        """Return the result of a task for the smallest budget."""
        file = layer_file(task.layer, folder)
        result = read_results(self.journal, task.layer, folder)[task.name]
        leaves = [leaf for leaf in layer_tensors(result.config) if leaf != "weight"]
        if not result.config.compressed:
            leaves = ["weight"] if result.refit else []
        names = {f"{task.name}.{leaf}": f"{task.name}.{leaf}" for leaf in leaves}
        return CompressedGroup(task, result, self.journal.read_tensors(file, names))

    def _predicted(self, done: CompressedGroup) -> LayerResult:
        """Return the result with the allocator's prediction where the solver made none."""
        planned, result = self.plan.results.get(done.task.name), done.result
        if planned is None or result.predicted_nats is not None or planned.config != result.config:
            return result
        return replace(result, predicted_nats=planned.predicted_nats)

    def _group(
        self,
        task: LayerTask,
        weights: list[Tensor],
        dtype: torch.dtype,
        *,
        inputs: Moment | None = None,
    ) -> WeightGroup:
        """Return weights and their statistics; `inputs` replaces those of the dense model."""
        known = [self.statistics(w) if task.statistics else Statistics() for w in task.weights]
        if inputs is not None and "inputs" in solver_statistics(task):
            known = [replace(each, inputs=inputs) for each in known]
        bias = None
        if task.config.bias and task.source_bias:
            bias = self.reader.read(f"{task.name}.bias", device=self.device)
        on_device = [each.to(self.device) for each in known]
        return WeightGroup(task, weights, on_device, dtype, self.plan.seed, bias)

    def _weight(self, weight: Weight) -> Tensor:
        return self.reader.read(f"{weight.name}.weight", device=self.device)
