"""One way into rounding of a whole weight, whichever way is asked for."""

from typing import Literal

import torch
from torch import Tensor

from lrc.compressors.layers.scheme import Scheme
from lrc.compressors.solvers.gptq import DAMP, gptq
from lrc.compressors.solvers.quantized_matrix import Rounded
from lrc.compressors.solvers.round_to_nearest import rtn

Rounder = Literal["gptq", "rtn"]


def round_weight(
    W: Tensor,
    H: Tensor | None,
    scheme: Scheme,
    *,
    rounder: Rounder,
    dtype: torch.dtype,
    damp: float = DAMP,
    order: bool = True,
) -> Rounded:
    """Round a weight by `gptq` or `rtn`; to the nearest where nothing is known of its inputs.

    Parameters and errors are theirs; `H` is None where no token came.
    """
    if rounder == "gptq" and H is not None:
        return gptq(W, H, scheme, dtype=dtype, damp=damp, order=order)
    return rtn(W, scheme, dtype=dtype, H=H)
