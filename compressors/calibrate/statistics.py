"""Collect statistics of the targeted linears: forward pass for inputs, backward for gradients."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.calibrate import statistic_table as table
from lrc.compressors.calibrate.activation_cache import ActivationCache, ActivationCheckpoints
from lrc.compressors.calibrate.calibration_passes import (
    Labels,
    backward_head,
    backward_layer,
    forward_layer,
)
from lrc.compressors.calibrate.layer_executor import (
    LayerCall,
    LayerExecutor,
    batch_size,
    batches,
)
from lrc.compressors.calibrate.statistic_table import Required
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep, to_host
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.solvers.linalg import tensor_cores
from lrc.compressors.solvers.moments import Statistics


def collect(
    architecture: Architecture,
    reader: WeightReader,
    tokens: Tensor,
    required: Required,
    journal: Journal,
    *,
    labels: Labels,
    seed: int,
    device: str,
    memory_limit_gib: float,
    on_step: OnStep,
) -> None:
    """Write the required statistics of the dense model's linears to the journal, layer by layer.

    Parameters
    ----------
    tokens : Tensor, shape [n_windows, length]
        Calibration windows, int64.
    required : mapping of str to collection of str
        Linear -> statistics to collect; layers without any are only passed through.
    labels, seed
        As for `backward_head`.
    on_step : callable
        Called with (stage, layers done, layers) after each layer; may raise to stop.

    Raises
    ------
    ModelError
        If hidden states, inputs or gradients are not finite; names the layer.
    """
    layer_of = {linear.name: linear.layer for linear in architecture.linears}
    by_layer: list[dict[str, Collection[str]]] = [{} for _ in architecture.layer_names]
    for name, names in required.items():
        if names:
            by_layer[layer_of[name]][name] = names
    run = _Collection(
        LayerExecutor(architecture, reader, device=device, dtype=torch.float32),
        tokens,
        batch_size(len(tokens), tokens.shape[1], device),
        by_layer,
        journal,
        memory_limit_gib,
        on_step,
    )
    with tensor_cores() if device.startswith("cuda") else nullcontext():
        run.run(labels, seed)


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

    executor: LayerExecutor
    tokens: Tensor
    batch: int
    required: Sequence[Required]
    """By layer."""
    journal: Journal
    limit_gib: float
    on_step: OnStep

    def run(self, labels: Labels, seed: int) -> None:
        differentiated = [
            index
            for index, required in enumerate(self.required)
            if any({*table.BACKWARD} & {*names} for names in required.values())
        ]
        n_layers, device = len(self.required), self.executor.device
        backward = not all(self._collected(gradients_file, index) for index in differentiated)
        forward = not all(self._collected(inputs_file, index) for index in range(n_layers))
        if not (forward or backward):
            return
        with self.executor.around_layers():
            calls = self.executor.trace(self.tokens, self.batch)
            width = self.executor.embed(self.tokens[:1]).shape[-1]
        shape = (*self.tokens.shape, width)
        states = ActivationCache(self.journal, "states", shape, self.limit_gib, device)
        if not backward:
            self._forward(states, calls, None)
            return
        gradients = ActivationCache(self.journal, "gradients", shape, self.limit_gib, device)
        resumed = gradients.resume()
        left = n_layers - gradients.done
        dtype = next(iter(self.executor.architecture.stored_parameters().values())).dtype
        checkpoints = ActivationCheckpoints(
            self.journal, left, shape, dtype, self.limit_gib, device
        )
        self._forward(states, calls[:left], checkpoints)
        if not resumed:
            backward_head(
                self.executor,
                calls[-1],
                states.tensor,
                self.tokens,
                gradients.tensor,
                labels=labels,
                seed=seed,
            )
        del states
        self._backward(gradients, calls, checkpoints, stop=differentiated[0])

    def _forward(
        self,
        states: ActivationCache,
        calls: list[LayerCall],
        checkpoints: ActivationCheckpoints | None,
    ) -> None:
        # Checkpoints need every layer's input, so a snapshot from half-way is of no use then.
        if checkpoints is not None or not states.resume():
            with self.executor.around_layers():
                for rows in batches(len(self.tokens), self.batch):
                    states.tensor[rows] = self.executor.embed(self.tokens[rows])
        n_layers = len(self.required)
        for index in range(states.done, len(calls)):
            if checkpoints is not None:
                checkpoints.write(index, states.tensor)
            call, hidden = calls[index], states.tensor
            collected = self._collected(inputs_file, index)
            required = {} if collected else self.required[index]
            statistics = forward_layer(self.executor, index, call, hidden, self.batch, required)
            if not collected:
                leaders = {n: group[0] for group in call.groups for n in group if n in required}
                facts = {"leaders": leaders, "n_tokens": self.tokens.numel()}
                self._write(inputs_file(index), statistics.sums, facts)
            states.finish_layer(save=checkpoints is None and index < n_layers - 1)
            self.on_step("calibrate", index + 1, n_layers)

    def _backward(
        self,
        gradients: ActivationCache,
        calls: list[LayerCall],
        checkpoints: ActivationCheckpoints,
        stop: int,
    ) -> None:
        n_layers = len(self.required)
        for index in range(n_layers - 1 - gradients.done, stop - 1, -1):
            collected = self._collected(gradients_file, index)
            statistics = backward_layer(
                self.executor,
                index,
                calls[index],
                checkpoints,
                gradients.tensor,
                self.batch,
                {} if collected else self.required[index],
            )
            if not collected:
                self._write(gradients_file(index), statistics.sums, {})
            gradients.finish_layer(save=index > stop)
            self.on_step("gradients", gradients.done, n_layers - stop)

    def _collected(self, file: Callable[[int], str], index: int) -> bool:
        """Return whether nothing is left to collect for a layer in a pass."""
        return not self.required[index] or self.journal.has(file(index))

    def _write(self, file: str, sums: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        tensors = {key: to_host(total) for key, total in sums.items()}
        # A safetensors file needs at least one tensor.
        self.journal.write_tensors(file, tensors or {"none": torch.zeros(1)}, facts)
