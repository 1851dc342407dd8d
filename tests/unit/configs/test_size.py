import pytest

from lrc.configs.size import UNITS, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0B", 0),
        ("180MiB", 180 * 2**20),
        ("180MB", 180_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("0.1GB", 100_000_000),  # exact: 0.1 is no float
        ("2.7 kB", 2700),
        ("1 KiB", 1024),
        ("0.3B", 0),
        ("007B", 7),
        ("999999999999999GiB", 999_999_999_999_999 * 2**30),
    ],
)
def test_a_size_is_that_many_bytes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


def test_decimal_units_are_powers_of_1000_and_binary_ones_of_1024() -> None:
    assert [parse_size(f"1{unit}") for unit in UNITS] == [
        *(1000**power for power in range(4)),
        *(1024**power for power in range(1, 4)),
    ]


@pytest.mark.parametrize(
    "text",
    ["", "180", "180M", "180mb", "MiB", "-1MiB", "1e3MB", "1,5GB", ".5GB", "1.GB", "1  GB",
     "1GB ", "1GB\n", "\u0661GB", "1/2GB", "9" * 5000 + "B"],
)  # fmt: skip
def test_invalid_sizes_are_rejected_with_the_allowed_form(text: str) -> None:
    with pytest.raises(ValueError, match="must be a size such as 180MiB, got") as caught:
        parse_size(text)
    assert str(caught.value).endswith(f"; write a number and a unit, one of {', '.join(UNITS)}")
