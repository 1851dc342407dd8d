"""The gradients of a batch, recorded as a CUDA graph.

A training step of a small model launches thousands of kernels that take longer to launch than to
run.
"""

import logging
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from lrc.compressors.heal.repeatable import RepeatableGradients
from lrc.compressors.models.configuration import first_line
from lrc.compressors.solvers.cuda_graphs import record

log = logging.getLogger(__name__)


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
    """

    def __init__(
        self,
        add: Callable[..., object],
        parameters: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self._add, self._parameters, self._device = add, parameters, device
        self._repeatable = RepeatableGradients(parameters, device)
        self._recorded: dict[Hashable, tuple[list[Tensor], Callable[[], object]]] = {}
        self._recordable = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._recordable else None

    def __call__(self, *batch: Tensor, variant: Hashable = None) -> None:
        """Add the gradients for the tensors of a batch.

        Parameters
        ----------
        variant : hashable, optional
            Everything else on the host that determines what is computed.
        """
        key = tuple(tensor.shape for tensor in batch), variant
        if self._recordable and key not in self._recorded:
            self._record(batch, key)
        if key not in self._recorded:
            moved = [tensor.to(self._device) for tensor in batch]
            self._repeatable(lambda: self._add(*moved))
            return
        places, repeat = self._recorded[key]
        for place, tensor in zip(places, batch, strict=True):
            place.copy_(tensor)
        repeat()

    def _record(self, batch: Sequence[Tensor], key: Hashable) -> None:
        """Record without effect on the gradients."""
        gradients = [parameter.grad for parameter in self._parameters]
        before = [gradient.clone() for gradient in gradients if gradient is not None]
        places = [tensor.to(self._device, copy=True) for tensor in batch]
        runs = 0

        def step() -> None:
            nonlocal runs
            self._repeatable(lambda: self._add(*places))
            runs += 1
            if runs == 1:  # what it needed cannot be used again by the recording
                torch.cuda.empty_cache()

        try:
            self._recorded[key] = places, record(step, self._device, self._pool)
        except Exception as error:
            if runs == 0:
                raise
            self._recordable = False
            log.info("training steps are not recorded: %s", first_line(error))
            torch.cuda.empty_cache()
        for parameter, gradient, value in zip(self._parameters, gradients, before, strict=True):
            assert gradient is not None
            parameter.grad = gradient
            gradient.copy_(value)
