"""Dictionary-sparse factorisation: what every solver promises, then the fast ones."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.compressors.solvers.dictionary_learning import SOLVERS, Dictionary, DictionaryProblem
from lrc.compressors.solvers.linalg import damped, weighted_error
from lrc.compressors.solvers.masks import Pattern
from lrc.compressors.solvers.moments import Moment
from lrc.compressors.solvers.sparse_coding import (
    SparseCodingTask,
    interleaved,
    refit_codes,
    refit_dictionary,
    support,
)
from lrc.compressors.solvers.spectrum import spectrum
from lrc.compressors.solvers.thresholding import orthogonal_codes, polar_factor

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(24, 40), (40, 24), (32, 32)]
FAST = [name for name, solver in SOLVERS.items() if solver.gradients]
CASES: list[tuple[str, Pattern]] = [
    (name, pattern) for name, solver in SOLVERS.items() for pattern in solver.patterns
]


def solve_dictionary(
    W: Tensor,
    inputs: Moment | None = None,
    gradients: Moment | None = None,
    *,
    solver: str = "htp",
    damp: float = 0.0,
    gradient_damp: float = 0.0,
    **search: Any,
) -> Dictionary:
    problem = DictionaryProblem.of(
        W, inputs, gradients, solver=solver, damp=damp, gradient_damp=gradient_damp
    )
    return problem.solve(**search)


def weight(d_out: int, d_in: int, seed: int = 0) -> Tensor:
    return torch.randn(
        d_out, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def correlated(d: int, *, tokens: int = 200, seed: int = 1) -> Tensor:
    """Second moment of tokens whose channels are mixed and differ in scale by 100."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, d, generator=g, dtype=torch.float64)
    X = X @ torch.randn(d, d, generator=g, dtype=torch.float64)
    X = X * torch.logspace(-1, 1, d, dtype=torch.float64)
    return X.T @ X


