"""The parts of a form as integers: which of them are rounded how, and in which order."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.layers import Scheme
from lrc.compressors.layers.bits import spread, unpack_bits
from lrc.compressors.layers.packed import encode_values
from lrc.compressors.layers.parts import sentinel
from lrc.compressors.planning.plan import Matrix
from lrc.compressors.planning.quantization import WHOLE
from lrc.compressors.solvers.gptq import QuantizerName, quantize_matrix
from lrc.compressors.solvers.low_rank_correction import low_rank_correction
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.compressors.solvers.quantize_blocks import quantize_blocks
from lrc.compressors.solvers.quantize_factors import quantize_low_rank, quantize_pivoted
from lrc.compressors.solvers.quantize_values import quantize_sparse_values, quantize_values
from lrc.compressors.solvers.quantized_matrix import round_to_nearest
from lrc.configs.methods import Mixed
from lrc.configs.quantize import Branch, Gauge, Kind, Quantize
from lrc.configs.recipe import Recipe

DAMP = 0.01
"""Of the inputs' moment where a stage does not say: the paper's."""
NO_INPUT = "saw no calibration token, or zeros only: rounded to the nearest"


@dataclass(frozen=True)
class Rounding:
    """How a stage finds integers."""

    rounder: QuantizerName
    gauge: Gauge
    order: bool
    damp: float
    branch: Kind = "qera"
    """How the product beside integers is found, where there is one."""

    @classmethod
    def of(cls, matrix: Matrix, recipe: Recipe) -> "Rounding | None":
        """Return how a matrix is rounded; None if it is not."""
        if matrix.rounded is None:
            return None
        options = recipe.works[matrix.rounded]
        if isinstance(options, Quantize):
            kind = Branch() if options.branch is None else options.branch
            rounder: QuantizerName = "rtn" if options.method == "rtn" else "gptq"
            return cls(rounder, options.gauge, options.order, options.damp, kind.method)
        assert isinstance(options, Mixed)
        return cls(options.rounder, options.gauge, options.order, DAMP)


@dataclass(frozen=True)
class Integers:
    """Tensors of the file, by their names within the module, and what had to be decided."""

    tensors: dict[str, Tensor]
    fallback: str | None = None


def round_parts(
    matrix: Matrix,
    W: Tensor,
    tensors: dict[str, Tensor],
    H: Tensor | None,
    how: Rounding,
    *,
    dtype: torch.dtype,
    seed: int,
    G: Tensor | None = None,
) -> Integers:
    """Make integers of what a form has encoded, so that its product stays closest to a weight.

    Parameters
    ----------
    matrix : Matrix
        With form and scheme.
    W : Tensor, shape [d_out, d_in]
        What the parts stand for, as it was before it was decomposed.
    tensors : dict of str to Tensor
        As `Form.encode` returns them, unrounded; those of ``integers`` are none.
    H : Tensor, shape [d_in, d_in], optional
        Second moment of the inputs.
    dtype : torch.dtype
        Of the scales.
    G : Tensor, shape [d_out, d_out], optional
        Second moment of the output gradients, if the parts were found under it. It says how errors
        of several rows add up, which matters where rows share a factor.
    """
    assert matrix.scheme is not None
    scheme = Scheme.read(matrix.scheme)
    if matrix.form == "group_sparse":
        assert matrix.sizes is not None
        groups = matrix.sizes["groups"]
        kept = quantize_blocks(
            W, H, groups, scheme, dtype=dtype, damp=how.damp, act_order=how.order
        )
        return Integers(kept.encode(), kept.fallback)
    if matrix.form in WHOLE:
        return _whole(matrix, W, H, scheme, how, dtype)
    known = _KNOWN.get(matrix.form)
    if H is None or known is None:
        nearest = _nearest(tensors, scheme, dtype)
        return Integers(nearest, NO_INPUT if H is None and how.rounder != "rtn" else None)
    return known(_Weight(W, H, G, scheme, how, dtype, seed), tensors)


@dataclass(frozen=True)
class _Weight:
    """A weight whose parts are rounded one after the other, and how."""

    W: Tensor
    """[d_out, d_in]"""
    H: Tensor
    """[d_in, d_in]"""
    G: Tensor | None
    """[d_out, d_out]"""
    scheme: Scheme
    how: Rounding
    dtype: torch.dtype
    seed: int


def _whole(
    matrix: Matrix,
    W: Tensor,
    H: Tensor | None,
    scheme: Scheme,
    how: Rounding,
    dtype: torch.dtype,
) -> Integers:
    """Round a whole weight, and find the product that mends most of it, if one is planned."""
    found = quantize_matrix(
        W, H, scheme, quantizer=how.rounder, dtype=dtype, damp=how.damp, act_order=how.order
    )
    tensors = {"weight": sentinel(W), **found.encode("weight")}
    if matrix.sizes:
        metric = torch.eye(W.shape[1], dtype=torch.float64, device=W.device) if H is None else H
        L, R = low_rank_correction(
            W.double() - found.weight(), metric, matrix.sizes["rank"], how.branch
        )
        tensors |= {"a.weight": R.to(dtype), "b.weight": L.to(dtype)}
        if not all(
            bool(torch.isfinite(t).all()) for t in (tensors["a.weight"], tensors["b.weight"])
        ):
            raise ScaleOverflow(f"the product beside the integers overflows {dtype}")
    note = NO_INPUT if H is None and (how.rounder != "rtn" or matrix.sizes) else None
    return Integers(tensors, note or found.fallback)


def _pair(of: _Weight, tensors: dict[str, Tensor]) -> Integers:
    B, A = tensors.pop("b.weight"), tensors.pop("a.weight")
    found = quantize_low_rank(
        of.W,
        B,
        A,
        of.H,
        of.scheme,
        quantizer=of.how.rounder,
        balance=of.how.gauge,
        dtype=of.dtype,
        seed=of.seed,
        G=of.G,
    )
    return Integers({**found.a.encode("a.weight"), **found.b.encode("b.weight"), **tensors})


def _pivot(of: _Weight, tensors: dict[str, Tensor]) -> Integers:
    R, order = tensors.pop("a.weight"), tensors["order"].long()
    C = tensors.pop("c.weight", R.new_zeros(0, len(R)))  # none where every row is a pivot
    how = of.how
    found = quantize_pivoted(
        of.W, R, C, order, of.H, of.scheme, quantizer=how.rounder, dtype=of.dtype, G=of.G
    )
    coefficients = {} if found.c is None else found.c.encode("c.weight")
    return Integers({**found.a.encode("a.weight"), **coefficients, **tensors})


def _entries(of: _Weight, tensors: dict[str, Tensor]) -> Integers:
    values, packed = tensors.pop("values"), tensors["mask"]
    d_in = of.W.shape[1]
    if of.how.rounder == "rtn":
        codes, scale = quantize_values(values, of.scheme, dtype=of.dtype)
    else:
        W_hat, mask = spread(values, packed, d_in), unpack_bits(packed, d_in)
        codes, scale = quantize_sparse_values(of.W, W_hat, mask, of.H, of.scheme, dtype=of.dtype)
    return Integers({**encode_values("values", codes, scale, of.scheme), **tensors})


_KNOWN: dict[str, Callable[[_Weight, dict[str, Tensor]], Integers]] = {
    "low_rank": _pair,
    "pivoted_low_rank": _pivot,
    "sparse": _entries,
}
"""Forms whose parts are rounded one after the other; of others each part alone."""


def _nearest(tensors: dict[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    """Round every matrix and all values to the nearest, each alone."""
    rounded: dict[str, Tensor] = {}
    for leaf, tensor in tensors.items():
        if leaf.endswith(".weight"):
            rounded |= round_to_nearest(tensor, scheme, dtype=dtype).encode(leaf)
        elif leaf == "values":
            codes, scale = quantize_values(tensor.flatten(), scheme, dtype=dtype)
            rounded |= encode_values(leaf, codes, scale, scheme)
        else:
            rounded[leaf] = tensor
    return rounded
