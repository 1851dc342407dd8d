"""How one tensor of a delta is stored: encoding, and decoding on top of the tensor of the base.

Every codec is a pair of functions. The first receives the tensors of the base and of the tuned
model and returns one-dimensional tensors, the *parts*; the second receives the parts and the tensor
of the base. Differences are taken and added in float32 (float64 if the tuned tensor has it) and the
result is rounded to the dtype of the tuned tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrc.compressors.deltas.chosen_places import (
    decode_places,
    encode_places,
    largest,
    pack,
    unpack,
)
from lrc.compressors.layers.packing import read_values, repack_integers
from lrc.compressors.layers.quantization_args import QuantizationArgs
from lrc.compressors.solvers.factor_balancing import equalize_norms
from lrc.compressors.solvers.linalg import check_size
from lrc.compressors.solvers.quantize_values import quantize_values
from lrc.compressors.solvers.spectrum import Spectrum, spectrum
from lrc.configs.delta_methods import Integers, Sparse, Ternary

SCALE_DTYPE = torch.bfloat16
"""Of the scales of integers: differences are too small for float16."""


@dataclass(frozen=True)
class Encoded:
    """A tensor of a delta, as it is stored."""

    codec: str
    facts: dict[str, int]
    """Whole numbers without which the parts cannot be read."""
    parts: dict[str, Tensor]
    """Name -> one-dimensional tensor."""

    @property
    def bits(self) -> int:
        """Bits of the parts in the file."""
        return sum(8 * part.numel() * part.element_size() for part in self.parts.values())


def difference(base: Tensor, tuned: Tensor) -> Tensor:
    """Return ``tuned - base`` in float32, or in float64 if `tuned` is."""
    dtype = torch.promote_types(tuned.dtype, torch.float32)
    return tuned.to(dtype) - base.to(dtype)


def add(base: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``base + change`` in `dtype`, calculated as in `difference`."""
    exact = torch.promote_types(dtype, torch.float32)
    return (base.to(exact) + change.to(exact).view(base.shape)).to(dtype)


def encode_exact(tuned: Tensor, dtype: torch.dtype | None = None) -> Encoded:
    """Store all numbers of a tensor, in its own dtype unless another one is given."""
    return Encoded("exact", {}, {"values": tuned.to(dtype or tuned.dtype).flatten()})


