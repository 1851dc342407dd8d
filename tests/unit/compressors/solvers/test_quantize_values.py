"""Values without rows: groups of their own, and feedback within the mask of a sparse weight."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.layers.packing import encode_values, read_values
from lrc.compressors.solvers.linalg import weighted_error
from lrc.compressors.solvers.quantize_values import quantize_sparse_values, quantize_values
from lrc.compressors.solvers.quantized_matrix import round_to_nearest

BF16 = torch.bfloat16


def pruned(W: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the larger half of the entries, with the values that are best for each row."""
    mask = W.abs() > W.abs().median()
    W_hat = torch.zeros_like(W)
    for row, kept in enumerate(mask):
        W_hat[row, kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ W[row])
    return W_hat, mask


def spread(codes: Tensor, scale: Tensor, mask: Tensor, width: int) -> Tensor:
    each = scale.double().repeat_interleave(width)[: len(codes)]
    return torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, codes * each)


@pytest.mark.parametrize("count", [1, 7, 8, 129, 300])
@pytest.mark.parametrize("written", ["int4-g8", "int4", "int3-g64", "int8-g8-asymmetric"])
def test_values_are_read_as_they_were_rounded(count, written):
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    scheme = QuantizationArgs.parse(written)
    codes, scale = quantize_values(values, scheme, dtype=torch.float32)
    tensors = encode_values("values", codes, scale, scheme)
    specs = scheme.values_specs("values", [count])
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        name: spec.shape for name, spec in specs.items()
    }
    found = read_values(tensors["values_packed"], tensors["values_scale"], count, scheme)
    step = scale.abs().repeat_interleave(scheme.group_size or 128)[:count]
    assert float(((found - values).abs() / step).median()) <= 0.5


def test_full_groups_are_rounded_as_rows_are():
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    scheme = QuantizationArgs.parse("int3-g16")
    codes, scale = quantize_values(values, scheme, dtype=BF16)
    rows = round_to_nearest(values[None], scheme, dtype=BF16)
    assert torch.equal(codes, rows.codes[0])
    assert torch.equal(scale, rows.scale[0])


@pytest.mark.parametrize("written", ["int4-g8", "int3-g16", "int2", "int8-g64"])
def test_feedback_within_the_mask_beats_rounding_to_nearest(matrices, written):
    W, H = matrices(rows=20, columns=80)
    W_hat, mask = pruned(W, H)
    scheme = QuantizationArgs.parse(written)
    width = scheme.group_size or 128
    codes, scale = quantize_sparse_values(W, W_hat, mask, H, scheme, dtype=BF16)
    nearest = quantize_values(W_hat[mask], scheme, dtype=BF16)
    assert codes.dtype == torch.int8
    assert scheme.lowest <= int(codes.min()) <= int(codes.max()) <= scheme.highest
    lost = weighted_error(W, spread(codes, scale, mask, width), H)
    assert lost < weighted_error(W, spread(*nearest, mask, width), H)


def test_a_mask_that_keeps_all_is_a_matrix(matrices):
    W, H = matrices()
    mask = torch.ones_like(W, dtype=torch.bool)
    scheme = QuantizationArgs.parse("int4-g8")
    codes, scale = quantize_sparse_values(W, W, mask, H, scheme, dtype=BF16)
    nearest = round_to_nearest(W, scheme, dtype=BF16, H=H).weight()
    found = spread(codes, scale, mask, 8)
    assert weighted_error(W, found, H) < weighted_error(W, nearest, H)


def test_an_empty_row_and_inputs_that_are_all_zero(matrices):
    W, H = matrices()
    W_hat, mask = pruned(W, H)
    W_hat[3], mask[3] = 0, False
    codes, _ = quantize_sparse_values(W, W_hat, mask, H, QuantizationArgs.parse("int4"), dtype=BF16)
    assert len(codes) == int(mask.sum())
    codes, scale = quantize_sparse_values(
        W, W_hat, mask, 0 * H, QuantizationArgs.parse("int4"), dtype=BF16
    )
    assert torch.equal(
        codes, quantize_values(W_hat[mask], QuantizationArgs.parse("int4"), dtype=BF16)[0]
    )
    assert bool(torch.isfinite(scale).all())


def test_numbers_that_are_not_finite_are_rejected():
    with pytest.raises(ValueError, match=r"the values \[2\] holds infinities or NaN"):
        quantize_values(torch.tensor([1.0, torch.nan]), QuantizationArgs.parse("int4"), dtype=BF16)
