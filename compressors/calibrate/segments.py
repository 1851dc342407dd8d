"""Statistics of a few layers at a time, for models whose statistics do not fit on the disk.

The layers are divided into segments of consecutive layers. When the statistics of a layer are
needed, those of its segment are collected, and they can be deleted after use. A segment starts from
the hidden states at its first layer and, for statistics of gradients, from the gradients at the
output of its last layer; both are stored in float32, so that the sums are those of a single pass
over all layers, bit by bit. Compression goes through the layers in another order than the backward
pass, therefore every segment is passed through twice if sizes are allocated first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from math import prod

import numpy as np
import torch
from torch import Tensor

from lrc.compressors.calibrate.activation_cache import (
    ActivationCache,
    allocate_checkpoints,
    cache_files,
)
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_passes import backward_head
from lrc.compressors.calibrate.statistic_table import LinearStatistics, Required
from lrc.compressors.calibrate.statistics import (
    GRADIENTS,
    INPUTS,
    Collector,
    Variant,
    statistics_files,
)
from lrc.compressors.io.device_copies import copy_
from lrc.compressors.io.files import new_file
from lrc.compressors.io.freed_memory import drop_shared_pages
from lrc.compressors.io.journal import Journal
from lrc.compressors.models.architecture import Architecture, Linear
from lrc.compressors.solvers.linalg import tensor_cores

FOLDER = "boundaries"
"""Of the journal, with the hidden states and gradients between segments."""
VALUE_BYTES = 4
"""Of sums, hidden states and gradients."""


def statistics_bytes(architecture: Architecture, required: Required, *, stored: bool) -> list[int]:
    """Return the size of the required statistics of every layer on disk, or else in memory.

    The statistics of experts without tokens, which are known after calibration only, are included.
    """
    found = [0] * len(architecture.layer_names)
    by_layer: list[dict[str, Linear]] = [{} for _ in found]
    for linear in architecture.linears:
        by_layer[linear.layer][linear.name] = linear
    for layer, (linears, groups) in enumerate(zip(by_layer, architecture.groups, strict=True)):
        needed = {name: required[name] for name in linears if name in required}
        known = [[name for name in group if name in linears] for group in groups]
        for sums in (
            LinearStatistics.forward([group for group in known if group], linears, needed),
            LinearStatistics.backward(linears, needed),
        ):
            found[layer] += VALUE_BYTES * sums.numbers(linears, stored=stored)
    return found


def differentiates(required: Required) -> bool:
    """Return whether statistics of gradients are required."""
    return any({"gradients", "row_fisher"} & {*names} for names in required.values())


@dataclass(frozen=True)
class Segments:
    """Consecutive layers whose statistics are on the disk together."""

    ends: tuple[int, ...]
    """First layers of all segments, and the number of layers."""
    bytes: int
    """Disk space of the statistics of a segment, and of the boundaries of all."""

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.ends) - 1

    def of(self, layer: int) -> tuple[int, int]:
        """Return the first layer of the segment of a layer, and the one after its last."""
        return next((a, b) for a, b in pairwise(self.ends) if a <= layer < b)


def divide_layers(
    sizes: Sequence[int], states: int, limit: int, *, differentiates: bool
) -> Segments:
    """Return the longest segments whose disk space is within a limit, else those of least space.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of the statistics of every layer.
    states : int
        Bytes of the hidden states of all windows after a layer.
    limit : int
        Bytes.
    differentiates : bool
        Whether gradients at the boundaries are stored too.

    Examples
    --------
    >>> divide_layers([10, 10, 10, 10], 1, 40, differentiates=False).ends
    (0, 4)
    >>> divide_layers([10, 10, 10, 10], 1, 25, differentiates=False).ends
    (0, 2, 4)
    """
    best = None
    for length in range(len(sizes), 0, -1):
        ends = (*range(0, len(sizes), length), len(sizes))
        statistics = max(sum(sizes[a:b]) for a, b in pairwise(ends))
        total = statistics + (len(ends) - 2) * states * (2 if differentiates else 1)
        found = Segments(ends, total)
        if total <= limit:
            return found
        best = found if best is None or total < best.bytes else best
    assert best is not None
    return best


class SegmentedStatistics:
    """Collects the statistics of a segment when they are used.

    Parameters
    ----------
    context : CalibrationContext
    required : mapping of str to collection of str
        As for `collect`.
    segments : Segments
    """

    def __init__(self, context: CalibrationContext, required: Required, segments: Segments) -> None:
        self._context, self._segments, self._journal = context, segments, context.journal
        self._variant = Variant.of(context, context.journal, required)
        self._collector = Collector(context, [self._variant])
        n_layers = len(context.architecture.layer_names)
        self._differentiated = [i for i in range(n_layers) if self._collector.differentiates(i)]

    def collect_for(self, layer: int) -> range:
        """Collect the statistics of the segment of a layer, unless those of the layer are there.

        Returns the layers whose statistics have been collected.
        """
        sides = [INPUTS, *([GRADIENTS] if layer in self._differentiated else [])]
        if any(self._variant.missing(layer, side) for side in sides):
            with tensor_cores(self._context.device):
                self._pass_segment(*self._segments.of(layer))
            return range(*self._segments.of(layer))
        return range(0)

    def forget(self, layer: int) -> None:
        """Delete the statistics of a layer."""
        self._journal.forget(*statistics_files(layer))

    def finish(self, layer: int) -> None:
        """Delete the statistics of a layer that is compressed, and boundaries no longer needed."""
        self.forget(layer)
        start, end = self._segments.of(layer)
        if layer == end - 1:
            self._journal.forget(_boundary("states", start), _boundary("gradients", end))

    def _pass_segment(self, start: int, stop: int, *, sums: bool = True) -> None:
        """Apply the layers of a segment forward and, if gradients are needed, backward."""
        context, executor = self._context, self._collector.executor
        lowest = self._differentiated[0] if self._differentiated else stop
        checkpoints: list[Tensor] = []
        if lowest < stop:
            self._pass_later_segments(stop)
        states = self._states(start)
        if lowest < stop:
            checkpoints = allocate_checkpoints(context, stop - start, executor.shape)
        self._collector.forward(states, start, stop, checkpoints, sums=sums)
        self._store("states", stop, states)
        if lowest < stop:
            gradients = ActivationCache(context, "gradients", executor.shape)
            if stop == self._segments.ends[-1]:
                backward_head(executor, states.tensor, gradients.tensor)
            else:
                _read(self._journal, _boundary("gradients", stop), gradients.tensor)
            del states
            first = max(start, lowest)
            self._collector.backward(gradients, stop, first, checkpoints, first=start, sums=sums)
            if lowest < start:
                self._store("gradients", start, gradients)
        self._journal.forget(*cache_files(self._journal))

    def _pass_later_segments(self, layer: int) -> None:
        """Make the gradients known at the end of a segment."""
        later = [end for end in self._segments.ends if end >= layer]
        unknown = list(takewhile(lambda end: not self._has("gradients", end), later))
        # From the last segment on, or from the first boundary with known gradients.
        for start, stop in reversed([*pairwise(later[: len(unknown) + 1])]):
            self._pass_segment(start, stop, sums=False)

    def _states(self, layer: int) -> ActivationCache:
        """Return the hidden states at the first layer of a segment, stored or computed."""
        executor, earlier = self._collector.executor, [e for e in self._segments.ends if e <= layer]
        states = ActivationCache(self._context, "states", executor.shape)
        known = [end for end in earlier if self._has("states", end)]
        if known:
            _read(self._journal, _boundary("states", known[-1]), states.tensor)
        else:
            executor.embed_(states.tensor)
        for start, stop in pairwise(end for end in earlier if end >= max(known, default=0)):
            self._collector.forward(states, start, stop, [], sums=False)
            self._store("states", stop, states)
        return states

    def _has(self, name: str, layer: int) -> bool:
        return self._journal.has(_boundary(name, layer))

    def _store(self, name: str, layer: int, cache: ActivationCache) -> None:
        """Store the states or gradients between two segments, unless they are known."""
        if layer < self._segments.ends[-1] and not self._has(name, layer):
            _write(self._journal, _boundary(name, layer), cache.tensor)


def _boundary(name: str, layer: int) -> str:
    return f"{FOLDER}/{name}-{layer:04d}.f32"


def _write(journal: Journal, piece: str, tensor: Tensor) -> None:
    """Write a tensor [n_windows, length, d_model], one window in memory at a time."""
    with new_file(journal.path(piece)) as partial, partial.open("wb") as file:
        for window in tensor:
            file.write(window.cpu().numpy().data)
            drop_shared_pages(window)


def _read(journal: Journal, piece: str, tensor: Tensor) -> None:
    """Read what `_write` has written."""
    with journal.path(piece).open("rb") as file:
        for window in tensor:
            values = np.fromfile(file, dtype=np.float32, count=prod(window.shape))
            copy_(window, torch.from_numpy(values).view(window.shape))
            drop_shared_pages(window)
