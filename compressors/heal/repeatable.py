"""Gradients that are the same bit by bit whenever they are calculated again on the same GPU.

Attention adds the gradients of queries in any order unless torch is told to refuse operations
without a fixed one. A few operations of some models have none, such as those that route tokens to
experts; for these, torch does what it can.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lrc.compressors.models.configuration import first_line

log = logging.getLogger(__name__)

REFUSED = "deterministic"
"""A word of the errors of torch about operations without a fixed order."""


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
        self._strict: bool | None = None if device.type == "cuda" else False
        """Whether all operations have a fixed order; None as long as that is not known."""

    def __call__(self, add: Callable[[], object]) -> None:
        """Call `add`, which adds to the gradients; a second time if torch refuses an operation."""
        if self._strict is False:
            add()
            return
        gradients = [each.grad for each in self._parameters if each.grad is not None]
        before = [] if self._strict else [gradient.clone() for gradient in gradients]
        try:
            with _strict():
                add()
            self._strict = True
        except RuntimeError as error:
            if self._strict or REFUSED not in str(error):
                raise
            log.info("the order of additions is not fixed: %s", first_line(error))
            self._strict = False
            for gradient, value in zip(gradients, before, strict=True):
                gradient.copy_(value)
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
