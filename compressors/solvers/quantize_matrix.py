"""Quantization of a matrix by a quantizer that is selected by name."""

from typing import Literal, get_args

import torch
from torch import Tensor

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.solvers.gptq import DAMP, gptq
from lrc.compressors.solvers.quantized_matrix import QuantizedMatrix, round_to_nearest

QuantizerName = Literal["rtn", "gptq"]


def quantize_matrix(
    W: Tensor,
    H: Tensor | None,
    scheme: QuantizationArgs,
    *,
    quantizer: QuantizerName,
    dtype: torch.dtype,
    damp: float = DAMP,
    act_order: bool = True,
) -> QuantizedMatrix:
    """Quantize a matrix by `gptq`, or by `round_to_nearest` if `H` is None.

    The other parameters are those of `gptq`.

    Raises
    ------
    ValueError
        If the quantizer is unknown, and see `gptq`.
    """
    if quantizer not in get_args(QuantizerName):
        raise ValueError(f"quantizer must be rtn or gptq, got {quantizer!r}")
    if quantizer == "gptq" and H is not None:
        return gptq(W, H, scheme, dtype=dtype, damp=damp, act_order=act_order)
    return round_to_nearest(W, scheme, dtype=dtype, H=H)
