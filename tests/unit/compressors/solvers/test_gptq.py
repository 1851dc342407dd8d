"""GPTQ against optimal brain quantization written out, and what it promises."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.solvers import coordinate_descent as coordinate_descent_module
from lrc.compressors.solvers import quantization_grid
from lrc.compressors.solvers.coordinate_descent import coordinate_descent
from lrc.compressors.solvers.gptq import factor_inverse_hessian, gptq, propagate_error, shrunk
from lrc.compressors.solvers.linalg import damped, weighted_error
from lrc.compressors.solvers.moments import token_weights
from lrc.compressors.solvers.quantization_grid import Grid, find_grid
from lrc.compressors.solvers.quantized_matrix import QuantizedMatrix, round_to_nearest, row_errors

SCHEMES = ["int4-g8", "int3", "int4-g8-asymmetric", "int8", "int2-g16"]


def error(W: Tensor, rounded: QuantizedMatrix, H: Tensor) -> float:
    return weighted_error(W, rounded.weight(), H)


def obq(W: Tensor, H: Tensor, grid: Grid, scheme: QuantizationArgs, order: list[int]) -> Tensor:
    """Round one number after the other, with the inverse of what is left updated explicitly."""
    scale, zero = grid.expand(W.shape[1])
    codes = torch.zeros(W.shape, dtype=torch.int8)
    for row in range(len(W)):
        w, inverse = W[row].clone(), torch.linalg.inv(H)
        for j in order:
            offset = 0.0 if zero is None else float(zero[row, j])
            step = float(scale[row, j])
            code = min(max(round(float(w[j]) / step) + offset, scheme.lowest), scheme.highest)
            codes[row, j] = int(code)
            w = w - (w[j] - (code - offset) * step) / inverse[j, j] * inverse[:, j]
            # Removes row and column j of H from its inverse (Sherman-Morrison).
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("written", SCHEMES)
@pytest.mark.parametrize("ordered", [False, True])
def test_feedback_is_optimal_brain_quantization_column_by_column(matrices, written, ordered):
    W, H = matrices(columns=80)  # more than a block
    scheme = QuantizationArgs.parse(written)
    grid = find_grid(W, scheme, dtype=torch.bfloat16)
    solution = factor_inverse_hessian(H, 0.01, act_order=ordered)
    order = H.diagonal().argsort(descending=True) if ordered else torch.arange(80)
    assert torch.equal(solution.order, order)
    found = propagate_error(W, solution, *grid.expand(80), scheme)
    assert torch.equal(found, obq(W, damped(H, 0.01), grid, scheme, order.tolist()))


def test_grids_are_weighed_by_what_no_feedback_can_make_up_for(matrices):
    _, H = matrices()
    least = 1 / torch.linalg.inv(damped(H, 0.01)).diagonal()
    torch.testing.assert_close(factor_inverse_hessian(H, 0.01).weights, least)


@pytest.mark.parametrize("written", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_no_row_loses_more_than_by_rounding_to_nearest(matrices, written, seed):
    W, H = matrices(columns=48, seed=seed)
    scheme = QuantizationArgs.parse(written)
    found = gptq(W, H, scheme, dtype=torch.bfloat16)
    nearest = round_to_nearest(W, scheme, dtype=torch.bfloat16, H=H)
    assert bool((row_errors(W - found.weight(), H) <= row_errors(W - nearest.weight(), H)).all())
    assert error(W, found, H) < 0.9 * error(W, nearest, H)


@pytest.mark.parametrize("written", SCHEMES)
def test_descent_never_raises_the_error(matrices, written):
    W, H = matrices(columns=80)
    state = round_to_nearest(W, QuantizationArgs.parse(written), dtype=torch.bfloat16, H=H)
    for _ in range(3):
        lower = coordinate_descent(W, H, state, damp=0.0, passes=1)
        assert error(W, lower, H) < error(W, state, H)
        state = lower


@pytest.mark.parametrize("written", SCHEMES)
def test_descent_ends_where_no_single_code_can_be_better(matrices, written):
    W, H = matrices(rows=3, columns=16)
    scheme = QuantizationArgs.parse(written)
    state = coordinate_descent(
        W, H, round_to_nearest(W, scheme, dtype=torch.float32, H=H), damp=0.0, passes=100
    )
    least = row_errors(W - state.weight(), H)
    for column in range(16):
        for move in (-1, 1):
            codes = state.codes.clone()
            codes[:, column] = (codes[:, column] + move).clamp(scheme.lowest, scheme.highest)
            other = QuantizedMatrix(codes, state.scale, state.zero, scheme)
            assert bool((row_errors(W - other.weight(), H) >= least * (1 - 1e-9)).all())


@pytest.mark.parametrize("written", ["int4-g8", "int3", "int4-g8-asymmetric"])
def test_results_do_not_depend_on_the_sizes_of_blocks(matrices, written, monkeypatch):
    W, H = matrices(columns=80)
    scheme = QuantizationArgs.parse(written)
    whole = gptq(W, H, scheme, dtype=torch.bfloat16)
    monkeypatch.setattr(coordinate_descent_module, "BLOCK", 24)
    monkeypatch.setattr(quantization_grid, "NUMBERS", {"cpu": 5 * 80})
    parts = gptq(W, H, scheme, dtype=torch.bfloat16)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scale, whole.scale)
    assert whole.zero is None or torch.equal(parts.zero, whole.zero)


def test_with_independent_inputs_it_rounds_to_nearest(matrices):
    W, H = matrices()
    H = torch.diag(H.diagonal())
    scheme = QuantizationArgs.parse("int4-g8")
    found = gptq(W, H, scheme, dtype=torch.float32, damp=1e-6, passes=0)
    nearest = round_to_nearest(W, scheme, dtype=torch.float32, H=H)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.scale, nearest.scale)


@pytest.mark.parametrize("written", ["int4-g8", "int4-g8-asymmetric", "int8", "int2-g16"])
def test_a_matrix_on_a_grid_that_it_fills_comes_back(matrices, written):
    scheme = QuantizationArgs.parse(written)
    _, H = matrices()
    generator = torch.Generator().manual_seed(0)
    shape = 12, scheme.groups(32)
    codes = torch.randint(
        scheme.lowest, scheme.highest + 1, (*shape, 32 // shape[1]), generator=generator
    )
    codes[:, :, 0], codes[:, :, 1] = scheme.lowest, scheme.highest
    scale = torch.rand(shape, generator=generator).add(0.1).to(torch.bfloat16)
    zero = None if scheme.symmetric else torch.ones(shape, dtype=torch.int8)
    held = QuantizedMatrix(codes.view(12, 32).to(torch.int8), scale, zero, scheme)
    for again in (
        round_to_nearest(held.weight(), scheme, dtype=torch.bfloat16),
        gptq(held.weight(), H, scheme, dtype=torch.bfloat16),
    ):
        assert torch.equal(again.codes, held.codes)
        assert torch.equal(again.scale, held.scale)


def test_the_same_twice_and_inputs_left_alone(matrices):
    W, H = matrices()
    before = W.clone(), H.clone()
    scheme = QuantizationArgs.parse("int3-g8-asymmetric")
    first, second = (gptq(W, H, scheme, dtype=torch.bfloat16) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


def test_channels_that_are_never_on_are_rounded_to_nearest(matrices):
    W, H = matrices()
    H[5] = H[:, 5] = 0
    for damp in (0.0, 0.01):
        found = gptq(W, H, QuantizationArgs.parse("int8"), dtype=torch.float32, damp=damp)
        step = found.scale.abs().double().squeeze(1)
        assert bool(((found.weight() - W)[:, 5].abs() <= 0.51 * step).all())


@pytest.mark.parametrize("shrinkage", [0.0, 0.05, 1.0])
def test_a_shrunk_moment_keeps_its_diagonal_and_the_scales_of_channels(matrices, shrinkage):
    _, H = matrices()
    found = shrunk(H, shrinkage)
    assert torch.equal(found.diagonal(), H.diagonal())
    assert torch.equal(shrunk(H, 0.0), H)
    assert torch.equal(shrunk(H, 1.0), H.diagonal().diag())
    assert float(torch.linalg.eigvalsh(found)[0]) > 0
    scale = torch.logspace(-2, 2, len(H), dtype=torch.float64)
    scaled = scale[:, None] * H * scale
    torch.testing.assert_close(shrunk(scaled, shrinkage), scale[:, None] * found * scale)


def test_a_moment_of_few_tokens_becomes_definite_by_shrinking():
    X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H = X.T @ X
    assert float(torch.linalg.eigvalsh(H)[0]) < 1e-10
    assert float(torch.linalg.eigvalsh(shrunk(H, 0.05))[0]) > 0.04 * float(H.diagonal().min())


@pytest.mark.parametrize("seed", range(3))
def test_shrinking_helps_on_other_text_than_that_of_the_calibration(seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    common, W = normal(32, 32), normal(48, 32)
    text = normal(48, 32) @ (common + normal(32, 32))
    other = normal(2000, 32) @ (common + normal(32, 32))
    scheme = QuantizationArgs.parse("int4-g16")
    nearest = error(W, round_to_nearest(W, scheme, dtype=torch.float32), other.T @ other)

    def relative(**options: float) -> float:
        found = gptq(W, text.T @ text, scheme, dtype=torch.float32, **options)
        return error(W, found, other.T @ other) / nearest

    assert relative(shrinkage=0.0) > 1.5  # it overfits
    assert relative() < 0.85 * relative(shrinkage=0.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("written", ["int4-g8", "int3-g16"])
def test_massive_tokens_do_not_make_it_worse_than_rounding_to_nearest(written, seed):
    """On other text, whose massive tokens differ; without the cap it is worse."""
    generator = torch.Generator().manual_seed(seed)
    d, window = 32, 64

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mixing, W = normal(d, d), normal(48, d)
    text, other = normal(32 * window, d) @ mixing, normal(32 * window, d) @ mixing
    text[::window] = 1000 * normal(32, d)
    scheme = QuantizationArgs.parse(written)
    nearest = error(W, round_to_nearest(W, scheme, dtype=torch.float32), other.T @ other)

    def relative(x: Tensor) -> float:
        return error(W, gptq(W, x.T @ x, scheme, dtype=torch.float32), other.T @ other) / nearest

    assert relative(text) > 1.3
    assert relative(token_weights(text, window).sqrt() * text) < 0.7


def test_damping_that_had_to_be_raised_is_said(matrices):
    W, H = matrices()
    H[5] = H[:, 5] = 0
    found = gptq(W, H, QuantizationArgs.parse("int8"), dtype=torch.float32, damp=0.0)
    assert found.fallback is not None
    assert "damping raised" in found.fallback


def test_inputs_that_were_all_zero_are_said(matrices):
    W, H = matrices()
    scheme = QuantizationArgs.parse("int4")
    found = gptq(W, 0 * H, scheme, dtype=torch.bfloat16)
    assert torch.equal(found.codes, round_to_nearest(W, scheme, dtype=torch.bfloat16).codes)
    assert found.fallback is not None
    assert "all zero" in found.fallback


def test_bad_input_is_rejected(matrices):
    W, H = matrices()
    scheme = QuantizationArgs.parse("int4")
    with pytest.raises(ValueError, match=r"must be \[32, 32\], got \[31, 31\]"):
        gptq(W, H[:31, :31], scheme, dtype=torch.bfloat16)
    H[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"second moment .* infinities or NaN"):
        gptq(W, H, scheme, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("written", SCHEMES)
def test_on_a_gpu_it_is_as_good(matrices, written):
    W, H = matrices(rows=64, columns=400)
    scheme = QuantizationArgs.parse(written)
    here = gptq(W, H, scheme, dtype=torch.bfloat16)
    there = gptq(W.cuda(), H.cuda(), scheme, dtype=torch.bfloat16)
    assert there.codes.is_cuda
    ratio = weighted_error(W.cuda(), there.weight(), H.cuda()) / error(W, here, H)
    assert 0.98 < ratio < 1.02
