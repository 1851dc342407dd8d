"""Rounding columns one after another, where each move shifts what the later ones want to be.

In GPTQ a column wants the value that makes up for the rounding of those before it; in coordinate
descent the value that is best while all others stay as they are. In both the move of one column
shifts what the later ones want by a fixed multiple of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lrc.compressors.layers.scheme import Scheme

# Columns that are rounded one by one before all others hear of it in one product.
CPU_WIDTH, CUDA_WIDTH = 64, 128

Block = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class Columns:
    """Rounds blocks of columns of one matrix; see the module.

    Tensors are transposed, [columns, rows], so that a column is contiguous. They are in float64 on
    a CPU, and in float32 on CUDA. What takes time there is not arithmetic but to launch half a
    dozen kernels a column, so that those of a block are recorded once, as a CUDA graph.
    """

    def __init__(self, scheme: Scheme, device: torch.device) -> None:
        self.scheme = scheme
        self.recorded = device.type == "cuda"
        self.dtype = torch.float32 if self.recorded else torch.float64
        self.width = CUDA_WIDTH if self.recorded else CPU_WIDTH
        self._graphs: dict[torch.Size, Callable[[Block], tuple[Tensor, Tensor]]] = {}

    def round(
        self,
        wanted: Tensor,
        pull: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        held: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Round the columns of a block in turn.

        Parameters
        ----------
        wanted : Tensor, shape [width, rows]
            What every column wants to be at the start.
        pull : Tensor, shape [width, width]
            ``pull[i, j]`` times the move of column i is added to what column j > i wants.
        scale : Tensor, shape [width, rows]
        zero : Tensor, shape [width, rows], optional
        held : Tensor, shape [width, rows], optional
            The values that columns move from; left out, what they want when their turn comes.

        Returns
        -------
        moves : Tensor, shape [width, rows]
        steps : Tensor, shape [width, rows]
            Codes less zero points; ``steps * scale`` are the values. On CUDA both are overwritten
            by the next call.
        """
        block = wanted, pull, scale, zero, held
        if not self.recorded:
            return self._round(block)
        if wanted.shape not in self._graphs:
            self._graphs[wanted.shape] = _record(self._round, block)
        return self._graphs[wanted.shape](block)

    def _round(self, block: Block) -> tuple[Tensor, Tensor]:
        wanted, pull, scale, zero, held = block
        moves, steps = torch.empty_like(wanted), torch.empty_like(wanted)
        for k in range(len(wanted)):
            value = torch.addmv(wanted[k], moves[:k].T, pull[:k, k]) if k else wanted[k]
            step = torch.div(value, scale[k], out=steps[k]).round_()
            if zero is not None:
                step.add_(zero[k])
            step.clamp_(self.scheme.lowest, self.scheme.highest)
            if zero is not None:
                step.sub_(zero[k])
            start = value if held is None else held[k]
            torch.addcmul(start, step, scale[k], value=-1, out=moves[k]).neg_()
        return moves, steps


def _record(
    function: Callable[[Block], tuple[Tensor, Tensor]], block: Block
) -> Callable[[Block], tuple[Tensor, Tensor]]:
    """Record the kernels that a function launches, to launch them for other inputs at once."""
    wanted, pull, scale, *rest = block
    zero, held = (None if t is None else t.clone() for t in rest)
    places = wanted.clone(), pull.clone(), scale.clone(), zero, held
    side = torch.cuda.Stream()  # libraries set themselves up on first use, which no graph may hold
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(places)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(places)

    def replay(block: Block) -> tuple[Tensor, Tensor]:
        for place, value in zip(places, block, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        graph.replay()
        return outputs

    return replay
