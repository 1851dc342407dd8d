"""One pass over the columns of a matrix, each rounded in turn, and what it does to the others.

Two methods are such passes. In GPTQ a column wants the value that makes up for the rounding of the
columns before it; in coordinate descent the value that is best while all others stay as they are.
In both the move of one column shifts what the later ones want by a fixed multiple of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lrc.compressors.layers.scheme import Scheme
from lrc.compressors.quantize.grid import Grid

# Columns that are rounded one by one before the rest hears of it in one product.
CPU_BLOCK, CUDA_BLOCK = 64, 128

Block = Callable[[list[Tensor | None]], tuple[Tensor, Tensor]]


class Sweep:
    """Passes over the columns of matrices [rows, columns] that are rounded to one grid.

    In float64 on a CPU; in float32 on CUDA, where a block of columns is one CUDA graph: what takes
    time there is not the arithmetic but to launch half a dozen kernels a column. All tensors are
    transposed, [columns, rows], so that a column is contiguous, and have their columns in `order`.

    Parameters
    ----------
    grid : Grid
    scheme : Scheme
    order : Tensor, shape [columns]
        The columns in the order in which they are rounded.
    """

    def __init__(self, grid: Grid, scheme: Scheme, order: Tensor) -> None:
        self.scheme, self.order = scheme, order
        self.dtype = torch.float32 if order.is_cuda else torch.float64
        scale, zero = grid.spread(len(order), self.dtype)
        self.scale = scale.T[order].contiguous()
        self.zero = None if zero is None else zero.T[order].contiguous()

    def run(self, wanted: Tensor, pull: Tensor, held: Tensor | None = None) -> Tensor:
        """Round column after column.

        Parameters
        ----------
        wanted : Tensor, shape [columns, rows]
            What every column wants to be at the start.
        pull : Tensor, shape [columns, columns]
            ``pull[i, j]`` times the move of column i is added to what column j > i wants.
        held : Tensor, shape [columns, rows], optional
            The values that the columns move from; left out, what they want when their turn comes.

        Returns
        -------
        Tensor, shape [rows, columns], int8
            Codes, with the columns in their own order.
        """
        wanted, pull = wanted.to(self.dtype, copy=True), pull.to(self.dtype)
        held = None if held is None else held.to(self.dtype)
        codes = torch.empty_like(wanted, dtype=torch.int8)
        width = CUDA_BLOCK if wanted.is_cuda else CPU_BLOCK
        round_block: Block | None = None
        for start in range(0, len(wanted), width):
            block = slice(start, start + width)
            whole = (wanted, self.scale, self.zero, held)
            inputs = [pull[block, block], *(None if t is None else t[block] for t in whole)]
            if wanted.is_cuda and block.stop <= len(wanted):
                round_block = round_block or _recorded(self._round_block, inputs)
                moves, codes[self.order[block]] = round_block(inputs)
            else:
                moves, codes[self.order[block]] = self._round_block(inputs)
            wanted[block.stop :].addmm_(pull[block, block.stop :].T, moves)
        return codes.T.contiguous()

    def _round_block(self, inputs: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Return the moves [width, rows] and the codes [width, rows] of some columns."""
        pull, wanted, scale, zero, held = inputs
        assert pull is not None
        assert wanted is not None
        assert scale is not None
        moves = torch.empty_like(wanted)
        codes = torch.empty_like(wanted, dtype=torch.int8)
        for k in range(len(wanted)):
            value = torch.addmv(wanted[k], moves[:k].T, pull[:k, k]) if k else wanted[k]
            steps = (value / scale[k]).round_()
            if zero is not None:
                steps.add_(zero[k])
            steps.clamp_(self.scheme.lowest, self.scheme.highest)
            codes[k] = steps
            if zero is not None:
                steps.sub_(zero[k])
            torch.sub(steps.mul_(scale[k]), value if held is None else held[k], out=moves[k])
        return moves, codes


def _recorded(function: Block, inputs: list[Tensor | None]) -> Block:
    """Record the kernels that a function launches, to launch them for other inputs at once.

    Outputs are overwritten by the next call.
    """
    places = [None if t is None else t.clone() for t in inputs]
    side = torch.cuda.Stream()  # libraries set themselves up on first use, which no graph may hold
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(places)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(places)

    def replay(inputs: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        for place, value in zip(places, inputs, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        graph.replay()
        return outputs

    return replay
