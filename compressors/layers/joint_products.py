"""One launch for the products of layers that receive the same input, where a kernel can do it.

Generating one token with a small matrix takes little longer than launching the kernel. q, k and v
are one launch then, and so are gate and up; tensors are read where they are.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from lrc.compressors.kernels.failures import described
from lrc.compressors.layers.block_sparse import BlockSparse
from lrc.compressors.layers.dense import Dense
from lrc.compressors.layers.shared_input import SharedInput

log = logging.getLogger(__name__)


class JointProducts(SharedInput):
    """Products of one input with matrices that are stored in the same way.

    Members are multiplied together if all of them use one entry of the table of fast products, and
    it has a kernel for several matrices.

    Parameters
    ----------
    members : sequence of Dense or BlockSparse
    """

    members: tuple[Dense | BlockSparse, ...]

    def _products(self, x: Tensor) -> Sequence[Tensor] | None:
        entry = self.members[0].entry
        if entry is None or entry.together is None or x.shape[-1] != self.members[0].d_in:
            return None
        matrices = []
        for member in self.members:
            like, arguments = member.fast_arguments()
            if member.entry is not entry or not member.is_fast(x, like):
                return None
            matrices.append(arguments)
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():
            products: list[Tensor] | None = entry.together(flat, matrices)
        else:
            try:
                products = entry.together(flat, matrices)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of CUDA and compilers, which have no common class
                log.warning("%s: no product of several matrices (%s)", entry.name, described(error))
                products = None
        if products is None:
            self.dissolve()
            return None
        if x.dim() == 2:
            return products
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in products]
