"""Compress the weights of a plan layer by layer and write the tensors to disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter
from torch import Tensor

from lrc.compressors.compress.group import (
    CompressedGroup,
    WeightGroup,
    joined,
    left_dense,
    stored_weight,
)
from lrc.compressors.compress.solve import compress_group, refit_dense
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.required_statistics import solver_statistics
from lrc.compressors.planning.tasks import LayerResult, LayerTask, Weight
from lrc.compressors.solvers.error_compensation import PrefixMoments, refit_target
from lrc.compressors.solvers.moments import Moment, Statistics

_RESULTS = TypeAdapter(dict[str, LayerResult])


class Prefix(Protocol):
    """The model up to a layer, dense and compressed, for error compensation."""

    def groups(self, layer: int) -> list[list[str]]:
        """Return the linear layers of a decoder layer by common input, in the order of use."""

    def measure(self, layer: int, names: Sequence[str], *, deficit: bool) -> PrefixMoments:
        """Return moments of a common input, and the deficit of the residual stream if requested."""

    def replace(self, name: str, W_hat: Tensor) -> None:
        """Replace a weight of the present layer by `W_hat` [d_out, d_in]."""

    def advance(self, layer: int) -> None:
        """Run the compressed layer on the compressed states, and the dense one on the dense."""


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
        Called with a layer whose statistics are no longer needed.

    Returns
    -------
    Plan
        With the results of all tasks. The tensors are in the journal in the dtype of the model,
        under their names in the checkpoint; those of a group in the file of its first layer.
    """
    work = Compression(plan, reader, journal, statistics, device)
    layers = sorted({w.layer for task in plan.tasks for w in task.weights})
    # After the last layer that still has to be refit, the states are not needed.
    refit = [task.layer for task in plan.tasks if task.compensate is not None]
    last = max((i for i in refit if not journal.has(layer_file(i))), default=-1)
    assert prefix is not None or last < 0
    for index in range(max(layers[-1], last) + 1):
        follows = prefix if index <= last else None
        if index in layers:
            if not journal.has(layer_file(index)):
                work.write_layer(index, follows)
            elif follows is not None:
                names = [name for group in follows.groups(index) for name in group]
                work.replace(names, {}, {}, follows)
            finished(index)
            plan = plan.with_results(read_results(journal, index))
            on_step("compress", layers.index(index) + 1, len(layers))
        if follows is not None and index < last:
            follows.advance(index)
    return plan


def layer_file(layer: int) -> str:
    """Return the journal's name for the compressed tensors of one decoder layer."""
    return f"compressed/layer-{layer:04d}.safetensors"


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
    """Write results and tensors of a layer, which finishes it."""
    facts = _RESULTS.dump_python(dict(results), mode="json")
    # A safetensors file needs at least one tensor, and a layer may stay dense as a whole.
    stored = tensors or {"none": torch.zeros(1)}
    journal.write_tensors(layer_file(layer), stored, {"results": facts})


@dataclass(frozen=True)
class Compression:
    """Compresses the tasks of a plan one after the other."""

    plan: Plan
    reader: WeightReader
    journal: Journal
    statistics: Callable[[Weight], Statistics]
    device: str

    def write_layer(self, layer: int, prefix: Prefix | None) -> None:
        """Compress the tasks of a layer and finish its file."""
        results: dict[str, LayerResult] = {}
        tensors: dict[str, Tensor] = {}

        def note(done: CompressedGroup) -> None:
            results[done.task.name] = done.result
            tensors.update(done.tensors)

        tasks = [task for task in self.plan.tasks if task.layer == layer]
        refit = {t.name: t for t in tasks if t.compensate is not None and prefix is not None}
        for task in tasks:
            if task.name not in refit:
                note(self.compress(task))
        if prefix is not None:
            # What is compressed already is part of the model on which the next inputs are measured.
            for names in prefix.groups(layer):
                targets = [refit.pop(name) for name in names if name in refit]
                if targets:
                    deficit = any(t.compensate and t.compensate.residual > 0 for t in targets)
                    measured = prefix.measure(layer, names, deficit=deficit)
                    for task in targets:
                        note(self._refit(task, measured))
                self.replace(names, results, tensors, prefix)
            for task in refit.values():  # received no input
                note(self.compress(task))
        write_results(self.journal, layer, results, tensors)

    def replace(
        self,
        names: Sequence[str],
        results: Mapping[str, LayerResult],
        tensors: Mapping[str, Tensor],
        prefix: Prefix,
    ) -> None:
        """Put compressed weights into the prefix; those of finished layers from the journal."""
        task_of = {w.name: task for task in self.plan.tasks for w in task.weights}
        for name in names:
            if name not in task_of:
                continue
            task = task_of[name]
            file = layer_file(task.layer)
            result = results.get(task.name)
            if result is None:
                result = read_results(self.journal, task.layer)[task.name]

            def read(key: str, file: str = file) -> Tensor:
                known = tensors[key] if key in tensors else self.journal.read_tensor(file, key)
                return known.to(self.device)

            if result.config.compressed or result.refit:
                prefix.replace(name, stored_weight(task, result, name, read))

    def compress(self, task: LayerTask) -> CompressedGroup:
        """Compress a task with the statistics of the dense model."""
        if not task.config.compressed:
            return left_dense(task)
        weights = [self._weight(w) for w in task.weights]
        return compress_group(self._group(task, weights, weights[0].dtype))

    def _refit(self, task: LayerTask, measured: PrefixMoments) -> CompressedGroup:
        """Compress the weight that best restores the dense outputs on the compressed inputs."""
        compensate = task.compensate
        assert compensate is not None
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
        if not task.config.compressed:
            return refit_dense(task, V, W.dtype, note)
        done = compress_group(self._group(task, [V], W.dtype, inputs=Moment.of(measured.H)))
        fallback = joined(note, done.result.fallback)
        if not done.result.config.compressed:
            return refit_dense(task, V, W.dtype, fallback)
        return replace(done, result=replace(done.result, refit=True, fallback=fallback))

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