def decode_exact(encoded: Encoded, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the stored tensor."""
    return encoded.parts["values"].to(dtype).view(base.shape)


def encode_ternary(base: Tensor, tuned: Tensor, options: Ternary) -> Encoded:
    """Store the places and signs of the largest differences, and one scale.

    Notes
    -----
    As in ComPEFT [1]_, with the places chosen in every tensor instead of in the whole
    model, and one scale per tensor. The paper takes alpha times the standard deviation of all
    differences; the least-squares scale for given places and signs is the mean magnitude at these
    places.

    References
    ----------
    .. [1] P. Yadav et al., "ComPEFT: Compression for Communicating Parameter Efficient Updates via
       Sparsification and Quantization", 2023. https://arxiv.org/abs/2311.13171
    """
    change = difference(base, tuned).flatten().numpy()
    magnitudes = np.abs(change)
    places = largest(magnitudes, options.density)
    kept = change[places]
    if options.scale == "std":
        scale = float(change.std(dtype=np.float64))
    else:
        scale = float(magnitudes[places].mean(dtype=np.float64)) if len(places) else 0.0
    code, m = encode_places(places, len(change))
    parts = {
        "code": pack(np.concatenate([code, kept > 0])),
        "scale": torch.tensor([options.alpha * scale], dtype=torch.float32),
    }
    return Encoded("ternary", {"count": len(places), "m": m}, parts)


def decode_ternary(encoded: Encoded, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the scale, with the stored signs, at the stored places."""
    count, m = encoded.facts["count"], encoded.facts["m"]
    bits = unpack(encoded.parts["code"])
    places, used = decode_places(bits, count, m, base.numel())
    signs = bits[used : used + count]
    change = np.zeros(base.numel(), dtype=np.float32)
    change[places] = np.where(signs, 1, -1) * float(encoded.parts["scale"])
    return add(base, torch.from_numpy(change), dtype)


def encode_sparse(base: Tensor, tuned: Tensor, options: Sparse) -> Encoded:
    """Store the places of the largest differences, and numbers or differences there."""
    change = difference(base, tuned).flatten()
    places = largest(change.abs().numpy(), options.density)
    code, m = encode_places(places, change.numel())
    chosen = torch.from_numpy(places)
    exact = options.values == "exact"
    values = tuned.flatten()[chosen] if exact else change[chosen].to(torch.bfloat16)
    facts = {"count": len(places), "m": m, "exact": int(exact)}
    return Encoded("sparse", facts, {"code": pack(code), "values": values})


def decode_sparse(encoded: Encoded, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Replace or change the numbers at the stored places."""
    facts, values = encoded.facts, encoded.parts["values"]
    bits = unpack(encoded.parts["code"])
    places, _ = decode_places(bits, facts["count"], facts["m"], base.numel())
    chosen = torch.from_numpy(places)
    result = base.to(dtype, copy=True).flatten()
    if not facts["exact"]:
        values = add(base.flatten()[chosen], values, dtype)
    result[chosen] = values.to(dtype)
    return result.view(base.shape)


def encode_integers(base: Tensor, tuned: Tensor, options: Integers) -> Encoded:
    """Round differences to the nearest integers, with one scale for consecutive groups."""
    scheme = QuantizationArgs(options.bits, options.group_size)
    codes, scale = quantize_values(difference(base, tuned).flatten(), scheme, dtype=SCALE_DTYPE)
    # compressed-tensors takes over a second per million numbers for a long row of two bits.
    packed = repack_integers(codes[None], options.bits)[0]
    facts = {"bits": options.bits, "group_size": options.group_size}
    return Encoded("int", facts, {"codes": packed, "scale": scale})


def decode_integers(encoded: Encoded, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the integers times their scales."""
    scheme = QuantizationArgs(encoded.facts["bits"], encoded.facts["group_size"])
    codes, scale = encoded.parts["codes"][None], encoded.parts["scale"].float()
    return add(base, read_values(codes, scale, base.numel(), scheme), dtype)


def encode_low_rank(
    base: Tensor,
    tuned: Tensor,
    rank: int,
    dtype: torch.dtype,
    decompose: Callable[[Tensor], Spectrum] = spectrum,
) -> Encoded:
    """Store the product of two factors that is closest to the difference of two matrices.

    The metric is that of `decompose`, by default the identity. Computed in float64.

    Raises
    ------
    ValueError
        If `rank` is not in [1, min(d_out, d_in)].
    """
    change = difference(base, tuned).double()  # [d_out, d_in]
    check_size("rank", rank, min(change.shape), change.shape)
    found = decompose(change)
    B, A = equalize_norms(found.B[:, :rank], found.A[:rank])  # [d_out, rank], [rank, d_in]
    parts = {"a": A.to(dtype).flatten(), "b": B.to(dtype).flatten()}
    return Encoded("low_rank", {"rank": rank}, parts)


def decode_low_rank(encoded: Encoded, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Add the product of the factors."""
    rank, exact = encoded.facts["rank"], torch.promote_types(dtype, torch.float32)
    B = encoded.parts["b"].to(exact).view(-1, rank)
    return add(base, B @ encoded.parts["a"].to(exact).view(rank, -1), dtype)


CODECS: dict[str, Callable[[Encoded, Tensor, torch.dtype], Tensor]] = {
    "exact": decode_exact,
    "ternary": decode_ternary,
    "sparse": decode_sparse,
    "int": decode_integers,
    "low_rank": decode_low_rank,
}
ENCODERS: dict[type, Callable[[Tensor, Tensor, Any], Encoded]] = {
    Ternary: encode_ternary,
    Sparse: encode_sparse,
    Integers: encode_integers,
}
"""Options of the methods that handle tensors of every shape alike."""


def decode(encoded: Encoded, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tuned tensor, in `dtype`, from the stored parts and the tensor of the base.

    Raises
    ------
    ValueError
        If the parts do not fit each other or the tensor.
    """
    try:
        return CODECS[encoded.codec](encoded, base, dtype)
    except (KeyError, RuntimeError, IndexError) as error:
        raise ValueError(f"the stored parts do not fit a tensor {list(base.shape)}") from error
