"""The gradient of divergences at logits by one kernel, where there is one."""

import logging
from functools import cache

import torch
from torch import Tensor

from lrc.compressors.kernels.failures import described
from lrc.compressors.kernels.triton_device import triton_problem

log = logging.getLogger(__name__)


def fused_gradient(
    dense: Tensor,
    compressed: Tensor,
    labels: Tensor,
    *,
    forward: bool,
    reverse: bool,
    weight: float,
) -> Tensor | None:
    """Return the gradient at the logits of the compressed model, or None if there is no kernel.

    Parameters
    ----------
    dense, compressed : Tensor, shape [n, vocabulary]
        Logits.
    labels : Tensor, shape [n], int64
        Next tokens; negative if there is none.
    forward, reverse : bool
        Which divergences are differentiated; the mean of both.
    weight : float
        Multiple of the cross entropy of `labels` that is added.

    Returns
    -------
    Tensor, shape [n, vocabulary], or None
        In the dtype of `compressed`.
    """
    device = compressed.device
    if device.type != "cuda" or compressed.dtype == torch.float64 or not _works(device.index):
        return None
    from lrc.compressors.kernels import divergence_triton

    with torch.cuda.device(device):  # Triton launches on the current device
        found: Tensor = divergence_triton.gradient(
            dense.contiguous(),
            compressed.contiguous(),
            labels,
            forward=forward,
            reverse=reverse,
            weight=weight,
        )
    return found


@cache
def _works(device: int) -> bool:
    """Return whether the kernel runs on a device; the reason is logged if it does not."""
    problem = triton_problem(device)
    if problem is None:
        try:
            from lrc.compressors.kernels import divergence_triton

            with torch.cuda.device(device):
                logits = torch.zeros(1, 8, device=f"cuda:{device}")
                labels = torch.zeros(1, dtype=torch.int64, device=logits.device)
                divergence_triton.gradient(
                    logits, logits, labels, forward=True, reverse=True, weight=1.0
                )
        except Exception as error:  # those of Triton, CUDA and compilers have no common class
            problem = described(error)
    if problem is not None:
        log.info("gradients at logits are computed by plain PyTorch: %s", problem)
    return problem is None
