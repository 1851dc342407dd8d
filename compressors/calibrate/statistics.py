"""Collect statistics of targeted linear layers: of inputs forward, of output gradients backward."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.calibrate import statistic_table as table
from lrc.compressors.calibrate.activation_cache import ActivationCache, ActivationCheckpoints
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_passes import (
    backward_head,
    backward_layer,
    forward_layer,
)
from lrc.compressors.calibrate.layer_executor import LayerExecutor
from lrc.compressors.calibrate.statistic_table import Required
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import to_host
from lrc.compressors.solvers.linalg import tensor_cores
from lrc.compressors.solvers.moments import Statistics


def collect(context: CalibrationContext, required: Required) -> None:
    """Write the required statistics of the dense model's linears to the journal, layer by layer.

    `required` maps linears to the statistics to collect; layers without any are only passed
    through. Hidden states, inputs or gradients that are not finite raise a `ModelError` that names
    the layer.
    """
    layer_of = {linear.name: linear.layer for linear in context.architecture.linears}
    by_layer: list[dict[str, Collection[str]]] = [{} for _ in context.architecture.layer_names]
    for name, names in required.items():
        if names:
            by_layer[layer_of[name]][name] = names
    with tensor_cores(context.device):
        _Collection(context, by_layer).run()


def load(journal: Journal, layer: int, name: str) -> Statistics:
    """Return the statistics of one linear; empty if none were collected."""
    file = inputs_file(layer)
    if not journal.has(file):
        return Statistics()
    facts = journal.read_facts(file)
    leader = facts["leaders"].get(name)
    if leader is None:
        return Statistics()
    forward = journal.read_tensors(file, table.sum_names(table.FORWARD, name, leader))
    file, backward = gradients_file(layer), {}
    if journal.has(file):
        backward = journal.read_tensors(file, table.sum_names(table.BACKWARD, name, leader))
    return table.build_statistics(facts["n_tokens"], forward, backward)


def inputs_file(layer: int) -> str:
    """Return the journal's name for the input statistics of one decoder layer."""
    return f"statistics/inputs-{layer:04d}.safetensors"


def gradients_file(layer: int) -> str:
    """Return the journal's name for the gradient statistics of one decoder layer."""
    return f"statistics/gradients-{layer:04d}.safetensors"


@dataclass(frozen=True)
class _Collection:
    """One run over the calibration windows: forward, and backward if gradients are required."""

    context: CalibrationContext
    required: Sequence[Required]
    """By layer."""

    def run(self) -> None:
        differentiated = [
            index
            for index, required in enumerate(self.required)
            if any({*table.BACKWARD} & {*names} for names in required.values())
        ]
        n_layers = len(self.required)
        backward = not all(self._collected(gradients_file, index) for index in differentiated)
        forward = not all(self._collected(inputs_file, index) for index in range(n_layers))
        if not (forward or backward):
            return
        executor = LayerExecutor(self.context)
        states = ActivationCache(self.context, "states", executor.shape)
        if not backward:
            # Only a run without backward pass can resume from saved hidden states; a backward pass
            # needs the input of every layer.
            if not states.resume():
                executor.embed_(states.tensor)
            self._forward(executor, states, n_layers, None)
            return
        gradients = ActivationCache(self.context, "gradients", executor.shape)
        resumed = gradients.resume()
        left = n_layers - gradients.done  # layers that the backward pass still has to process
        checkpoints = ActivationCheckpoints(self.context, left, executor.shape)
        executor.embed_(states.tensor)
        self._forward(executor, states, left, checkpoints)
        if not resumed:
            backward_head(executor, states.tensor, gradients.tensor)
        del states
        self._backward(executor, gradients, checkpoints, stop=differentiated[0])

    def _forward(
        self,
        executor: LayerExecutor,
        states: ActivationCache,
        stop: int,
        checkpoints: ActivationCheckpoints | None,
    ) -> None:
        n_layers = len(self.required)
        for index in range(states.done, stop):
            if checkpoints is not None:
                checkpoints.write(index, states.tensor)
            collected = self._collected(inputs_file, index)
            required = {} if collected else self.required[index]
            statistics = forward_layer(executor, index, states.tensor, required)
            if not collected:
                groups = executor.calls[index].groups
                leaders = {n: group[0] for group in groups for n in group if n in required}
                facts = {"leaders": leaders, "n_tokens": executor.tokens.numel()}
                self._write(inputs_file(index), statistics.sums, facts)
            states.finish_layer(save=checkpoints is None and index < n_layers - 1)
            self.context.on_step("calibrate", index + 1, n_layers)

    def _backward(
        self,
        executor: LayerExecutor,
        gradients: ActivationCache,
        checkpoints: ActivationCheckpoints,
        stop: int,
    ) -> None:
        n_layers = len(self.required)
        for index in range(n_layers - 1 - gradients.done, stop - 1, -1):
            collected = self._collected(gradients_file, index)
            required = {} if collected else self.required[index]
            statistics = backward_layer(executor, index, checkpoints, gradients.tensor, required)
            if not collected:
                self._write(gradients_file(index), statistics.sums, {})
            gradients.finish_layer(save=index > stop)
            self.context.on_step("gradients", gradients.done, n_layers - stop)

    def _collected(self, file: Callable[[int], str], index: int) -> bool:
        """Return whether a pass has no statistics to collect for a layer, or has collected them."""
        return not self.required[index] or self.context.journal.has(file(index))

    def _write(self, file: str, sums: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        tensors = {key: to_host(total) for key, total in sums.items()}
        # A safetensors file needs at least one tensor.
        self.context.journal.write_tensors(file, tensors or {"none": torch.zeros(1)}, facts)
