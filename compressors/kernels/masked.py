"""Products with matrices of which some entries are stored, at the places that a mask names."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrc.compressors.kernels import few_tokens, masked_cuda
from lrc.compressors.kernels.implementations import Entry, Need, Places
from lrc.compressors.kernels.mask_places import UNIT, starts_and_offsets
from lrc.compressors.kernels.triton_device import triton_problem

EIGHT_OF, FREE, GROUPS = 0, 1, 2
"""Layouts: n values for each unit of eight columns; values row by row without gaps; groups of
integers, of consecutive columns."""
FEW_ROWS = 4
"""Up to this many inputs are multiplied by the Triton kernels. More are multiplied by a dense
matrix, which one kernel writes, where there is no kernel in CUDA C++."""
SOME_ROWS = 32
"""Up to this many inputs are multiplied by the kernels in CUDA C++."""
PERMUTED_ROWS = 2
"""Up to this many inputs n of eight are faster without tensor cores. One H200, density 0.5, one
input: 1.6 to 1.8 times dense, with tensor cores 1.2 to 1.4; four inputs 1.1 and 1.2."""


class Masked(NamedTuple):
    """A stored matrix [d_out, columns]."""

    layout: int
    columns: int
    values: Tensor
    """Numbers [count], or packed integers [1, words] as `pack_integers` returns them."""
    mask: Tensor
    """Bytes [d_out, bytes]; bit j of byte i is column 8 i + j, or group 8 i + j with `GROUPS`."""
    scale: Tensor | None = None
    """Of the integers, [scales]."""
    starts: Tensor | None = None
    """As `starts_and_offsets` returns them; None with `EIGHT_OF`, which needs none."""
    offsets: Tensor | None = None
    n: int = 0
    """Values in a unit, with `EIGHT_OF`."""
    bits: int = 0
    """Of the integers; 0 if values are stored as numbers."""
    group: int = 1
    """Consecutive values with a common scale; columns in a group, with `GROUPS`."""

    @property
    def d_out(self) -> int:
        """Number of rows."""
        return self.mask.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the entries."""
        return self.values.dtype if self.scale is None else self.scale.dtype


def n8_linear(x: Tensor, values: Tensor, mask: Tensor, n: int, columns: int) -> Tensor:
    """Return ``x @ W.T`` for a matrix with `n` entries in every eight columns.

    Parameters
    ----------
    x : Tensor, shape [rows, columns]
    values : Tensor, shape [d_out, columns / 8, n]
    mask : Tensor, shape [d_out, columns / 8], uint8
    n, columns : int

    Returns
    -------
    Tensor, shape [rows, d_out]
        In the dtype of `x`; sums are float32.
    """
    return run(x, Masked(EIGHT_OF, columns, values, mask, n=n))


def sparse_linear(
    x: Tensor, values: Tensor, mask: Tensor, starts: Tensor, offsets: Tensor, columns: int
) -> Tensor:
    """Return ``x @ W.T`` for a matrix with entries anywhere.

    Parameters
    ----------
    x : Tensor, shape [rows, columns]
    values : Tensor, shape [count]
        Row by row without gaps.
    mask : Tensor, shape [d_out, ceil(columns / 8)], uint8
    starts, offsets : Tensor
        As `starts_and_offsets` returns them for the mask.
    columns : int

    Returns
    -------
    Tensor, shape [rows, d_out]
    """
    return run(x, Masked(FREE, columns, values, mask, starts=starts, offsets=offsets))


def block_sparse_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    mask: Tensor,
    starts: Tensor,
    offsets: Tensor,
    bits: int,
    group_size: int,
    columns: int,
) -> Tensor:
    """Return ``x @ W.T`` for a matrix of which some groups of columns are stored as integers.

    Parameters
    ----------
    x : Tensor, shape [rows, columns]
    packed : Tensor, shape [1, words], int32
        Codes of the stored groups, row by row without gaps.
    scale : Tensor, shape [groups]
        One for each stored group.
    mask : Tensor, shape [d_out, ceil(columns / group_size / 8)], uint8
        A bit for each group.
    starts, offsets : Tensor
        As `starts_and_offsets` returns them for the mask.
    bits, group_size, columns : int

    Returns
    -------
    Tensor, shape [rows, d_out]
    """
    stored = Masked(GROUPS, columns, packed, mask, scale, starts, offsets, 0, bits, group_size)
    return run(x, stored)


def run(x: Tensor, stored: Masked) -> Tensor:
    """Return ``x @ W.T`` [rows, d_out], without the cost of an operator if not compiled."""
    if torch.compiler.is_compiling():
        y: Tensor = masked_linear(x, *_flat(stored))
        return y
    return _product(x, stored)


def expand(stored: Masked) -> Tensor:
    """Return the dense matrix [d_out, columns] on a CUDA device, written by one kernel."""
    if torch.compiler.is_compiling():
        W: Tensor = masked_matrix(*_flat(stored))
        return W
    return _matrix(stored)


