"""Quantize the components of one weight so that their sum stays closest to it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.compress.group import WeightGroup
from lrc.compressors.io.finite import all_finite
from lrc.compressors.layers import BlockSparse, QuantizationArgs, WeightConfig
from lrc.compressors.layers.bitmask import scatter_values, unpack_bits
from lrc.compressors.layers.packing import encode_matrix, encode_values
from lrc.compressors.methods.group_statistics import few_tokens
from lrc.compressors.planning.tasks import QuantizationTask
from lrc.compressors.solvers.gptq import quantize_matrix
from lrc.compressors.solvers.low_rank_correction import low_rank_correction
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.compressors.solvers.quantize_blocks import quantize_blocks
from lrc.compressors.solvers.quantize_factors import quantize_low_rank, quantize_pivoted
from lrc.compressors.solvers.quantize_values import quantize_sparse_values, quantize_values
from lrc.compressors.solvers.quantized_matrix import QuantizedMatrix, round_to_nearest


@dataclass(frozen=True)
class QuantizedParts:
    """Tensors of every component by their names within it."""

    tensors: list[dict[str, Tensor]]
    fallback: str | None = None


def quantize_whole(
    group: WeightGroup, member: int, config: WeightConfig, solved: QuantizedMatrix | None = None
) -> QuantizedParts:
    """Quantize a weight that is not decomposed, with a low-rank correction if planned.

    `solved` is its quantized matrix, if that is known.

    Raises
    ------
    ScaleOverflow
        If scales or correction overflow the dtype of the file.
    """
    W, H, dtype = group.weights[member], group.input_moment(member), group.dtype
    how = _quantizer(group)
    args, first = config.quantization, config.components[0]
    assert args is not None
    if first.type == "block_sparse":
        kept = quantize_blocks(
            W, H, first.sizes["groups"], args, dtype=dtype, damp=how.damp, act_order=how.act_order
        )
        encoded = BlockSparse.encode(codes=kept.codes, scale=kept.scale, mask=kept.mask, args=args)
        return QuantizedParts([encoded], kept.fallback)
    found = solved or quantize_matrix(
        W, H, args, quantizer=how.quantizer, dtype=dtype, damp=how.damp, act_order=how.act_order
    )
    parts = [encode_matrix("weight", found.codes, found.scale, found.zero, args)]
    if len(config.components) > 1:
        assert how.correction is not None
        metric = (torch.eye(W.shape[1], device=W.device) if H is None else H).double()
        error, rank = W.double() - found.weight(), config.components[1].sizes["rank"]
        B, A = low_rank_correction(error, metric, rank, how.correction)
        factors = {"a.weight": A.to(dtype), "b.weight": B.to(dtype)}
        if not all(all_finite(t) for t in factors.values()):
            raise ScaleOverflow(f"the low-rank correction overflows {dtype}")
        parts.append(factors)
    needs_inputs = how.quantizer != "rtn" or len(parts) > 1
    fallback = _nearest_because(group, member) if H is None and needs_inputs else found.fallback
    return QuantizedParts(parts, fallback)


def quantize_parts(
    group: WeightGroup, member: int, config: WeightConfig, encoded: list[dict[str, Tensor]]
) -> QuantizedParts:
    """Quantize encoded components.

    Parameters
    ----------
    member : int
        Index of the weight in the group.
    config : WeightConfig
        Of that weight, with quantization parameters.
    encoded : list of dict
        The tensors of every component, unquantized.

    Raises
    ------
    ScaleOverflow
        If a scale overflows the dtype of the file.
    """
    args = config.quantization
    assert args is not None
    H, how = group.input_moment(member), _quantizer(group)
    joint = JOINT_QUANTIZERS.get(config.types)
    if H is None or joint is None or config.shares is not None or len(group.weights) > 1:
        nearest = [nearest_parts(part, args, group.dtype) for part in encoded]
        used = H is not None or how.quantizer == "rtn"
        return QuantizedParts(nearest, None if used else _nearest_because(group, member))
    G = group.gradient_moment(member) if config.types in USES_GRADIENTS else None
    target = _Target(group.weights[member], H.double(), G, args, how, group.dtype, group.seed)
    return QuantizedParts([joint(target, dict(encoded[0]))])


def _nearest_because(group: WeightGroup, member: int) -> str:
    known = group.statistics[member]
    zeros = known.inputs is not None and known.inputs.empty
    reason = "saw zeros only" if zeros else few_tokens(known.n_tokens)
    return f"{reason}: rounded to nearest"


def _quantizer(group: WeightGroup) -> QuantizationTask:
    assert group.task.quantize is not None
    return group.task.quantize


@dataclass(frozen=True)
class _Target:
    """The weight that quantized components approximate, and how."""

    W: Tensor
    """[d_out, d_in]"""
    H: Tensor
    """Second moment of the inputs [d_in, d_in]."""
    G: Tensor | None
    """Moment of the output gradients: how errors of rows with a common factor add up."""
    args: QuantizationArgs
    how: QuantizationTask
    dtype: torch.dtype
    seed: int

    @property
    def options(self) -> dict[str, Any]:
        """Options of the quantization of two factors."""
        return {"quantizer": self.how.quantizer, "dtype": self.dtype, "G": self.G}


def _low_rank(of: _Target, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    B, A = tensors["b.weight"], tensors["a.weight"]
    balance, seed = of.how.balance, of.seed
    found = quantize_low_rank(of.W, B, A, of.H, of.args, balance=balance, seed=seed, **of.options)
    return {**found.a.encode("a.weight"), **found.b.encode("b.weight")}


def _pivoted(of: _Target, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    R, order = tensors["a.weight"], tensors["order"]
    C = tensors.get("c.weight", R.new_zeros(0, len(R)))  # absent if every row is a pivot row
    found = quantize_pivoted(of.W, R, C, order.long(), of.H, of.args, **of.options)
    coefficients = {} if found.c is None else found.c.encode("c.weight")
    return {**found.a.encode("a.weight"), **coefficients, "order": order}


def _sparse(of: _Target, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    values, packed, d_in = tensors["values"], tensors["mask"], of.W.shape[1]
    if of.how.quantizer == "rtn":
        codes, scale = quantize_values(values.flatten(), of.args, dtype=of.dtype)
    else:
        W_hat, mask = scatter_values(values, packed, d_in), unpack_bits(packed, d_in)
        codes, scale = quantize_sparse_values(of.W, W_hat, mask, of.H, of.args, dtype=of.dtype)
    return {**encode_values("values", codes, scale, of.args), "mask": packed}


JOINT_QUANTIZERS: dict[str, Callable[[_Target, dict[str, Tensor]], dict[str, Tensor]]] = {
    "low_rank": _low_rank,
    "pivoted_low_rank": _pivoted,
    "sparse": _sparse,
    "semi_structured": _sparse,
}
"""Components whose tensors are quantized one after the other, each correcting the previous ones;
those of other types are rounded to nearest separately."""
USES_GRADIENTS = ("low_rank", "pivoted_low_rank")


def nearest_parts(
    tensors: dict[str, Tensor], args: QuantizationArgs, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Round every matrix and all values of a component to nearest."""
    quantized: dict[str, Tensor] = {}
    for leaf, tensor in tensors.items():
        if leaf.endswith(".weight"):
            quantized |= round_to_nearest(tensor, args, dtype=dtype).encode(leaf)
        elif leaf == "values":
            codes, scale = quantize_values(tensor.flatten(), args, dtype=dtype)
            quantized |= encode_values(leaf, codes, scale, args)
        else:
            quantized[leaf] = tensor
    return quantized
