"""Predictions of the dense model with one compressed task at a time, layer by layer.

The hidden states of a changed model equal those of the dense model up to the first layer that
changes. From there on, all changed models pass through the layers together, so that each layer is
read once for all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.calibrate.activation_cache import ActivationCache
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.layer_executor import LayerExecutor
from lrc.compressors.compress.group import CompressedGroup
from lrc.compressors.evaluate.agreement import kl_divergence, log_probabilities
from lrc.compressors.evaluate.perplexity import PIECE
from lrc.compressors.io.device_copies import copy_, on_device
from lrc.compressors.planning.tasks import LayerTask
from lrc.configs.size import GIB


@dataclass
class _Changed:
    """The dense model with one task compressed."""

    done: CompressedGroup
    states: Tensor
    """[n_windows, length, d_model]"""
    divergence: float = 0.0
    increase: float = 0.0

    @contextmanager
    def weights(self, model: nn.Module, layer: int) -> Iterator[None]:
        """Put the compressed weights of a decoder layer into the model inside the context."""
        before: list[tuple[nn.Module, str, nn.Parameter | None]] = []

        def put(name: str, leaf: str, value: Tensor) -> None:
            linear: Any = model.get_submodule(name)
            before.append((linear, leaf, getattr(linear, leaf)))
            value = value.to(linear.weight.device, linear.weight.dtype)
            setattr(linear, leaf, nn.Parameter(value, requires_grad=False))

        try:
            if self.done.result.config.compressed:
                for weight in self.done.task.weights:
                    if weight.layer == layer:
                        put(weight.name, "weight", self.done.weight(weight.name))
                        bias = self.done.tensors.get(f"{weight.name}.bias")
                        if bias is not None:
                            put(weight.name, "bias", bias)
            yield
        finally:
            for linear, leaf, parameter in reversed(before):
                setattr(linear, leaf, parameter)


@dataclass
class LayerEffects:
    """Measures what compressing one task at a time does to the predictions of the dense model.

    Call `measure` for layers in ascending order.
    """

    context: CalibrationContext
    compress: Callable[[LayerTask], CompressedGroup]
    executor: LayerExecutor = field(init=False)
    _dense: ActivationCache = field(init=False)
    _final: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Embed the windows."""
        self.executor = LayerExecutor(self.context)
        self._dense = ActivationCache(self.context, "dense", self.executor.shape)
        self.executor.embed_(self._dense.tensor)

    def most_tasks(self) -> int:
        """Return how many changed models have room for their hidden states in memory."""
        n_bytes = prod(self.executor.shape) * torch.float32.itemsize
        return max(1, int(self.context.memory_limit_gib * GIB // n_bytes))

    @torch.no_grad()
    def measure(
        self, tasks: Mapping[int, Sequence[LayerTask]]
    ) -> tuple[float, dict[str, tuple[float, float]]]:
        """Measure the tasks of some layers.

        Returns
        -------
        float
            Loss of the dense model, nats per token.
        dict of str to tuple of float
            Name of a task -> KL divergence from the dense model, and increase of the loss.
        """
        changed = self._pass_layers(tasks)
        loss = self._score(changed)
        n_windows, length = self.executor.tokens.shape
        count = n_windows * (length - 1)
        return loss / count, {
            each.done.task.name: (each.divergence / count, each.increase / count)
            for each in changed
        }

    def _pass_layers(self, tasks: Mapping[int, Sequence[LayerTask]]) -> list[_Changed]:
        """Return all changed models with the output of the last layer."""
        executor, model, n_layers = self.executor, self.context.architecture.model, self._n_layers
        n_windows, length, width = executor.shape
        count = sum(map(len, tasks.values()))
        shape = (count * n_windows, length, width)
        free = iter(ActivationCache(self.context, "changed", shape).tensor.split(n_windows))
        changed: list[_Changed] = []
        last = max(tasks)
        dense = self._dense.tensor
        for index in range(self._dense.done, n_layers):
            begun = [_Changed(self.compress(task), next(free)) for task in tasks.get(index, ())]
            for each in begun:
                copy_(each.states, dense)
            changed += begun
            with executor.layer(index):
                for each in changed:
                    with each.weights(model, index):
                        executor.advance_(index, each.states)
                if index <= last or self._final is None:
                    executor.advance_(index, dense)
            if index <= last:
                self._dense.finish_layer(save=False)
            if index == last and self._final is None:
                # Those after the last layer serve all later calls; go on with a copy.
                dense = ActivationCache(self.context, "final", executor.shape).tensor
                copy_(dense, self._dense.tensor)
        if self._final is None:
            self._final = dense
        return changed

    def _score(self, changed: Sequence[_Changed]) -> float:
        """Sum divergences and increases over all predicted tokens; return the dense loss."""
        executor, loss = self.executor, 0.0
        assert self._final is not None
        with executor.around_layers(head=True):
            for number, ids in enumerate(executor.tokens):
                for start in range(0, len(ids) - 1, PIECE):
                    rows = slice(start, min(start + PIECE, len(ids) - 1))
                    target = ids[rows.start + 1 : rows.stop + 1, None].to(self.context.device)

                    def predictions(
                        states: Tensor, number: int = number, rows: slice = rows
                    ) -> Tensor:
                        hidden = on_device(states[number, rows], self.context.device)
                        ids = executor.tokens[number, rows]
                        return log_probabilities(executor.logits(hidden[None], ids[None])[0])

                    p = predictions(self._final)  # [n, vocabulary]
                    loss -= float(p.gather(1, target).sum(dtype=torch.float64))
                    for each in changed:
                        q = predictions(each.states)
                        each.divergence += float(kl_divergence(p, q).sum(dtype=torch.float64))
                        difference = (p - q).gather(1, target)
                        each.increase += float(difference.sum(dtype=torch.float64))
        return loss

    @property
    def _n_layers(self) -> int:
        return len(self.context.architecture.layer_names)
