"""Quantization of columns in sequence, where each column changes the targets of the later ones.

In GPTQ the target of a column compensates for the errors of those before it; in coordinate descent
it is the best value while all other columns are fixed. In both cases the change of a column is
added to the later targets, times a constant coupling.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.solvers.cpu_threads import one_thread
from lrc.compressors.solvers.cuda_graphs import record

# Columns of a block, which are quantized one by one. Their effect on the columns after the block is
# one matrix product.
CPU_WIDTH, CUDA_WIDTH = 64, 128
# Scale of entries that are to be zero: whatever the target, the nearest code is zero.
ZERO_SCALE = 1e30

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
Outputs = tuple[Tensor, Tensor]


class ColumnQuantizer:
    """Quantizer of the columns of a matrix, or of a stack of matrices, a block at a time.

    Tensors are transposed, [..., columns, rows], so that a column is contiguous. They are in
    float64 on a CPU and in float32 on CUDA, where launching half a dozen kernels per column takes
    longest: the kernels of a block are recorded once, as a CUDA graph, and matrices of equal shape
    are stacked.
    """

    def __init__(self, scheme: QuantizationArgs, device: torch.device) -> None:
        self.scheme = scheme
        self.device = device
        cuda = device.type == "cuda"
        self.dtype = torch.float32 if cuda else torch.float64
        self.width = CUDA_WIDTH if cuda else CPU_WIDTH
        self._recorded: dict[torch.Size, tuple[Inputs, Outputs, Callable[[], object]]] = {}

    def quantize(
        self,
        target: Tensor,
        coupling: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        current: Tensor | None = None,
    ) -> Outputs:
        """Quantize the columns of a block in sequence.

        Parameters
        ----------
        target : Tensor, shape [..., width, rows]
            Values that the columns are to take, before the block changes.
        coupling : Tensor, shape [..., width, width]
            ``coupling[..., i, j]`` times the change of column i is added to the target of column
            j > i.
        scale, zero : Tensor, shape [..., width, rows]
            Scales and, unless None, zero points.
        current : Tensor, shape [..., width, rows], optional
            Values from which changes are counted. Default: the target of each column.

        Returns
        -------
        delta, steps : Tensor, shape [..., width, rows]
            Changes of the columns, and codes minus zero points; the values are ``steps * scale``.
            On CUDA the next call overwrites both.
        """
        inputs: Inputs = (target, coupling, scale, zero, current)
        if self.device.type != "cuda":
            outputs = torch.empty_like(target), torch.empty_like(target)
            with one_thread(self.device):
                _quantize(self.scheme, inputs, outputs)
            return outputs
        if target.shape not in self._recorded:
            self._recorded[target.shape] = self._record(inputs)
        places, outputs, replay = self._recorded[target.shape]
        for place, value in zip(places, inputs, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        replay()
        return outputs

    def _record(self, inputs: Inputs) -> tuple[Inputs, Outputs, Callable[[], object]]:
        places = cast(Inputs, tuple(None if t is None else t.clone() for t in inputs))
        outputs = torch.empty_like(places[0]), torch.empty_like(places[0])
        step = partial(_quantize, self.scheme, places, outputs)
        return places, outputs, record(step, self.device)


def _quantize(scheme: QuantizationArgs, inputs: Inputs, outputs: Outputs) -> None:
    target, coupling, scale, zero, current = inputs
    delta, steps = outputs
    for k in range(target.shape[-2]):
        value = target[..., k, :]
        if k:
            value = _moved(value, coupling[..., :k, k], delta[..., :k, :])
        unit, offset = scale[..., k, :], None if zero is None else zero[..., k, :]
        step = torch.div(value, unit, out=steps[..., k, :]).round_()
        if offset is not None:
            step.add_(offset)
        step.clamp_(scheme.lowest, scheme.highest)
        if offset is not None:
            step.sub_(offset)
        start = value if current is None else current[..., k, :]
        torch.addcmul(start, step, unit, value=-1, out=delta[..., k, :]).neg_()


def _moved(value: Tensor, coupling: Tensor, delta: Tensor) -> Tensor:
    """Return the values [..., rows] after changes `delta` [..., k, rows] of columns before it."""
    if value.ndim == 1:
        return torch.addmv(value, delta.T, coupling)
    return torch.baddbmm(value[:, None], coupling[:, None], delta)[:, 0]
