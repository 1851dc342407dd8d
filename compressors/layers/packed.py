"""Integers of few bits without gaps in int32 words, and a linear layer that holds its weight so."""

from math import ceil

import torch
from torch import Tensor, nn

from lrc.compressors.layers.scheme import VALUES_GROUP, Scheme

WORD = 32


def pack_integers(codes: Tensor, bits: int) -> Tensor:
    """Write signed integers of `bits` bits one behind the other, row by row.

    Number i of a row takes bits ``i * bits`` and on of the row's words, lowest bit first, as its
    distance from the least code: compressed-tensors' layout.

    Parameters
    ----------
    codes : Tensor, shape [rows, columns], integer
        Each in ``[-2**(bits - 1), 2**(bits - 1))``.
    bits : int
        In [1, 8].

    Returns
    -------
    Tensor, shape [rows, ceil(columns * bits / 32)], int32
    """
    rows, columns = codes.shape
    words = ceil(columns * bits / WORD)
    unsigned = codes.to(torch.int64) + 2 ** (bits - 1)  # [rows, columns]
    first = torch.arange(columns, device=codes.device) * bits
    word, shift = first // WORD, first % WORD
    # Two words hold a number at most: the sums below are of disjoint bits.
    low = unsigned << shift
    packed = torch.zeros(rows, words + 1, dtype=torch.int64, device=codes.device)
    packed.index_add_(1, word, low & 0xFFFFFFFF)
    packed.index_add_(1, word + 1, low >> WORD)
    return packed[:, :words].to(torch.int32)  # wraps: the same 32 bits


def unpack_integers(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Read the integers [rows, columns] of `pack_integers` back, as int8."""
    if bits in (4, 8):  # bytes hold a whole number of codes: no arithmetic on words
        as_bytes = packed.contiguous().view(torch.uint8)  # [rows, 4 * words]
        if bits == 4:
            halves = torch.stack((as_bytes & 0xF, as_bytes >> 4), dim=-1)
            as_bytes = halves.flatten(1)  # [rows, 8 * words]
        signed: Tensor = as_bytes[:, :columns] - (1 << (bits - 1))
        return signed.view(torch.int8)
    first = torch.arange(columns, device=packed.device) * bits
    word, shift = first // WORD, first % WORD
    words = packed.to(torch.int64) & 0xFFFFFFFF
    words = nn.functional.pad(words, (0, 1))
    pairs = words[:, word] | (words[:, word + 1] << WORD)  # [rows, columns]
    codes: Tensor = ((pairs >> shift) & ((1 << bits) - 1)) - (1 << (bits - 1))
    return codes.to(torch.int8)


def encode_matrix(
    leaf: str, codes: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme
) -> dict[str, Tensor]:
    """Write a matrix of integers as the tensors of `Scheme.matrix`.

    Parameters
    ----------
    leaf : str
        Name of the matrix within its module, such as ``a.weight``.
    codes : Tensor, shape [rows, columns], integer
    scale : Tensor, shape [rows, groups]
    zero : Tensor, shape [rows, groups], integer, or None
        The codes that stand for 0, of an asymmetric scheme.
    """
    tensors = {
        f"{leaf}_packed": pack_integers(codes, scheme.bits),
        f"{leaf}_scale": scale,
        f"{leaf}_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero is not None:
        tensors[f"{leaf}_zero_point"] = pack_integers(zero.T, scheme.bits).T.contiguous()
    return tensors


def encode_values(leaf: str, codes: Tensor, scale: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """Write numbers without rows, `codes` [count], as the tensors of `Scheme.values`."""
    packed = pack_integers(codes[None], scheme.bits)
    return {f"{leaf}_packed": packed, f"{leaf}_scale": scale}


def dequantized(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return the matrix [rows, columns] that integers stand for, at the precision of `scale`."""
    rows, groups = scale.shape
    grouped = codes.view(rows, groups, -1)
    steps = grouped if zero is None else grouped.to(torch.int16) - zero.to(torch.int16)[:, :, None]
    return (steps.to(scale.dtype) * scale[:, :, None]).view(rows, -1)


class PackedMatrix(nn.Module):
    """The tensors of one matrix of integers, under the names of a weight.

    Parameters
    ----------
    rows, columns : int
    scheme : Scheme
    bias : bool
        Whether the layer has one, which is no integer.
    device, dtype : optional
        Of the scales; all is left uninitialised.

    Raises
    ------
    ValueError
        If the groups do not fill the rows.
    """

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        scheme: Scheme,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.scheme = rows, columns, scheme
        add_packed_(self, rows, columns, scheme, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None

    @property
    def weight(self) -> Tensor:
        """The matrix [rows, columns] that is meant, at the precision of the scales."""
        return read_packed(self, self.out_features, self.in_features, self.scheme)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` [..., columns] to [..., rows], as a linear layer."""
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Show shape and scheme in a printed model."""
        return f"d_in={self.in_features}, d_out={self.out_features}, {self.scheme}"


def add_packed_(
    module: nn.Module,
    rows: int,
    columns: int,
    scheme: Scheme,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Give a module the tensors of a matrix of integers, uninitialised.

    Scales are parameters, which training may tune; what is an integer is none.
    """
    for name, (shape, kind) in scheme.matrix("weight", [rows, columns]).items():
        tensor = torch.empty(shape, dtype=kind or dtype, device=device)
        if kind is None:
            module.register_parameter(name, nn.Parameter(tensor))
        else:
            module.register_buffer(name, tensor)


def read_packed(module: nn.Module, rows: int, columns: int, scheme: Scheme) -> Tensor:
    """Return the matrix of a module that `add_packed_` has prepared."""
    scale = module.get_parameter("weight_scale")
    codes = unpack_integers(module.get_buffer("weight_packed"), scheme.bits, columns)
    zero = None
    if not scheme.symmetric:
        zero = unpack_integers(module.get_buffer("weight_zero_point").T, scheme.bits, rows).T
    return dequantized(codes, scale, zero)


def read_values(packed: Tensor, scale: Tensor, count: int, scheme: Scheme) -> Tensor:
    """Return the numbers [count] of `encode_values`, at the precision of `scale`."""
    codes = unpack_integers(packed, scheme.bits, count)[0]
    each = scale.repeat_interleave(scheme.group_size or VALUES_GROUP)[:count]
    return codes.to(scale.dtype) * each
