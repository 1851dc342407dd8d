"""Products with sparse rows on the CPU, with the compressed rows of torch and MKL.

Unpacking a mask takes twenty times as long as multiplying by a dense matrix. Indices of 32 bits
that are made once after loading avoid it, and cost 4 bytes for each value; the values are those
that are stored. The linear layers of 12 blocks of SmolLM2-135M's shapes, one row, float32, one core
of an EPYC, speed relative to dense matrices: 1.9 at density 0.25, 1.26 at 0.5, 1.09 at 0.625, 0.91
at 0.8; rebuilt for every call, 0.02 to 0.07. For 2 to 16 rows 0.6 to 1.7.

`dequantize()` of a model makes dense copies instead, with the speed and the memory of a dense
model.
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.kernels.implementations import Entry, Need, Places
from lrc.compressors.kernels.mask_places import bits_of_bytes
from lrc.compressors.kernels.masked import Masked

CSR_ROWS = 192
"""Largest number of input rows for compressed rows; more are multiplied by a dense matrix. On two
cores, [3584, 1024] at density 0.5: 18 ms for 128 rows, a dense matrix 16 and writing it 10 to 25;
100, 42 and 10 to 25 for 512 rows."""


def find_places(mask: Tensor, columns: int) -> dict[str, Tensor]:
    """Return row pointers and column indices, by the names of fields of `Masked`."""
    bits = bits_of_bytes().to(torch.bool)[mask.int()].flatten(1)[:, :columns]
    counts = bits.sum(dim=1)
    pointers = nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return {"starts": pointers, "offsets": bits.nonzero()[:, 1].int()}


@torch.library.custom_op("lrc::csr_linear", mutates_args=(), device_types="cpu")
def csr_linear(
    x: Tensor, values: Tensor, pointers: Tensor, indices: Tensor, columns: int
) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out] for compressed rows.

    Parameters
    ----------
    x : Tensor, shape [rows, columns]
    values : Tensor, shape [count]
    pointers : Tensor, shape [d_out + 1], int32
    indices : Tensor, shape [count], int32
    columns : int
    """
    return _product(x, values, pointers, indices, columns)


@csr_linear.register_fake
def _(x: Tensor, values: Tensor, pointers: Tensor, indices: Tensor, columns: int) -> Tensor:
    return x.new_empty(x.shape[0], pointers.shape[0] - 1)


def run(x: Tensor, stored: Masked) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out]."""
    assert stored.starts is not None
    assert stored.offsets is not None
    product: Any = csr_linear if torch.compiler.is_compiling() else _product
    values = stored.values.detach().flatten()
    y: Tensor = product(x, values, stored.starts, stored.offsets, stored.columns)
    return y


def _product(x: Tensor, values: Tensor, pointers: Tensor, indices: Tensor, columns: int) -> Tensor:
    d_out = len(pointers) - 1
    if len(x) > CSR_ROWS:
        return nn.functional.linear(x, _matrix(values, pointers, indices, columns))
    _accept_warning()
    W = torch.sparse_csr_tensor(pointers, indices, values, (d_out, columns), check_invariants=False)
    if len(x) == 1:
        return torch.mv(W, x[0].contiguous())[None]
    return (W @ x.T.contiguous()).T.contiguous()


@cache
def _accept_warning() -> None:
    """Hide that the support of compressed rows is in beta state, which the first tensor says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


def _matrix(values: Tensor, pointers: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Return the dense matrix; a masked scatter would take five times as long."""
    d_out = len(pointers) - 1
    first = torch.arange(d_out) * columns
    places = indices + first.repeat_interleave(pointers.diff(), output_size=len(indices))
    return values.new_zeros(d_out * columns).index_copy_(0, places, values).view(d_out, columns)


def refuse(need: Need) -> str | None:
    """Return why compressed rows do not serve a product; None if they do."""
    return None if torch.backends.mkl.is_available() else "needs a torch with MKL"


ENTRIES = [
    Entry(
        "compressed rows (MKL)",
        "masked_linear",
        "cpu",
        ("float",),
        run,
        dtypes=(torch.float32,),
        refuse=refuse,
        places=Places(find_places),
    )
]
