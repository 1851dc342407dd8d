"""Products that write their rows in the order of the outputs: ``y = cat([p, C p])[order]``.

In plain PyTorch that is a product, a concatenation and a gather, which together move three times as
many numbers as the product writes.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.kernels.implementations import Entry, Need
from lrc.compressors.kernels.triton_device import triton_problem

FEW_ROWS = 1
"""Largest number of tokens that one kernel multiplies and places; for more, cuBLAS multiplies and a
second kernel places. Speed of the one kernel relative to dense on one H200, for the seven linears
of Llama-3-8B at 0.6 of their size: 1.2 for one token, 0.7 for 16."""
TRANSPOSE_FROM = 16
"""Number of tokens from which, on a CPU, rows are gathered before the result is transposed: a
gather along the last dimension copies number by number. One core of an EPYC, C [3546, 550], 512
tokens in bfloat16: 8.1 ms with a gather, 6.1 transposed, products alone 5.1; float32 the same. Four
tokens: 0.4 and 1.6 ms."""


def inverse_of(order: Tensor) -> Tensor:
    """Return where each row of ``cat([p, C p])`` goes, [d_out] int32."""
    inverse = torch.empty(len(order), dtype=torch.int32, device=order.device)
    places = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return inverse.index_copy_(0, order.long(), places)


def has_kernel(p: Tensor) -> bool:
    """Return whether `pivoted_rows` and `interleave` have a kernel for these outputs."""
    return p.is_cuda and p.dtype != torch.float64 and _kernels() is not None


def pivoted_rows(p: Tensor, c: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return ``cat([p, p @ c.T], -1)[:, order]`` without storing the concatenation.

    Parameters
    ----------
    p : Tensor, shape [n, rank]
        Outputs of the pivot rows, contiguous within a row.
    c : Tensor, shape [d_out - rank, rank]
    order, inverse : Tensor, shape [d_out]
        See `inverse_of`.

    Returns
    -------
    Tensor, shape [n, d_out]
    """
    # Dispatching to an operator takes longer than launching a kernel; only compilers need one.
    y: Tensor = (pivoted_rows_op if torch.compiler.is_compiling() else _rows)(p, c, order, inverse)
    return y


def interleave(p: Tensor, others: Tensor, order: Tensor) -> Tensor:
    """Return ``cat([p, others], -1)[:, order]``.

    Parameters
    ----------
    p : Tensor, shape [n, rank]
    others : Tensor, shape [n, d_out - rank]
    order : Tensor, shape [d_out], integer
    """
    y: Tensor = (interleave_op if torch.compiler.is_compiling() else _placed)(p, others, order)
    return y


def _rows(p: Tensor, c: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    kernels = _kernels() if has_kernel(p) else None
    if kernels is not None and 0 < len(p) <= FEW_ROWS:
        with torch.cuda.device(p.device):
            y: Tensor = kernels.few_rows(p, c, inverse)
        return y
    return _placed(p, torch.nn.functional.linear(p, c), order)


def _placed(p: Tensor, others: Tensor, order: Tensor) -> Tensor:
    kernels = _kernels() if has_kernel(p) else None
    if kernels is not None and p.numel():
        with torch.cuda.device(p.device):
            y: Tensor = kernels.interleave(p, others, order)
        return y
    return torch.cat([p, others], dim=-1).index_select(-1, order.int())


pivoted_rows_op = torch.library.custom_op("lrc::pivoted_rows", _rows, mutates_args=())
interleave_op = torch.library.custom_op("lrc::interleave", _placed, mutates_args=())


@pivoted_rows_op.register_fake
def _(p: Tensor, c: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    return p.new_empty(p.shape[0], order.shape[0])


@interleave_op.register_fake
def _(p: Tensor, others: Tensor, order: Tensor) -> Tensor:
    return p.new_empty(p.shape[0], order.shape[0])


def interleave_by_rows(p: Tensor, c: Tensor, order: Tensor) -> Tensor:
    """Return what `pivoted_rows` returns, with operations that are fast on a CPU for many rows."""
    rows = torch.cat([p.T, torch.nn.functional.linear(c, p)])  # [d_out, n]
    return rows.index_select(0, order.int()).T.contiguous()


@cache
def _kernels() -> Any:
    """Return the module of Triton kernels, or None if Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lrc.compressors.kernels import pivoted_triton

    return pivoted_triton


def run(
    p: Tensor,
    c: Callable[[Tensor], Tensor],
    weight: Tensor | None,
    order: Tensor,
    inverse: Tensor,
) -> Tensor:
    """Return ``cat([p, c(p)], -1)[:, order]``.

    Parameters
    ----------
    p : Tensor, shape [n, rank]
    c : callable
        Maps `p` to the other outputs [n, d_out - rank].
    weight : Tensor, shape [d_out - rank, rank], or None
        The matrix by which `c` multiplies, if it does nothing else.
    order, inverse : Tensor, shape [d_out]
        See `inverse_of`.
    """
    if weight is None:
        return interleave(p, c(p), order)
    return pivoted_rows(p, weight, order, inverse)


def refuse(need: Need) -> str | None:
    """Return why the Triton kernels do not serve a product; None if they do."""
    return triton_problem(need.device.index or 0)


ENTRIES = [Entry("Triton", "pivoted_rows", "cuda", ("float", *range(2, 9)), run, refuse=refuse)]
