"""The gradients of a batch, recorded as a CUDA graph.

A training step of a small model launches thousands of kernels that take longer to launch than to
run.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.heal.repeatable import Gradients, RepeatableGradients
from lrc.compressors.solvers.cuda_graphs import record_if_possible


class GradientStep:
    """Adds gradients to parameters; on a CUDA device, by repeating a recording.

    Every call repeats a recording, the first one too, so that an interrupted run continues with the
    same kernels and ends with the same bits. A model that cannot be recorded, for example because
    its control flow depends on values, launches its kernels one by one.

    Parameters
    ----------
    add : callable
        Adds the gradients for the tensors of a batch on the device, such as token ids [n, length],
        to those of the parameters, in place.
    parameters : sequence of Tensor
        Their gradients exist.
    device : torch.device
    pool : optional
        Memory that recordings share, see `torch.cuda.graph_pool_handle`.
    """

    def __init__(
        self,
        add: Callable[..., object],
        parameters: Sequence[Tensor],
        device: torch.device,
        pool: Any = None,
    ) -> None:
        self._add, self._parameters, self._device = add, parameters, device
        self._steps: dict[Hashable, tuple[list[Tensor], Callable[[], object]]] = {}
        self._recordable = device.type == "cuda"
        self._pool = pool

    def __call__(self, *batch: Tensor, variant: Hashable = None) -> None:
        """Add the gradients for the tensors of a batch.

        Parameters
        ----------
        variant : hashable, optional
            Everything else on the host that determines what is computed.
        """
        key = tuple(tensor.shape for tensor in batch), variant
        if key not in self._steps:
            self._steps[key] = self._prepared(batch)
        places, add = self._steps[key]
        for place, tensor in zip(places, batch, strict=True):
            place.copy_(tensor)
        add()

    def _prepared(self, batch: Sequence[Tensor]) -> tuple[list[Tensor], Callable[[], object]]:
        """Return places for a batch, and what adds its gradients; record it without effect."""
        places = [tensor.to(self._device, copy=True) for tensor in batch]
        repeatable = RepeatableGradients(self._parameters, self._device)
        add = partial(repeatable, partial(self._add, *places))
        if not self._recordable:
            return places, add
        before = Gradients(self._parameters)
        repeat = record_if_possible(add, self._device, self._pool)
        self._recordable = repeat is not add
        before.restore_()
        return places, repeat
