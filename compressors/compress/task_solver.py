"""Solve the tasks of a plan: read their weights and statistics, and compress them together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrc.compressors.compress.batches import compress_together
from lrc.compressors.compress.group import CompressedGroup, WeightGroup, joined, left_dense
from lrc.compressors.compress.solve import refit_dense
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.required_statistics import solver_statistics
from lrc.compressors.planning.tasks import LayerTask, Weight
from lrc.compressors.solvers.error_compensation import PrefixMoments, refit_target
from lrc.compressors.solvers.moments import Moment, Statistics, needed_tokens

Solved = Callable[[Sequence[LayerTask]], list[CompressedGroup] | None]
"""Returns the results of tasks that are solved together, if they are known already."""


@dataclass(frozen=True)
class TaskSolver:
    """Compresses tasks of a plan that do not depend on each other."""

    reader: WeightReader
    statistics: Callable[..., Statistics]
    device: str
    seed: int
    solved: Solved = lambda batch: None

    def compress(self, task: LayerTask) -> CompressedGroup:
        """Compress a task with the statistics of the dense model."""
        (done,) = self.compress_batch([task])
        return done

    def compress_batch(self, batch: Sequence[LayerTask]) -> list[CompressedGroup]:
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

    def refit_batch(
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
        if not task.config.compressed:
            return refit_dense(task, V, W.dtype, note)
        return self._group(task, [V], W.dtype, measured), note

    def _group(
        self,
        task: LayerTask,
        weights: list[Tensor],
        dtype: torch.dtype,
        measured: PrefixMoments | None = None,
    ) -> WeightGroup:
        """Return weights and their statistics; `measured` replaces inputs of the dense model."""
        replaced = measured is not None and "inputs" in solver_statistics(task)
        less = {"with_inputs": False} if replaced else {}
        known = [
            self.statistics(w, **less) if task.statistics else Statistics() for w in task.weights
        ]
        if measured is not None and replaced:
            inputs, n_tokens = Moment.of(measured.H), measured.n_tokens
            if n_tokens is not None and task.statistics:  # to their scale, see `build_statistics`
                inputs = inputs.scaled(known[0].n_tokens / n_tokens)
            known = [replace(each, inputs=inputs) for each in known]
        bias = None
        if task.config.bias and task.source_bias:
            bias = self.reader.read(f"{task.name}.bias", device=self.device)
        return WeightGroup(task, weights, known, dtype, self.seed, bias)

    def _weight(self, weight: Weight) -> Tensor:
        return self.reader.read(f"{weight.name}.weight", device=self.device)
