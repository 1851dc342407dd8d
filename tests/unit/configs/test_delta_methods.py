"""Options of the methods of `lrc delta make`."""

import pytest

from lrc.cli.delta import MEANT, METHODS
from lrc.configs.delta_methods import parse_delta_method
from lrc.configs.errors import RecipeError


def test_options_are_read_by_method() -> None:
    found = parse_delta_method("ternary", ["density=0.05", "scale=std", "alpha=2"])
    assert found.model_dump() == {
        "method": "ternary",
        "density": 0.05,
        "scale": "std",
        "alpha": 2.0,
        "balance": "measured",
    }
    for method in (*METHODS, *MEANT.values()):
        assert parse_delta_method(method, []).method == method


@pytest.mark.parametrize(
    ("method", "options", "code", "words"),
    [
        ("terary", [], "unknown-value", "did you mean 'ternary'"),
        ("ternary", ["densty=0.1"], "unknown-key", "did you mean 'density'"),
        ("ternary", ["rank=3"], "misplaced-key", "not a key of method 'ternary'"),
        ("ternary", ["density=0"], "out-of-range", "> 0 and <= 1, got 0"),
        ("low-rank", ["rank=3", "keep=0.1"], "conflicting-keys", "got 'rank' and 'keep'"),
        ("low-rank", ["rank=0"], "out-of-range", "got 0"),
        ("low-rank", ["size=3"], "wrong-type", "a size such as 180MiB"),
        ("int", ["bits=9"], "out-of-range", "<= 8, got 9"),
        ("int", ["bits"], "invalid-override", "must be key.path=value"),
        ("sparse", ["values=float16"], "unknown-value", "exact"),
    ],
)
def test_other_options_are_refused(method: str, options: list[str], code: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as refused:
        parse_delta_method(method, options)
    assert refused.value.problems[0].code == code
