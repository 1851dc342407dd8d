"""Products with matrices of which only some entries are stored; a mask says where they belong."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrc.compressors.kernels import few_tokens, masked_cuda
from lrc.compressors.kernels.cuda_device import cuda_problem
from lrc.compressors.kernels.implementations import Entry, Need, Places
from lrc.compressors.kernels.mask_places import UNIT, starts_and_offsets
from lrc.compressors.kernels.triton_device import triton_problem

EIGHT_OF, FREE, GROUPS = 0, 1, 2
"""Layouts: n values for each unit of eight columns; values row by row without gaps; groups of
integers, of consecutive columns."""
FEW_ROWS = 4
"""Largest number of tokens for the Triton kernels. For more tokens, and where no kernel in CUDA C++
serves them, a kernel writes the dense matrix, which cuBLAS multiplies."""
SOME_ROWS = 32
"""Largest number of tokens for the kernels in CUDA C++, which are preferred where there is one."""
PERMUTED_ROWS = 2
"""Largest number of tokens for which n:8 in 16 bits is multiplied by the Triton kernel, without
tensor cores, although there is a kernel in CUDA C++, with tensor cores. Speed relative to dense on
one H200 at density 0.5: 1.6 to 1.8 against 1.2 to 1.4 for one token, 1.1 against 1.2 for four."""


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


def run(x: Tensor, stored: Masked) -> Tensor:
    """Return ``x @ W.T`` [tokens, d_out]; only compiled code pays for a custom operator."""
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


def _stored(values: Tensor, mask: Tensor, *rest: Any) -> Masked:
    """Return what `_flat` took apart."""
    scale, starts, offsets, layout, columns, n, bits, group = rest
    return Masked(layout, columns, values, mask, scale, starts, offsets, n, bits, group)


FIELDS = (
    "Tensor values, Tensor mask, Tensor? scale, Tensor? starts, Tensor? offsets, "
    "SymInt layout, SymInt columns, SymInt n, SymInt bits, SymInt group"
)
"""The fields of `Masked`, as `_flat` returns them, in the language of operators."""


def _linear(x: Tensor, *fields: Any) -> Tensor:
    return _product(x, _stored(*fields))


def _dense(*fields: Any) -> Tensor:
    return _matrix(_stored(*fields))


masked_linear = torch.library.custom_op(
    "lrc::masked_linear",
    _linear,
    mutates_args=(),
    device_types="cuda",
    schema=f"(Tensor x, {FIELDS}) -> Tensor",
)
masked_matrix = torch.library.custom_op(
    "lrc::masked_matrix",
    _dense,
    mutates_args=(),
    device_types="cuda",
    schema=f"({FIELDS}) -> Tensor",
)


@masked_linear.register_fake
def _(x: Tensor, values: Tensor, mask: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], mask.shape[0])


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
    if rows <= SOME_ROWS:
        if not few_tokens.starts_at_16_bytes(x):
            x = x.clone()  # kernels read several numbers at once
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
    """Multiply with a kernel in CUDA C++, or return None if none serves."""
    if cuda_problem(x.device.index or 0) is not None:
        return None
    if stored.layout == EIGHT_OF and not stored.bits and len(x) > PERMUTED_ROWS:
        eight = masked_cuda.EightOf(stored.values, stored.mask, stored.n)
        if masked_cuda.serves_eight_of(eight, stored.columns):
            return masked_cuda.eight_of(x, eight)
    if stored.layout == GROUPS:
        groups = _groups(stored)
        if masked_cuda.serves_groups(groups, stored.columns):
            (y,) = masked_cuda.groups(x, [groups])
            return y
    return None


def _groups(stored: Masked) -> masked_cuda.Groups:
    assert stored.scale is not None
    assert stored.starts is not None
    assert stored.offsets is not None
    return masked_cuda.Groups(
        stored.values,
        stored.scale,
        stored.mask,
        stored.starts,
        stored.offsets,
        stored.bits,
        stored.group,
    )


def run_together(x: Tensor, matrices: Sequence[tuple[Masked]]) -> list[Tensor] | None:
    """Return the products of one input and several matrices; None if one launch is impossible.

    There is a kernel for groups of integers.
    """
    members = [stored for (stored,) in matrices]
    groups = [_groups(stored) for stored in members if stored.layout == GROUPS]
    if len(groups) < len(members):
        return None
    same = {(masked_cuda.constants(g), m.columns) for g, m in zip(groups, members, strict=True)}
    if len(same) > 1:
        return None
    if torch.compiler.is_compiling():
        first = members[0]
        together: list[Tensor] = group_linears(
            x,
            [stored.values for stored in members],
            [stored.mask for stored in members],
            [stored.scale for stored in members],
            [stored.starts for stored in members],
            [stored.offsets for stored in members],
            first.columns,
            first.bits,
            first.group,
        )
        return together
    return _products(x, members, groups)


def _products(
    x: Tensor, members: Sequence[Masked], groups: Sequence[masked_cuda.Groups]
) -> list[Tensor]:
    """Multiply by groups of integers, which agree in all but their numbers of rows."""
    serves = 0 < len(x) <= SOME_ROWS and cuda_problem(x.device.index or 0) is None
    if not serves or not all([masked_cuda.serves_groups(g, x.shape[1]) for g in groups]):
        return [_product(x, stored) for stored in members]
    x = x.contiguous()
    return masked_cuda.groups(x if few_tokens.starts_at_16_bytes(x) else x.clone(), groups)


@torch.library.custom_op("lrc::group_linears", mutates_args=(), device_types="cuda")
def group_linears(
    x: Tensor,
    values: Sequence[Tensor],
    mask: Sequence[Tensor],
    scale: Sequence[Tensor],
    starts: Sequence[Tensor],
    offsets: Sequence[Tensor],
    columns: int,
    bits: int,
    group: int,
) -> list[Tensor]:
    """Return the products of one input and matrices in groups of integers."""
    members = [
        Masked(GROUPS, columns, *tensors, bits=bits, group=group)
        for tensors in zip(values, mask, scale, starts, offsets, strict=True)
    ]
    return _products(x, members, [_groups(stored) for stored in members])


@group_linears.register_fake
def _(x: Tensor, values: Sequence[Tensor], mask: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], rows.shape[0]) for rows in mask]


def _matrix(stored: Masked) -> Tensor:
    from lrc.compressors.kernels import masked_triton

    with torch.cuda.device(stored.mask.device):
        return masked_triton.expand(stored)


def refuse(need: Need) -> str | None:
    """Return why the kernels do not serve a product; None if they do.

    Without Triton there are none: one of its kernels writes the dense matrix for many tokens.
    """
    d_out, d_in = need.shape
    if d_out * d_in >= 2**31:
        return "2**31 entries or more"
    if need.group_size is not None and (need.group_size < UNIT or need.group_size % UNIT):
        return f"groups of {need.group_size}, not a multiple of {UNIT}"
    return triton_problem(need.device.index or 0)


def prepare(device: torch.device, n: int) -> None:
    """Do once per device what is not possible while a CUDA graph is recorded.

    A table that a product made then would be in the memory of the graph.

    Parameters
    ----------
    device : torch.device
        A CUDA device.
    n : int
        Values in a unit, with `EIGHT_OF`; else 0.
    """
    cuda_problem(device.index or 0)
    if 0 < n < UNIT:
        from lrc.compressors.kernels import n8_triton

        n8_triton.table(n, device)


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
        together=run_together,
        places=Places(find_places),
    )
]
