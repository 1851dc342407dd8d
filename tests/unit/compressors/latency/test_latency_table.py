"""A hand-made table: costs, and its file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors.latency.latency_table import (
    LatencyTable,
    MissingTime,
    Product,
    read_table,
)
from lrc.compressors.latency.time_curve import TimeCurve
from lrc.compressors.layers import ComponentConfig, QuantizationArgs, WeightConfig

INT4 = QuantizationArgs.parse("int4-g16")
SHAPE = (64, 32)
TABLE = LatencyTable(
    "gpu",
    "bfloat16",
    1,
    None,
    {"lrc": "1", "torch": "2"},
    {
        (SHAPE, "dense"): TimeCurve((0,), (1000,)),
        (SHAPE, "dense int4-g16"): TimeCurve((0,), (400,)),
        (SHAPE, "low_rank"): TimeCurve((4, 16), (500, 900)),
        (SHAPE, "low_rank int4-g16"): TimeCurve((16,), (1001,)),
        (SHAPE, "sparse 2:4"): TimeCurve((1024,), (1000,)),
        (SHAPE, "dictionary"): TimeCurve((8, 16), (100, 200)),
        ((32, 32), "dense"): TimeCurve((0,), (7,)),
    },
)


def weight(*components: ComponentConfig) -> WeightConfig:
    return WeightConfig(SHAPE, components)


def test_the_time_of_a_weight_is_that_of_its_components_together() -> None:
    low_rank = ComponentConfig("low_rank", {"rank": 10})
    assert TABLE.of(weight()) == TABLE.dense(SHAPE) == 1000
    assert TABLE.of(weight(ComponentConfig("dense", {}, INT4))) == 400
    assert TABLE.of(weight(low_rank)) == 700
    assert TABLE.of(weight(ComponentConfig("dense", {}, INT4), low_rank)) == 1100


def test_of_a_dictionary_the_atoms_count() -> None:
    for nonzeros in (1, 5):
        atoms = ComponentConfig("dictionary", {"atoms": 12, "nonzeros": nonzeros})
        assert TABLE.of(weight(atoms)) == 150


def test_a_form_without_a_faster_size_is_named() -> None:
    assert TABLE.slower_forms(SHAPE) == ["low_rank int4-g16", "sparse 2:4"]
    assert TABLE.slower_forms((32, 32)) == []


def test_a_missing_time_is_named_by_form_and_shape() -> None:
    int8 = ComponentConfig("dense", {}, QuantizationArgs.parse("int8"))
    with pytest.raises(MissingTime, match=r"no times of dense int8 \[64, 32\]"):
        TABLE.of(weight(int8))
    products = [Product(SHAPE, int8), Product(SHAPE), Product((2, 2))]
    assert TABLE.missing(products) == [(SHAPE, "dense int8"), ((2, 2), "dense")]
    assert [*TABLE.only(products).curves] == [(SHAPE, "dense")]


def test_a_file_gives_the_same_table(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE.to_json()))
    assert read_table(str(path)) == TABLE
    assert read_table(str(path)).digest == TABLE.digest


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["entries"][2].update(changes)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda v: v.update(version=2), r"'version' must be 1, got 2"),
        (lambda v: v.pop("version"), r"'version' must be 1, got None"),
        (lambda v: v.pop("kind"), r"is not a latency table"),
        (lambda v: v.update(rows="1"), r"whole numbers 'rows'"),
        (lambda v: v.update(device=None), r"strings 'device'"),
        (lambda v: v.update(versions=[1]), r"a mapping 'versions'"),
        (lambda v: v.update(entries={}), r"a list 'entries'"),
        (lambda v: v["entries"].append(v["entries"][0]), r"entries\[7\]: dense .* listed twice"),
        (lambda v: v["entries"].append(3), r"entries\[7\]: must be a mapping, got 3"),
        (entry(shape=[64]), r"entries\[2\]: 'shape' must be \[d_out, d_in\], got \[64\]"),
        (entry(form=""), r"entries\[2\]: 'form' must be a string"),
        (entry(sizes=[4, 1.5]), r"entries\[2\]: 'sizes' must be whole numbers"),
        (entry(nanoseconds=[0, 1]), r"entries\[2\]: 'nanoseconds' must be whole numbers from 1"),
        (entry(nanoseconds=[1, 10**400]), r"entries\[2\]: 'nanoseconds' must be whole numbers"),
        (entry(nanoseconds=[3]), r"entries\[2\]: needs as many times as ascending sizes"),
    ],
)
def test_another_version_and_damage_are_refused(
    damage: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    values = TABLE.to_json()
    damage(values)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=words):
        read_table(str(path))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 10**5])
def test_what_is_not_json_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not JSON"):
        read_table(str(path))


@pytest.mark.parametrize(
    ("threads", "rows", "words"),
    [
        (None, 1, "gpu (float32, 1 row)"),
        (1, 2, "gpu (float32, 2 rows, 1 thread)"),
        (2, 1, "gpu (float32, 1 row, 2 threads)"),
    ],
)
def test_the_place_is_stated_in_words(threads: int | None, rows: int, words: str) -> None:
    assert LatencyTable("gpu", "float32", rows, threads, {}, {}).place == words