def planted(
    d_in: int, atoms: int, nonzeros: int, d_out: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return a dictionary of unit atoms, orthogonal but for some noise, and sparse codes."""
    g = torch.Generator().manual_seed(seed)
    D = torch.linalg.qr(torch.randn(d_in, atoms, generator=g, dtype=torch.float64)).Q
    D = D + 0.3 * torch.randn(d_in, atoms, generator=g, dtype=torch.float64) / d_in**0.5
    mask = support(torch.rand(atoms, d_out, generator=g), nonzeros)
    S = mask * torch.randn(atoms, d_out, generator=g, dtype=torch.float64)
    return D / D.norm(dim=0), S


def cosines(D: Tensor, found: Tensor) -> Tensor:
    """Return for every atom of D the cosine with the nearest found one, whatever its sign."""
    found = found / found.norm(dim=0)
    return (D.T @ found).abs().amax(dim=1)


@pytest.mark.parametrize("solver", ["cospadi", "htp"])
def test_a_planted_dictionary_is_recovered(solver: str) -> None:
    D, S = planted(16, 8, 2, 300)
    found = solve_dictionary((D @ S).T, atoms=8, nonzeros=2, solver=solver, rounds=40)
    assert found.relative_error < 1e-12
    assert float(cosines(D, found.D).min()) > 1 - 1e-8
    torch.testing.assert_close(found.weight(), (D @ S).T, rtol=0, atol=1e-5)


def test_a_planted_dictionary_is_recovered_through_the_whitening() -> None:
    whitened, S = planted(16, 8, 2, 300)
    H = correlated(16)
    D = torch.linalg.solve(torch.linalg.cholesky(H).T, whitened)
    found = solve_dictionary((D @ S).T, Moment.of(H), atoms=8, nonzeros=2, rounds=40)
    assert found.relative_error < 1e-12
    assert float(cosines(D / D.norm(dim=0), found.D).min()) > 1 - 1e-6


@pytest.mark.parametrize(("solver", "pattern"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_output_has_exactly_its_nonzeros_and_errors_never_rise(
    solver: str, pattern: Pattern, shape: tuple[int, int]
) -> None:
    W, H = weight(*shape), correlated(shape[1])
    found = solve_dictionary(
        W, Moment.of(H), atoms=16, nonzeros=8, solver=solver, pattern=pattern, rounds=_few(solver)
    )
    assert found.D.shape == (shape[1], 16)
    assert found.S.shape == found.mask.shape == (16, shape[0])
    assert found.D.dtype == found.S.dtype == torch.float64
    assert (found.mask.sum(dim=0) == 8).all()
    assert not found.S[~found.mask].any()
    if pattern == "2:4":
        assert (found.mask.reshape(4, 4, -1).sum(dim=1) == 2).all()
    assert list(found.errors) == sorted(found.errors, reverse=True)
    assert found.errors[-1] == pytest.approx(found.energy, rel=1e-6)
    lengths = (found.D * (H @ found.D)).sum(0)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-6, atol=0)


def _few(solver: str) -> int | None:
    return None if SOLVERS[solver].rounds == 1 else 4


@pytest.mark.parametrize("solver", FAST)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sides", ["none", "inputs", "both"])
def test_energy_is_the_weighted_error_of_the_product(
    solver: str, shape: tuple[int, int], sides: str
) -> None:
    W = weight(*shape)
    H = correlated(shape[1]) if sides != "none" else None
    G = correlated(shape[0], seed=2) if sides == "both" else None
    found = solve_dictionary(
        W,
        None if H is None else Moment.of(H),
        None if G is None else Moment.of(G),
        atoms=12,
        nonzeros=5,
        solver=solver,
        damp=1e-3,
        gradient_damp=1e-2,
    )
    H_damped = None if H is None else damped(H, 1e-3)
    G_damped = None if G is None else damped(G, 1e-2).diagonal().diag()
    error = weighted_error(W, found.weight(), H_damped, G_damped)
    assert found.energy == pytest.approx(error, rel=1e-8)
    total = weighted_error(W, torch.zeros_like(W), H_damped, G_damped)
    assert found.relative_error == pytest.approx(error / total, rel=1e-8)
    assert found.fallback is None


def test_weighting_outputs_lowers_the_weighted_error() -> None:
    W, H, G = weight(60, 24), correlated(24), torch.logspace(-3, 3, 60).double().diag()
    sizes = {"atoms": 16, "nonzeros": 6}
    plain = solve_dictionary(W, Moment.of(H), **sizes)
    aware = solve_dictionary(W, Moment.of(H), Moment.of(G), **sizes)
    assert aware.energy < 0.7 * weighted_error(W, plain.weight(), H, G)  # 0.43 measured


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_with_all_atoms_in_every_output_it_is_the_best_low_rank(
    solver: str, shape: tuple[int, int]
) -> None:
    W, H = weight(*shape), correlated(shape[1])
    G = Moment.of(correlated(shape[0], seed=2).diagonal().diag())
    G = None if solver == "cospadi" else G
    found = solve_dictionary(W, Moment.of(H), G, atoms=6, nonzeros=6, solver=solver)
    best = spectrum(W, Moment.of(H), G)
    assert found.energy == pytest.approx(best.tail_energy(6), rel=1e-6)
    factors = best.truncate(6)
    distance = weighted_error(factors.B @ factors.A, found.weight(), H)
    assert distance < 1e-4 * weighted_error(W, torch.zeros_like(W), H)


@pytest.mark.parametrize("solver", ["compot", "htp"])
def test_a_sparse_code_beats_the_low_rank_of_as_many_numbers(solver: str) -> None:
    W, H = weight(160, 40), correlated(40)
    found = solve_dictionary(W, Moment.of(H), atoms=32, nonzeros=16, solver=solver)
    rank = (40 * 32 + 16 * 160) // (40 + 160)
    assert found.relative_error < spectrum(W, Moment.of(H)).tail(rank)


@pytest.mark.parametrize("solver", ["cospadi", "htp"])
def test_a_dictionary_may_be_larger_than_the_space(solver: str) -> None:
    W, H = weight(40, 12), correlated(12)
    losses = [
        solve_dictionary(
            W, Moment.of(H), atoms=atoms, nonzeros=3, solver=solver, rounds=5
        ).relative_error
        for atoms in (12, 24, 40)
    ]
    assert losses[1] < losses[0]
    assert losses[2] < losses[1]


def test_more_nonzeros_than_dimensions_leave_nothing() -> None:
    W = weight(40, 8)
    for solver, rounds in (("cospadi", 3), ("htp", None)):
        found = solve_dictionary(W, atoms=20, nonzeros=10, solver=solver, rounds=rounds)
        assert (found.mask.sum(dim=0) == 10).all()
        assert found.relative_error < 1e-10, solver


@pytest.mark.parametrize(("solver", "pattern"), CASES)
def test_same_input_gives_the_same_bits(solver: str, pattern: Pattern) -> None:
    W, H = weight(40, 24), correlated(24)
    first, second = (
        solve_dictionary(
            W, Moment.of(H), atoms=8, nonzeros=4, solver=solver, pattern=pattern,
            rounds=_few(solver),
        )
        for _ in range(2)
    )  # fmt: skip
    assert torch.equal(first.D, second.D)
    assert torch.equal(first.S, second.S)


def test_inputs_are_left_alone() -> None:
    W, H = weight(40, 24).float(), correlated(24).float()
    W_before, H_before = W.clone(), H.clone()
    for solver in SOLVERS:
        solve_dictionary(W, Moment.of(H), atoms=8, nonzeros=4, solver=solver, rounds=_few(solver))
    assert torch.equal(W, W_before)
    assert torch.equal(H, H_before)


def test_an_image_serves_where_there_are_fewer_outputs_than_inputs() -> None:
    W, H = weight(24, 40), correlated(40)
    image = Moment(H.diagonal(), image=W @ H @ W.T)
    whole, seen = (
        solve_dictionary(W, moment, atoms=12, nonzeros=6, solver="compot", damp=1e-2)
        for moment in (Moment.of(H), image)
    )
    torch.testing.assert_close(whole.weight(), seen.weight(), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="40 channels is needed, but only its image"):
        solve_dictionary(W, image, atoms=12, nonzeros=6, solver="cospadi")


def test_float32_finds_as_good_a_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = weight(96, 48), correlated(48)
    sizes = {"atoms": 32, "nonzeros": 16}
    double = solve_dictionary(W, Moment.of(H), **sizes)
    monkeypatch.setattr("lrc.compressors.solvers.dictionary_learning.SMALL", 0)
    single = solve_dictionary(W, Moment.of(H), **sizes)
    assert single.energy == pytest.approx(double.energy, rel=0.02)  # 0.000 measured
    error = weighted_error(W, single.weight(), H)
    assert single.energy == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("small", [0, 2**16])
def test_weights_of_low_rank_are_given_back(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrc.compressors.solvers.dictionary_learning.SMALL", small)
    W = weight(96, 5) @ weight(5, 48)
    for solver in FAST:
        found = solve_dictionary(
            W, Moment.of(correlated(48)), atoms=32, nonzeros=16, solver=solver, damp=1e-6
        )
        assert found.relative_error < 1e-9


def test_zero_moments_are_left_out_and_said() -> None:
    W = weight(40, 24)
    plain = solve_dictionary(W, atoms=8, nonzeros=4)
    found = solve_dictionary(
        W, Moment.of(torch.zeros(24, 24)), Moment.of(torch.zeros(40, 40)), atoms=8, nonzeros=4
    )
    assert found.fallback == (
        "inputs were all zero; left out of the metric; "
        "gradients were all zero; left out of the metric"
    )
    torch.testing.assert_close(found.weight(), plain.weight())
    faithful = solve_dictionary(
        W, None, Moment.of(torch.eye(40)), atoms=8, nonzeros=4, solver="cospadi", rounds=2
    )
    assert faithful.fallback == "cospadi does not use gradients; left out of the metric"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dead_channels_few_tokens_and_silent_outputs_are_accepted(
    solver: str, shape: tuple[int, int]
) -> None:
    W, H, G = weight(*shape), correlated(shape[1], tokens=10), torch.eye(shape[0]).double()
    H[3] = H[:, 3] = G[5] = 0
    W[7] = 0
    found = solve_dictionary(
        W, Moment.of(H), Moment.of(G), atoms=16, nonzeros=8, solver=solver, damp=1e-6,
        rounds=_few(solver),
    )  # fmt: skip
    assert torch.isfinite(found.D).all()
    assert torch.isfinite(found.S).all()
    assert (found.mask.sum(dim=0) == 8).all()
    assert not found.weight()[7].abs().max() > 1e-6


def test_a_zero_weight_is_lost_without_a_trace() -> None:
    for solver in SOLVERS:
        found = solve_dictionary(
            torch.zeros(12, 8), atoms=4, nonzeros=2, solver=solver, rounds=_few(solver)
        )
        assert found.relative_error == 0
        assert not found.weight().any()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_orthogonal_codes_are_the_best_of_all_supports(pattern: Pattern) -> None:
    D = torch.linalg.qr(weight(10, 8, seed=4)).Q
    Z = weight(10, 5, seed=5)
    S, mask = orthogonal_codes(_task(Z, 8, 4, pattern), D)
    assert (mask.sum(dim=0) == 4).all()
    allowed = [
        list(kept)
        for kept in combinations(range(8), 4)
        if pattern == "unstructured" or sum(i < 4 for i in kept) == 2
    ]
    errors = [
        (Z - D[:, kept] @ torch.linalg.lstsq(D[:, kept], Z).solution).square().sum(dim=0)
        for kept in allowed
    ]
    torch.testing.assert_close(
        (Z - D @ S).square().sum(dim=0), torch.stack(errors).amin(dim=0), rtol=1e-10, atol=0
    )


def _task(
    Z: Tensor, atoms: int, nonzeros: int, pattern: Pattern = "unstructured"
) -> SparseCodingTask:
    return SparseCodingTask(
        Z, Z.norm(dim=1), lambda which: Z[:, which], atoms, nonzeros, 1, pattern
    )


def test_the_dictionary_step_is_least_squares() -> None:
    D, S = planted(20, 12, 4, 60)
    Z = weight(60, 20).T
    refitted, scaled = refit_dictionary(Z, D, S)
    expected = torch.linalg.lstsq(S.T, Z.T).solution.T @ S
    torch.testing.assert_close(refitted @ scaled, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(refitted.norm(dim=0), torch.ones(12).double())


def test_the_dictionary_step_leaves_unused_atoms_alone() -> None:
    D, S = planted(20, 12, 4, 60)
    S[5] = 0
    refitted, scaled = refit_dictionary(weight(60, 20).T, D, S)
    torch.testing.assert_close(refitted[:, 5], D[:, 5])
    assert not scaled[5].any()


def test_enough_conjugate_gradients_are_least_squares_on_every_support() -> None:
    D, S = planted(20, 12, 4, 30)
    Z, mask = weight(30, 20).T, S != 0
    codes = refit_codes(D.T @ D, D.T @ Z, torch.zeros_like(S), mask, 12)
    for column in range(30):
        kept = mask[:, column]
        expected = torch.linalg.lstsq(D[:, kept], Z[:, column : column + 1]).solution[:, 0]
        torch.testing.assert_close(codes[kept, column], expected, rtol=1e-9, atol=1e-10)
    assert not codes[~mask].any()


def test_supports_hold_the_largest_also_among_equals() -> None:
    score = weight(5, 16).T.abs()
    score[:, 0] = 1
    for pattern, groups in (("unstructured", 1), ("2:4", 4)):
        mask = support(score, 8, pattern).reshape(groups, 16 // groups, 5)
        assert (mask.sum(dim=1) == 8 // groups).all()
        parts = score.reshape(mask.shape)
        least = torch.where(mask, parts, torch.inf).amin(dim=1)
        assert (least >= torch.where(mask, -torch.inf, parts).amax(dim=1)).all()


def test_folding_gives_every_four_atoms_one_of_each_quarter() -> None:
    order = interleaved(24)
    assert sorted(order.tolist()) == list(range(24))
    assert (order.reshape(6, 4).sort(dim=1).values // 6 == torch.arange(4)).all()


@pytest.mark.parametrize("rank", [6, 3])
def test_the_nearest_orthonormal_columns_are_the_polar_factor(
    rank: int, rounding: Callable[..., float]
) -> None:
    # Not seed 0, from which the columns that fill up a lower rank come: these would be M's own.
    left, right = weight(10, rank, seed=3), weight(rank, 6, seed=4)
    M = left @ torch.diag(torch.logspace(0, -4, rank).double()) @ right
    D = polar_factor(M)
    # The optimum is flat: what eigenvectors of M^T M are off by counts squared.
    close = rounding(10)
    torch.testing.assert_close(D.T @ D, torch.eye(6).double(), rtol=0, atol=close)
    nuclear = float(torch.linalg.svdvals(M).sum())
    assert float((D * M).sum()) == pytest.approx(nuclear, rel=close)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "magic"}, "solver must be one of cospadi, compot, rocket, htp, got 'magic'"),
        ({"atoms": 0}, r"atoms must be in \[1, 40\] with htp for a weight \[40, 24\], got 0"),
        ({"atoms": 41}, r"atoms must be in \[1, 40\] with htp .*, got 41; take fewer atoms"),
        ({"atoms": 25, "solver": "compot"}, r"atoms must be in \[1, 24\] with compot"),
        ({"nonzeros": 9}, r"nonzeros must be in \[1, 8\], the number of atoms, got 9"),
        ({"nonzeros": 0}, r"nonzeros must be in \[1, 8\]"),
        ({"pattern": "1:3"}, "must be one of unstructured, 2:4 with htp, got '1:3'; no solver"),
        ({"pattern": "2:4", "solver": "rocket"}, "got '2:4'; it is available with compot, htp"),
        ({"pattern": "2:4", "nonzeros": 3}, "got 8 atoms and 3 nonzeros; take 8 and 4"),
        ({"pattern": "2:4", "atoms": 10, "nonzeros": 5}, "take 8 and 4"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"rounds": 2, "solver": "rocket"}, "rounds must be 1 with rocket"),
    ],
)
def test_impossible_arguments_are_rejected(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_dictionary(weight(40, 24), **{"atoms": 8, "nonzeros": 4, **arguments})
