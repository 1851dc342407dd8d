"""Compressed matrices that a run of a sweep takes from the checkpoints of finished runs.

Runs with different budgets often store some matrices in the same way, for example as integers of
the same bit width, and runs that differ in their embeddings all of them. Without compensation, a
solution depends only on the matrix, its statistics and its task. A checkpoint has all tensors of a
run, and the executed plan inside it the tasks and results, so that nothing is stored twice.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import safe_open
from torch import Tensor

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.manifest import Manifest, read_manifest
from lrc.compressors.checkpoint.plain import plain_name
from lrc.compressors.compress.batches import batches
from lrc.compressors.compress.group import CompressedGroup
from lrc.compressors.io.shards import Header, read_folder
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.tasks import LayerTask
from lrc.configs.errors import CheckpointError

_TASKS = TypeAdapter(list[LayerTask])


class FinishedRun:
    """The checkpoint of a run, of which nothing is read before it is needed."""

    def __init__(self, checkpoint: Path, device: str) -> None:
        self.checkpoint, self._device = checkpoint, device
        self._batches: dict[int, set[bytes]] = {}  # by decoder layer

    def find(self, batch: Sequence[LayerTask]) -> list[CompressedGroup] | None:
        """Return the results of tasks that this run has solved together; None if it has not.

        Of matrices that are solved together on a GPU, the last bits depend on the others.
        """
        if any(task.compensate is not None for task in batch) or self.plan.training:
            return None
        layer = batch[0].layer
        if layer not in self._batches:
            tasks = [task for task in self.plan.tasks if task.layer == layer]
            self._batches[layer] = {_key(each) for each in batches(tasks, self._device)}
        if _key(batch) not in self._batches[layer] or not self._intact:
            return None
        return [self._read(task) for task in batch]

    @cached_property
    def plan(self) -> Plan:
        """The executed plan."""
        return Plan.from_json(json.loads((self.checkpoint / layout.PLAN).read_text("utf-8")))

    @cached_property
    def _headers(self) -> dict[str, Header]:
        return read_folder(self.checkpoint)

    @cached_property
    def _manifest(self) -> Manifest | None:
        return read_manifest(self.checkpoint)

    @cached_property
    def _intact(self) -> bool:
        """Whether the files are those that the run has written, perhaps days ago."""
        if self._manifest is None:
            return False
        try:
            self._manifest.check_hashes(self._manifest.hashes)
        except CheckpointError:
            return False
        return True

    def _read(self, task: LayerTask) -> CompressedGroup:
        result = self.plan.results[task.name]
        names = [
            f"{weight.name}.{leaf}"
            for weight in task.weights
            if result.config.compressed
            for leaf in (
                *task.config_of(weight, result.config).tensors(),
                *(["bias"] if result.config.bias else []),
            )
        ]
        return CompressedGroup(task, result, {name: self._tensor(name) for name in names})

    def _tensor(self, name: str) -> Tensor:
        plain = self._manifest is not None and self._manifest.plain
        header = self._headers[plain_name(name) if plain else name]
        with safe_open(header.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(header.name)
        return tensor


class SolvedTasks:
    """The results of finished runs that have the same statistics and the same curves."""

    def __init__(self) -> None:
        self._runs: list[FinishedRun] = []

    def add(self, checkpoint: Path, device: str) -> None:
        """Offer the results of a finished run to later ones."""
        if all(run.checkpoint != checkpoint for run in self._runs):
            self._runs.append(FinishedRun(checkpoint, device))

    def find(self, batch: Sequence[LayerTask]) -> list[CompressedGroup] | None:
        """Return the results of tasks that one of the runs has solved together; None otherwise."""
        found = (run.find(batch) for run in self._runs)
        return next((each for each in found if each is not None), None)


def _key(batch: Sequence[LayerTask]) -> bytes:
    return _TASKS.dump_json([*batch])
