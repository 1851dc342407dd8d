"""Gradients that are the same bit by bit whenever they are calculated again on the same GPU.

Attention adds the gradients of queries in any order unless torch is told to refuse operations
without a fixed one. A few operations of some models have none, such as those that route tokens to
experts; for these, torch does what it can.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.models.configuration import first_line
from lrc.compressors.solvers.cuda_graphs import is_recording

log = logging.getLogger(__name__)

REFUSED = "deterministic"
"""A word of the errors of torch about operations without a fixed order."""


class Gradients:
    """The gradients of parameters at the time when this is made, to return to.

    Zeros, which they usually are, take no memory.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters, self._tensors = parameters, [each.grad for each in parameters]
        found = [each for each in self._tensors if each is not None]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(found)])
        self._values = [each.clone() for each in found] if bool((norms != 0).any()) else None

    def restore_(self) -> None:
        """Give the parameters the same tensors with the same values."""
        for parameter, tensor in zip(self._parameters, self._tensors, strict=True):
            parameter.grad = tensor
        found: Any = [each for each in self._tensors if each is not None]
        if self._values is None:
            torch._foreach_zero_(found)
        else:
            torch._foreach_copy_(found, self._values)


class RepeatableGradients:
    """Adds gradients in a fixed order, as far as the operations of a model have one.

    Parameters
    ----------
    parameters : sequence of Tensor
        Their gradients exist.
    device : torch.device
        Nothing changes on a CPU.
    """

    def __init__(self, parameters: Sequence[Tensor], device: torch.device) -> None:
        self._parameters = parameters
        self._strict = device.type == "cuda"
        """Whether no operation was refused so far."""

    def __call__(self, add: Callable[[], object]) -> None:
        """Call `add`, which adds to the gradients; a second time if torch refuses an operation."""
        if not self._strict:
            add()
            return
        # While a CUDA graph is recorded, values cannot be read; the same operations ran before.
        before = None if is_recording() else Gradients(self._parameters)
        try:
            with _strict():
                add()
        except RuntimeError as error:
            if before is None or REFUSED not in str(error):
                raise
            log.info("the order of additions is not fixed: %s", first_line(error))
            self._strict = False
            before.restore_()
            add()


@contextmanager
def _strict() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
