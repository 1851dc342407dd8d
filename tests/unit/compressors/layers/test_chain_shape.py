"""Factors of dimensions, bond dimensions and the work of chains of cores."""

from itertools import pairwise
from math import prod

import pytest

from lrc.compressors.layers.chain_shape import (
    ChainShape,
    balanced_factors,
    largest_bond,
    pattern_for,
)

SHAPES = [(576, 1536), (192, 576), (7, 13), (1, 9), (13, 24), (49, 11)]


def parsed(pattern: str) -> list[list[int]]:
    return [[int(n) for n in side.split("x")] for side in pattern.split(",")]


@pytest.mark.parametrize("n", [1, 2, 7, 36, 97, 576, 1536, 14336])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_factors_have_the_smallest_sum(n: int, count: int) -> None:
    def all_sums(n: int, count: int) -> list[int]:
        if count == 1:
            return [n]
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        return [d + rest for d in divisors for rest in all_sums(n // d, count - 1)]

    found = balanced_factors(n, count)
    assert (len(found), prod(found)) == (count, n)
    assert sorted(found) == list(found)
    assert sum(found) == min(all_sums(n, count))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cores", [2, 3, 4])
def test_automatic_factors_multiply_to_the_dimensions(shape: tuple[int, int], cores: int) -> None:
    sides = parsed(pattern_for(*shape, cores))
    assert [len(side) for side in sides] == [cores, cores]
    assert tuple(map(prod, sides)) == shape
    sizes = [m * n for m, n in zip(*sides, strict=True)]
    assert min(sizes[0], sizes[-1]) >= max(sizes[1:-1], default=0)  # one bond instead of two


def test_given_factors_are_used_in_their_order() -> None:
    given = [[2, 8, 36], [12, 16, 8]]
    assert pattern_for(576, 1536, 3, given) == "2x8x36,12x16x8"
    assert pattern_for(576, 576, 3, given) == "2x8x36,2x8x36"
    assert pattern_for(576, 30, 3, given) == "2x8x36,5x3x2"  # the largest meets the smallest
    assert pattern_for(30, 1536, 3, given) == "3x2x5,12x16x8"


def test_bonds_are_limited_by_the_entries_on_either_side() -> None:
    chain = ChainShape.of(24, 36, "2x3x4,6x3x2", 12)
    assert chain.bonds == (1, 12, 8, 1)
    assert chain.cores == [(1, 2, 6, 12), (12, 3, 3, 8), (8, 4, 2, 1)]
    assert largest_bond(24, 36, "2x3x4,6x3x2") == 12


def test_the_parameters_are_those_of_the_example_of_the_paper() -> None:
    """Three sites of 6 x 6 for a matrix of 216 x 216: 2 * 36 * chi + 36 * chi^2 numbers."""
    pattern = pattern_for(216, 216, 3)
    assert pattern == "6x6x6,6x6x6"
    for chi in (1, 5, 36):
        cores = ChainShape.of(216, 216, pattern, chi).cores
        assert sum(map(prod, cores)) == 2 * 36 * chi + 36 * chi**2


@pytest.mark.parametrize("shape", [(24, 36), (36, 24), (7, 12)])
@pytest.mark.parametrize("cores", [2, 3, 4])
def test_cores_grow_with_the_bond_dimension(shape: tuple[int, int], cores: int) -> None:
    pattern = pattern_for(*shape, cores)
    chains = [
        ChainShape.of(*shape, pattern, bond) for bond in range(1, largest_bond(*shape, pattern) + 1)
    ]
    numbers = [sum(map(prod, chain.cores)) for chain in chains]
    assert all(small < large for small, large in pairwise(numbers))


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (None, "must be the factors of outputs and inputs, such as 24x24,32x48, got None"),
        ("2:4", "must be the factors of outputs and inputs, such as 24x24,32x48, got '2:4'"),
        ("6x4", "must be the factors"),
        ("6x0,4x9", "must be the factors"),
        ("6x4,3x3x4", "2 to 4 factors for outputs and as many for inputs, got '6x4,3x3x4'"),
        ("2x3x2x2x1,2x2x3x3x1", "2 to 4 factors"),
        ("6x5,4x9", "factors of the outputs must multiply to 24, got 6x5"),
        ("6x4,9x5", "factors of the inputs must multiply to 36, got 9x5"),
        ("6x1x4,4x1x9", r"cannot be factored into 3 cores: .* core 2 has one output and one input"),
    ],
)
def test_impossible_factors_are_rejected(pattern: str | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ChainShape.of(24, 36, pattern, 1)


@pytest.mark.parametrize("bond", [0, 25])
def test_bond_dimensions_out_of_range_are_rejected(bond: int) -> None:
    words = rf"bond must be in \[1, 24\] for \[24, 36\] with the factors 6x4 and 4x9, got {bond}"
    with pytest.raises(ValueError, match=words):
        ChainShape.of(24, 36, "6x4,4x9", bond)
