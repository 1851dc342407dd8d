"""Collect statistics of the targeted linears: forward pass for inputs, backward for gradients."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

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
from lrc.compressors.calibrate.statistic_table import (
    BACKWARD,
    FORWARD,
    Required,
    build_statistics,
    leaders_of,
    needs_backward,
    sum_names,
)
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
    run = _Collection(
        architecture, reader, tokens, required, journal, device, memory_limit_gib, on_step
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
    forward = journal.read_tensors(file, sum_names(FORWARD, name, leader))
    file = gradients_file(layer)
    backward = (
        journal.read_tensors(file, sum_names(BACKWARD, name, leader)) if journal.has(file) else {}
    )
    return build_statistics(facts["n_tokens"], forward, backward)


def inputs_file(layer: int) -> str:
    """Return the journal's name for the input statistics of one decoder layer."""
    return f"statistics/inputs-{layer:04d}.safetensors"


def gradients_file(layer: int) -> str:
    """Return the journal's name for the gradient statistics of one decoder layer."""
    return f"statistics/gradients-{layer:04d}.safetensors"


class _Collection:
    """One run over the calibration windows: forward, and backward if gradients are required."""

    def __init__(
        self,
        architecture: Architecture,
        reader: WeightReader,
        tokens: Tensor,
        required: Required,
        journal: Journal,
        device: str,
        limit_gib: float,
        on_step: OnStep,
    ) -> None:
        self.architecture, self.tokens, self.journal = architecture, tokens, journal
        self.device, self.limit_gib, self.on_step = device, limit_gib, on_step
        self.n_layers = len(architecture.layer_names)
        layer_of = {linear.name: linear.layer for linear in architecture.linears}
        self.required: list[Required] = [
            {name: names for name, names in required.items() if layer_of[name] == index}
            for index in range(self.n_layers)
        ]
        self.batch = batch_size(len(tokens), tokens.shape[1], device)
        self.executor = LayerExecutor(architecture, reader, device=device, dtype=torch.float32)
        self.dtype = next(iter(architecture.stored_parameters().values())).dtype

    def run(self, labels: Labels, seed: int) -> None:
        differentiated = [i for i, names in enumerate(self.required) if needs_backward(names)]
        backward = not all(self._collected(gradients_file, index) for index in differentiated)
        forward = not all(self._collected(inputs_file, index) for index in range(self.n_layers))
        if not (forward or backward):
            return
        with self.executor.around_layers():
            calls = self.executor.trace(self.tokens, self.batch)
            width = self.executor.embed(self.tokens[:1]).shape[-1]
        shape = (*self.tokens.shape, width)
        states = ActivationCache(self.journal, "states", shape, self.limit_gib, self.device)
        if not backward:
            self._forward(states, calls, None)
            return
        gradients = ActivationCache(self.journal, "gradients", shape, self.limit_gib, self.device)
        resumed = gradients.resume()
        left = self.n_layers - gradients.done
        checkpoints = ActivationCheckpoints(
            self.journal, left, shape, self.dtype, self.limit_gib, self.device
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
        for index in range(states.done, len(calls)):
            if checkpoints is not None:
                checkpoints.write(index, states.tensor)
            collected = self._collected(inputs_file, index)
            required = {} if collected else self.required[index]
            statistics = forward_layer(
                self.executor,
                self.architecture,
                index,
                calls[index],
                states.tensor,
                self.batch,
                required,
            )
            if not collected:
                leaders = leaders_of(calls[index].groups, required)
                facts = {"leaders": leaders, "n_tokens": self.tokens.numel()}
                self._write(inputs_file(index), statistics.sums, facts)
            states.finish_layer(save=checkpoints is None and index < self.n_layers - 1)
            self.on_step("calibrate", index + 1, self.n_layers)

    def _backward(
        self,
        gradients: ActivationCache,
        calls: list[LayerCall],
        checkpoints: ActivationCheckpoints,
        stop: int,
    ) -> None:
        total = self.n_layers - stop
        for index in range(self.n_layers - 1 - gradients.done, stop - 1, -1):
            collected = self._collected(gradients_file, index)
            statistics = backward_layer(
                self.executor,
                self.architecture,
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
            self.on_step("gradients", gradients.done, total)

    def _collected(self, file: Callable[[int], str], index: int) -> bool:
        """Return whether nothing is left to collect for a layer in a pass."""
        return not self.required[index] or self.journal.has(file(index))

    def _write(self, file: str, sums: Mapping[str, Tensor], facts: dict[str, Any]) -> None:
        tensors = {key: to_host(total) for key, total in sums.items()}
        # A safetensors file needs at least one tensor.
        self.journal.write_tensors(file, tensors or {"none": torch.zeros(1)}, facts)
