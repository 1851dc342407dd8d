"""Windows are divided between sources by largest remainder."""

import pytest

from lrc.configs.sources import counts


@pytest.mark.parametrize("total", [1, 7, 10_000_000])
@pytest.mark.parametrize("fraction", [0.3333333, 1 / 3, 0.3333335])
def test_all_windows_are_divided_though_fractions_are_rounded(total: int, fraction: float) -> None:
    found = counts({"a": fraction, "b": fraction, "c": fraction}, total)
    assert sum(found.values()) == total
    assert max(found.values()) - min(found.values()) <= 1


def test_whole_shares_are_exact() -> None:
    assert counts({"a": 0.7, "b": 0.2, "c": 0.1}, 10) == {"a": 7, "b": 2, "c": 1}
    assert counts("a", 5) == {"a": 5}