def _flat(stored: Masked) -> tuple[Any, ...]:
    s = stored
    tensors = (s.values, s.mask, s.scale, s.starts, s.offsets)
    return (*tensors, s.layout, s.columns, s.n, s.bits, s.group)


def _stored(
    values: Tensor,
    mask: Tensor,
    scale: Tensor | None,
    starts: Tensor | None,
    offsets: Tensor | None,
    layout: int,
    columns: int,
    n: int,
    bits: int,
    group: int,
) -> Masked:
    return Masked(layout, columns, values, mask, scale, starts, offsets, n, bits, group)


@torch.library.custom_op("lrc::masked_linear", mutates_args=(), device_types="cuda")
def masked_linear(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: Tensor | None,
    starts: Tensor | None,
    offsets: Tensor | None,
    layout: int,
    columns: int,
    n: int,
    bits: int,
    group: int,
) -> Tensor:
    """Return ``x @ W.T`` as `run` does; the arguments are the fields of `Masked`."""
    return _product(
        x, _stored(values, mask, scale, starts, offsets, layout, columns, n, bits, group)
    )


@masked_linear.register_fake
def _(x: Tensor, values: Tensor, mask: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], mask.shape[0])


@torch.library.custom_op("lrc::masked_matrix", mutates_args=(), device_types="cuda")
def masked_matrix(
    values: Tensor,
    mask: Tensor,
    scale: Tensor | None,
    starts: Tensor | None,
    offsets: Tensor | None,
    layout: int,
    columns: int,
    n: int,
    bits: int,
    group: int,
) -> Tensor:
    """Return the matrix as `expand` does; the arguments are the fields of `Masked`."""
    return _matrix(_stored(values, mask, scale, starts, offsets, layout, columns, n, bits, group))


@masked_matrix.register_fake
def _(values: Tensor, mask: Tensor, scale: Tensor | None, *rest: Any) -> Tensor:
    like = values if scale is None else scale
    return like.new_empty(mask.shape[0], rest[3])


def _product(x: Tensor, stored: Masked) -> Tensor:
    if stored.layout == EIGHT_OF and stored.n == UNIT and not stored.bits:
        return nn.functional.linear(x, stored.values.view(stored.d_out, stored.columns))
    rows = len(x)
    if rows == 0:
        return x.new_empty(0, stored.d_out)
    x = x.contiguous()
    if rows <= SOME_ROWS and few_tokens.starts_at_16_bytes(x):
        y = _few_tokens(x, stored)
        if y is not None:
            return y
    if rows > FEW_ROWS:
        return nn.functional.linear(x, _matrix(stored))
    from lrc.compressors.kernels import masked_triton, n8_triton

    with torch.cuda.device(x.device):
        if stored.layout == EIGHT_OF and not stored.bits and x.dtype.itemsize == 2:
            return n8_triton.few_rows(x, stored.values, stored.mask, stored.n)
        return masked_triton.few_rows(x, stored)


def _few_tokens(x: Tensor, stored: Masked) -> Tensor | None:
    """Multiply with a kernel in CUDA C++, or return None if there is none."""
    if stored.layout == EIGHT_OF and not stored.bits and len(x) > PERMUTED_ROWS:
        eight = masked_cuda.EightOf(stored.values, stored.mask, stored.n)
        if masked_cuda.serves_eight_of(eight, stored.columns):
            return masked_cuda.eight_of(x, eight)
    if stored.layout == GROUPS:
        assert stored.scale is not None
        assert stored.starts is not None
        assert stored.offsets is not None
        groups = masked_cuda.Groups(
            stored.values,
            stored.scale,
            stored.mask,
            stored.starts,
            stored.offsets,
            stored.bits,
            stored.group,
        )
        if masked_cuda.serves_groups(groups, stored.columns):
            return masked_cuda.groups(x, groups)
    return None


def _matrix(stored: Masked) -> Tensor:
    from lrc.compressors.kernels import masked_triton

    with torch.cuda.device(stored.mask.device):
        return masked_triton.expand(stored)


def refuse(need: Need) -> str | None:
    """Return why the Triton kernels do not serve a product; None if they do."""
    d_out, d_in = need.shape
    if d_out * d_in >= 2**31:
        return "more than 2**31 entries"
    if need.group_size is not None and (need.group_size < UNIT or need.group_size % UNIT):
        return f"groups of {need.group_size}, not a multiple of {UNIT}"
    return triton_problem(need.device.index or 0)


def find_places(mask: Tensor, columns: int) -> dict[str, Tensor]:
    """Return what the kernels derive from a mask, by the names of fields of `Masked`."""
    starts, offsets = starts_and_offsets(mask)
    found = {"starts": starts, "offsets": offsets}
    whole = masked_cuda.padded(mask)
    return found if whole.shape == mask.shape else found | {"padded": whole}


ENTRIES = [
    Entry(
        "Triton",
        "masked_linear",
        "cuda",
        ("float", *range(2, 9)),
        run,
        refuse=refuse,
        places=Places(find_places),
    )
]
