"""Pack integers of few bits into int32 words, and read them."""

import math

import torch
from torch import Tensor, nn

from lrc.compressors.layers.quantization_args import VALUES_GROUP, QuantizationArgs

WORD, BYTE = 32, 8


def pack_integers(codes: Tensor, bits: int) -> Tensor:
    """Pack signed integers row by row in the layout of compressed-tensors.

    Code i of a row takes bits ``i * bits`` and following of the row's words, lowest bit first, as
    its distance from the smallest code.

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
    # Imported here because loading a checkpoint only unpacks, and the package takes seconds.
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed: Tensor = pack_to_int32(codes.to(torch.int8), bits)
    return packed


def unpack_integers(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the int8 codes [rows, columns] that `pack_integers` packed.

    compressed-tensors has the inverse too; this one contains no data-dependent branches, so that
    `torch.compile` and CUDA graphs can record it, and few operations, all of them on bytes:
    training of scales unpacks every matrix of a model in every step.
    """
    # `contiguous` alone would keep the strides of a transposed row, which has one word per row.
    rows, words = packed.shape
    as_bytes = packed.flatten().contiguous().view(torch.uint8).view(rows, 4 * words)
    width = bits // math.gcd(bits, BYTE)  # bytes that hold a whole number of codes
    groups = -(-as_bytes.shape[1] // width)
    if missing := groups * width - as_bytes.shape[1]:
        as_bytes = nn.functional.pad(as_bytes, (0, missing))
    grouped = as_bytes.view(rows, groups, width)
    codes = []
    for first in range(0, BYTE * width, bits):  # a code starts in one byte and may end in the next
        place, shift = divmod(first, BYTE)
        code = grouped[:, :, place] >> shift if shift else grouped[:, :, place]
        if shift + bits > BYTE:
            code = code | (grouped[:, :, place + 1] << (BYTE - shift))  # the rest leaves the byte
        codes.append(code)
    stored = torch.stack(codes, dim=-1) if len(codes) > 1 else grouped
    if bits < BYTE:
        stored = stored & ((1 << bits) - 1)
    signed: Tensor = stored.flatten(1)[:, :columns] - (1 << (bits - 1))
    return signed.view(torch.int8)


def repack_integers(codes: Tensor, bits: int) -> Tensor:
    """Pack like `pack_integers`, without compressed-tensors, which takes seconds to import.

    Undoing a conversion must not need more than loading does.
    """
    rows, columns = codes.shape
    words = -(-columns * bits // WORD)
    stored = codes.contiguous().view(torch.uint8) + (1 << (bits - 1))
    padded = nn.functional.pad(stored, (0, -columns % WORD))
    if bits in (2, 4, 8):  # a word holds a whole number of codes
        each = 8 // bits
        parts = padded.view(rows, -1, each)
        as_bytes = parts[:, :, 0].clone(memory_format=torch.contiguous_format)
        for place in range(1, each):
            as_bytes |= parts[:, :, place] << (bits * place)
        return as_bytes.view(torch.int32)[:, :words].contiguous()
    grouped = padded.view(rows, -1, WORD)
    packed = grouped.new_zeros(rows, grouped.shape[1], bits + 1, dtype=torch.int32)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = grouped[:, :, i].int()
        packed[:, :, word] |= code << shift
        if shift + bits > WORD:
            packed[:, :, word + 1] |= code >> (WORD - shift)
    return packed[:, :, :bits].flatten(1)[:, :words].contiguous()


def encode_matrix(
    name: str, codes: Tensor, scale: Tensor, zero: Tensor | None, args: QuantizationArgs
) -> dict[str, Tensor]:
    """Return the tensors of `QuantizationArgs.matrix_specs` for a quantized matrix.

    Parameters
    ----------
    name : str
        Name of the matrix within its module, for example ``a.weight``.
    codes : Tensor, shape [rows, columns], integer
    scale : Tensor, shape [rows, groups]
    zero : Tensor, shape [rows, groups], integer, or None
        The codes that represent 0, if `args` is asymmetric.
    """
    tensors = {
        f"{name}_packed": pack_integers(codes, args.bits),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if zero is not None:
        tensors[f"{name}_zero_point"] = pack_integers(zero.T, args.bits).T.contiguous()
    return tensors


def encode_values(
    name: str, codes: Tensor, scale: Tensor, args: QuantizationArgs
) -> dict[str, Tensor]:
    """Return the tensors of `QuantizationArgs.values_specs` for quantized values, codes [count]."""
    return {f"{name}_packed": pack_integers(codes[None], args.bits), f"{name}_scale": scale}


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return the matrix [rows, columns] that codes represent, in the dtype of `scale`.

    Or a stack of them, if `codes`, `scale` and `zero` have a first dimension more.
    """
    grouped = codes.view(*scale.shape, -1)  # [..., rows, groups, width]
    steps = grouped if zero is None else grouped.to(torch.int16) - zero.to(torch.int16)[..., None]
    return (steps.to(scale.dtype) * scale[..., None]).flatten(-2)


def read_values(packed: Tensor, scale: Tensor, count: int, args: QuantizationArgs) -> Tensor:
    """Return the numbers [count] of `encode_values`, in the dtype of `scale`.

    The gradient of a scale is a sum over its group, in a fixed order on every device.
    """
    codes = unpack_integers(packed, args.bits, count)[0]
    missing = len(scale) * (args.group_size or VALUES_GROUP) - count  # in the last group
    grouped = nn.functional.pad(codes, (0, missing)).view(len(scale), -1)
    return (grouped.to(scale.dtype) * scale[:, None]).flatten()[:count]
