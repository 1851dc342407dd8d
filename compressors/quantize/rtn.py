"""Round to nearest; stands in for what another branch writes."""

import torch
from torch import Tensor

from lrc.compressors.layers.scheme import Scheme
from lrc.compressors.quantize.rounded import Rounded


def rtn(W: Tensor, scheme: Scheme, *, dtype: torch.dtype, H: Tensor | None = None) -> Rounded:
    """Round to nearest, with scales from the extremes."""
    rows, columns = W.shape
    grouped = W.double().view(rows, scheme.groups(columns), -1)
    zero = None
    if scheme.symmetric:
        scale = (grouped.abs().amax(2) / scheme.highest).clamp_min(1e-8).to(dtype)
        steps = grouped / scale.double()[:, :, None]
    else:
        low, high = grouped.amin(2).clamp_max(0), grouped.amax(2).clamp_min(0)
        scale = ((high - low) / (2**scheme.bits - 1)).clamp_min(1e-8).to(dtype)
        zero = (scheme.lowest - low / scale.double()).round().clamp(scheme.lowest, scheme.highest)
        steps = grouped / scale.double()[:, :, None] + zero[:, :, None]
        zero = zero.to(torch.int8)
    codes = steps.round().clamp(scheme.lowest, scheme.highest).view(rows, columns).to(torch.int8)
    return Rounded(codes, scale, zero, scheme)
