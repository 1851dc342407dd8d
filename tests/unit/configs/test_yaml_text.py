import pytest
import yaml

from lrc.configs.yaml_text import read_yaml, write_yaml


def test_scalars_follow_yaml_1_2() -> None:
    text = "[1e-6, 1E6, .5, -2., 0x10, 0o17, 012, yes, off, 12:30, 2024-01-01, 1_0, ~, True, .inf]"
    inf = float("inf")
    expected = [1e-6, 1e6, 0.5, -2.0, 16, 15, 12, "yes", "off", "12:30", "2024-01-01", "1_0"]
    assert read_yaml(text).value == [*expected, None, True, inf]


@pytest.mark.parametrize(
    "text", ["1e6", "no", "012", "08", "0o7", "null", "", "a: b", "*x", "=", "é"]
)
def test_written_strings_are_strings_for_both_versions_of_yaml(text: str) -> None:
    assert read_yaml(write_yaml([text])).value == [text]
    assert yaml.safe_load(write_yaml([text])) == [text]


def test_merge_keys_work_and_own_keys_win() -> None:
    document = read_yaml("a: &a {x: 1, y: 2}\nb: {x: 3, <<: *a}\nc: {<<: [{x: 4}, *a]}\n")
    assert document.value["b"] == {"x": 3, "y": 2}
    assert document.value["c"] == {"x": 4, "y": 2}
    assert document.problems == []
    assert document.lines["b", "x"] == 2
