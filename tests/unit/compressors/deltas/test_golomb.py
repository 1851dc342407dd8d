"""The Golomb code: a round trip, its length, and the best parameter."""

import numpy as np
import pytest

from lrc.compressors.deltas.golomb import (
    code_length,
    decode_gaps,
    encode_gaps,
    optimal_parameter,
)


def gaps_of(seed: int) -> np.ndarray:
    """Gaps between random places, of another density and number for every seed."""
    rng = np.random.default_rng(seed)
    density = 10 ** rng.uniform(-3, -0.1)
    return rng.geometric(density, size=int(rng.integers(1, 400))) - 1


def textbook_code(gap: int, m: int) -> str:
    """Return the code of one gap: quotient in unary, remainder in truncated binary."""
    quotient, remainder = divmod(gap, m)
    b = (m - 1).bit_length()
    short = (1 << b) - m
    if m == 1:
        tail = ""
    elif remainder < short:
        tail = format(remainder, f"0{b - 1}b") if b > 1 else ""
    else:
        tail = format(remainder + short, f"0{b}b")
    return "1" * quotient + "0" + tail


@pytest.mark.parametrize("seed", range(12))
def test_decoding_returns_the_gaps(seed: int) -> None:
    gaps = gaps_of(seed)
    for m in (1, 2, 3, 5, 8, 13, optimal_parameter(gaps)):
        bits = encode_gaps(gaps, m)
        rest = np.random.default_rng(seed).random(9) < 0.5  # what follows in the file
        found, used = decode_gaps(np.concatenate([bits, rest]), len(gaps), m)
        assert np.array_equal(found, gaps)
        assert used == len(bits)


@pytest.mark.parametrize("seed", range(4))
def test_the_length_is_that_of_the_textbook_code(seed: int) -> None:
    gaps = gaps_of(seed)
    for m in range(1, 20):
        expected = sum(len(textbook_code(int(gap), m)) for gap in gaps)
        assert len(encode_gaps(gaps, m)) == code_length(gaps, m) == expected


@pytest.mark.parametrize("seed", range(8))
def test_no_parameter_gives_a_shorter_code(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = gaps_of(seed)
    every = [code_length(gaps, m) for m in range(1, int(gaps.max()) + 3)]
    best = every.index(min(every)) + 1
    assert optimal_parameter(gaps) == best
    monkeypatch.setattr("lrc.compressors.deltas.golomb.CELLS", 1)
    assert optimal_parameter(gaps) == best


def test_independent_places_take_nearly_their_entropy() -> None:
    rng = np.random.default_rng(0)
    for density in (0.02, 0.1, 0.3):
        places = np.flatnonzero(rng.random(100_000) < density)
        gaps = np.diff(places, prepend=-1) - 1
        p = len(places) / 100_000
        entropy = -p * np.log2(p) - (1 - p) * np.log2(1 - p)
        found = code_length(gaps, optimal_parameter(gaps)) / 100_000
        assert entropy * 0.99 < found < entropy * 1.03


def test_no_gaps_are_no_bits() -> None:
    none = np.array([], dtype=np.int64)
    assert optimal_parameter(none) == 1
    assert len(encode_gaps(none, 1)) == 0
    found, used = decode_gaps(np.array([], dtype=bool), 0, 1)
    assert (len(found), used) == (0, 0)


@pytest.mark.parametrize("m", [1, 5])
def test_bits_that_end_too_early_are_refused(m: int) -> None:
    bits = encode_gaps(np.array([3, 9, 4]), m)
    with pytest.raises(ValueError, match="do not hold 3 gaps"):
        decode_gaps(bits[:-1], 3, m)
