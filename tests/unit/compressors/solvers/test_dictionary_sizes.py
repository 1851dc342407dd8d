"""Dictionaries of several sizes: one problem for all of them, and the sizes of a ratio."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lrc.compressors.layers import COMPONENTS, ComponentConfig, Sizes, WeightConfig, sentinel
from lrc.compressors.methods.table import METHODS
from lrc.compressors.solvers.dictionary_learning import SOLVERS, DictionaryProblem
from lrc.compressors.solvers.linalg import damped, weighted_error
from lrc.compressors.solvers.moments import Moment, Statistics

DICTIONARY = COMPONENTS["dictionary"]
DAMPING = {"damp": 1e-6, "gradient_damp": 0.1}
SHAPES = [(24, 40), (40, 24)]
FALLING = [{"atoms": 20, "nonzeros": 12}, {"atoms": 20, "nonzeros": 8}, {"atoms": 9, "nonzeros": 3}]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(d: int, seed: int) -> Moment:
    X = normal(200, d, seed=seed) @ (torch.eye(d) + 0.3 * normal(d, d, seed=seed + 1))
    return Moment.of(X.T @ X)


def stored_bits(shape: tuple[int, int], sizes: Sizes) -> int:
    return WeightConfig(shape, (ComponentConfig("dictionary", sizes),)).stored_bits(16)


def gradients_of(solver: str, d_out: int) -> Moment | None:
    return moment(d_out, 3) if SOLVERS[solver].gradients else None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_problem_gives_the_same_solution_however_often_it_is_solved(
    solver: str, shape: tuple[int, int]
) -> None:
    W, H, G = normal(*shape), moment(shape[1], 1), gradients_of(solver, shape[0])
    damping = {"damp": 1e-3, "gradient_damp": 0.1}
    problem = DictionaryProblem.of(W, H, G, solver=solver, **damping)
    for sizes in [*FALLING, FALLING[0]]:  # and what came before leaves no trace
        search = {**sizes, "seed": 3, "rounds": 1 if solver == "rocket" else 3}
        alone = DictionaryProblem.of(W, H, G, solver=solver, **damping).solve(**search)
        found = problem.solve(**search)
        for name in ("D", "S", "mask"):
            assert torch.equal(getattr(found, name), getattr(alone, name)), name
        assert (found.energy, found.relative_error, found.errors, found.fallback) == (
            alone.energy, alone.relative_error, alone.errors, alone.fallback
        )  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_curve_starts_again_with_every_larger_dictionary(solver: str) -> None:
    W, H = normal(40, 24), moment(24, 1)
    problem = DictionaryProblem.of(W, H, solver=solver)
    growing = [{"atoms": 8, "nonzeros": 4}, {"atoms": 12, "nonzeros": 4}]
    rounds = 1 if solver == "rocket" else 3
    for found, sizes in zip(problem.curve(growing, rounds=rounds), growing, strict=True):
        assert torch.equal(found.D, problem.solve(**sizes, rounds=rounds).D)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solutions_of_a_curve_have_their_sizes_and_the_reported_error(
    solver: str, shape: tuple[int, int]
) -> None:
    W, H = normal(*shape), moment(shape[1], 1)
    problem = DictionaryProblem.of(W, H, solver=solver)
    curve = problem.curve(FALLING, rounds=1 if solver == "rocket" else 4)
    energies = []
    for found, sizes in zip(curve, FALLING, strict=True):
        assert found.D.shape == (shape[1], sizes["atoms"])
        assert (found.mask.sum(dim=0) == sizes["nonzeros"]).all()
        assert not found.S[~found.mask].any()
        assert found.energy == pytest.approx(weighted_error(W, found.weight(), H.full), rel=1e-8)
        energies.append(found.energy)
    assert energies == sorted(energies)


def test_few_rounds_from_a_larger_dictionary_come_close_to_many_from_scratch() -> None:
    problem = DictionaryProblem.of(normal(200, 48), moment(48, 1))
    sizes = [{"atoms": min(48, 3 * n), "nonzeros": n} for n in (20, 16, 12, 10, 8)]
    warm = list(problem.curve(sizes, rounds=6))
    for found, each in zip(warm[1:], sizes[1:], strict=True):
        assert found.energy < 1.35 * problem.solve(**each, rounds=15).energy  # measured 1.23
        assert not torch.equal(found.D, problem.solve(**each, rounds=6).D)


def test_a_size_that_does_not_fit_is_rejected_on_a_curve_too() -> None:
    problem = DictionaryProblem.of(normal(40, 24), solver="compot")
    with pytest.raises(ValueError, match=r"atoms must be in \[1, 24\] with compot"):
        list(problem.curve([{"atoms": 25, "nonzeros": 4}]))
    with pytest.raises(ValueError, match="solver must be one of cospadi, compot, rocket, htp, got"):
        DictionaryProblem.of(normal(40, 24), solver="magic")


@pytest.mark.parametrize("ratio", [1.0, 1.15, 1.5, 2.0, 2.5, 3.0, 7.3, 1e9])
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_hold_their_ratio_up_to_a_complete_basis(
    shape: tuple[int, int], ratio: float
) -> None:
    steps = range(1, DICTIONARY.largest_step(*shape) + 1)
    sizes = [DICTIONARY.sizes_at(step, *shape, ratio=ratio) for step in steps]
    for step, each in zip(steps, sizes, strict=True):
        assert each["nonzeros"] == step <= each["atoms"] <= min(shape)
        if each["atoms"] < min(shape):
            assert abs(each["atoms"] - ratio * step) <= 0.5
    bits = [stored_bits(shape, each) for each in sizes]
    assert all(low < high for low, high in pairwise(bits))  # what a bisection needs


@pytest.mark.parametrize("ratio", [1.0, 1.5, 3.0, 12.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_counted_bits_are_those_that_are_stored(shape: tuple[int, int], ratio: float) -> None:
    W, known = normal(*shape), Statistics(200, moment(shape[1], 1), moment(shape[0], 3))
    sizes = DICTIONARY.sizes_at(7, *shape, ratio=ratio)
    (parts,) = METHODS["dictionary"].solve(W, known, sizes, **DAMPING, rounds=2).parts
    tensors = {"weight": sentinel(), **DICTIONARY.encode(**parts)}
    stored = sum(t.numel() * (16 if t.is_floating_point() else 8 * t.element_size())
                 for t in tensors.values())  # fmt: skip
    assert stored == stored_bits(shape, sizes)


def test_the_energy_of_a_curve_is_that_of_both_metrics() -> None:
    W, known = normal(40, 24), Statistics(200, moment(24, 1), moment(40, 3))
    method, sizes = METHODS["rocket"], DICTIONARY.sizes_at(6, 40, 24, ratio=3.0)
    (error,), total = method.squared_errors(W, known, [sizes], **DAMPING)
    found = method.solve(W, known, sizes, **DAMPING)
    H, G = damped(known.inputs.whole(), 1e-6), damped(known.gradients.whole(), 0.1)
    assert error == found.squared_error
    assert total == pytest.approx(weighted_error(W, 0 * W, H, G), rel=1e-10)


def test_random_choices_are_those_of_the_seed() -> None:
    W, known = normal(40, 24), Statistics(200, moment(24, 1))
    method, sizes = METHODS["cospadi"], {"atoms": 8, "nonzeros": 4}
    first, again, other = (
        method.solve(W, known, sizes, damp=1e-6, rounds=1, seed=seed).parts[0]["D"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
