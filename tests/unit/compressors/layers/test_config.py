"""Configurations of weights: exact JSON, rejected records, and sums of components."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lrc.compressors.checkpoint.format import parse_modules
from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.layers import (
    COMPONENTS,
    ComponentConfig,
    QuantizationArgs,
    TensorSpec,
    WeightConfig,
    layer_tensors,
)
from lrc.configs.errors import CheckpointError

SHAPE = (24, 48)
SIZES: dict[str, dict[str, int]] = {
    "dense": {},
    "low_rank": {"rank": 8},
    "pivoted_low_rank": {"rank": 8},
    "sparse": {"nonzeros": 24 * 48 // 2},
    "semi_structured": {"n": 5},
    "block_sparse": {"groups": 9},
    "dictionary": {"atoms": 8, "nonzeros": 4},
    "tensor_train": {"bond": 8},
}
NEEDS_PATTERN = {"tensor_train": "3x8,16x3"}
NEEDS_QUANTIZATION = {"dense": "int8", "block_sparse": "int4-g16"}


def one(kind: str, quantization: str | None = None, **more: Any) -> ComponentConfig:
    written = quantization or NEEDS_QUANTIZATION.get(kind)
    args = None if written is None else QuantizationArgs.parse(written)
    return ComponentConfig(kind, SIZES[kind], args, **{"pattern": NEEDS_PATTERN.get(kind)} | more)


def configs() -> list[WeightConfig]:
    """Return every component alone, quantized, with pattern, shared and with a bias; and sums."""
    components = [one(kind) for kind in SIZES]
    components += [one(kind, "int4-g8") for kind in SIZES]
    components += [one(kind, "int3-g4-asymmetric") for kind in SIZES if kind != "block_sparse"]
    for kind, found in COMPONENTS.items():
        components += [one(kind, pattern=pattern) for pattern in found.PATTERNS]
        components += [one(kind, "int8", pattern=pattern) for pattern in found.PATTERNS]
        if found.SHARED_SIZE:
            shared = {"shares": "model.layers.0.mlp.up_proj"}
            components += [one(kind, **shared), one(kind, "int8", **shared)]
    single = [WeightConfig(SHAPE, (component,)) for component in components]
    return [
        WeightConfig(SHAPE),
        *single,
        *(WeightConfig(SHAPE, config.components, bias=True) for config in single),
        WeightConfig(SHAPE, (one("pivoted_low_rank"), one("sparse"))),
        WeightConfig(SHAPE, (one("pivoted_low_rank", "int8"), one("sparse", "int8"))),
        WeightConfig(SHAPE, (one("dense", "int4-g16"), one("low_rank"))),
        WeightConfig(SHAPE, (one("block_sparse"), one("low_rank")), bias=True),
    ]


def test_every_component_is_covered() -> None:
    assert SIZES.keys() == COMPONENTS.keys()
    assert all(sizes.keys() == {*COMPONENTS[kind].SIZES} for kind, sizes in SIZES.items())


@pytest.mark.parametrize("config", configs(), ids=lambda c: json.dumps(c.to_json()))
def test_from_json_inverts_to_json(config: WeightConfig) -> None:
    record = config.to_json()
    again = WeightConfig.from_json(json.loads(json.dumps(record)))
    assert again == config
    assert again.to_json() == record
    assert again.tensors() == config.tensors()
    for component in config.components:
        assert component.to_json() in record["components"]


def test_a_record_names_what_is_not_the_default() -> None:
    config = WeightConfig((24, 48), (one("low_rank", "int8", shares="x"),))
    assert config.to_json() == {
        "shape": [24, 48],
        "components": [{"type": "low_rank", "rank": 8, "quantization": "int8", "shares": "x"}],
    }
    sparse = WeightConfig((24, 48), (one("sparse", pattern="2:4"),), bias=True).to_json()
    assert sparse["components"] == [{"type": "sparse", "nonzeros": 576, "pattern": "2:4"}]
    assert sparse["bias"] is True
    assert WeightConfig((24, 48)).to_json() == {"shape": [24, 48], "components": []}


Spoil = Callable[[dict[str, Any], dict[str, Any]], object]
# The record and its component are changed in place; what the error says.
WRONG_RECORDS: dict[str, tuple[Spoil, str]] = {
    "no shape": (lambda r, _: r.pop("shape"), r"'shape' must be \[d_out, d_in\], got None"),
    "shape of three": (lambda r, _: r.update(shape=[1, 2, 3]), "'shape' must be"),
    "shape a text": (lambda r, _: r.update(shape="24x48"), "'shape' must be"),
    "shape of booleans": (lambda r, _: r.update(shape=[True, True]), "'shape' must be"),
    "shape of floats": (lambda r, _: r.update(shape=[24.0, 48.0]), "'shape' must be"),
    "shape with a zero": (lambda r, _: r.update(shape=[0, 48]), "'shape' must be"),
    "no components": (lambda r, _: r.pop("components"), "must have a list 'components', got None"),
    "components a mapping": (lambda r, c: r.update(components=c), "must have a list 'components'"),
    "component a text": (lambda r, _: r.update(components=["x"]), "mappings with a 'type'"),
    "a type twice": (lambda r, c: r.update(components=[c, c]), "types of 'components' must differ"),
    "bias a text": (lambda r, _: r.update(bias="yes"), "must have true or false as 'bias'"),
    "an unknown key": (lambda r, _: r.update(form=1), "has the unknown key 'form'"),
    "no type": (lambda _, c: c.pop("type"), f"'type' must be one of {', '.join(COMPONENTS)}, got"),
    "unknown type": (lambda _, c: c.update(type="x"), "'type' must be one of .* got 'x'"),
    "type a list": (lambda _, c: c.update(type=["sparse"]), "'type' must be one of .* got"),
    "unknown size": (lambda _, c: c.update(width=3), "component has no 'width'"),
    "unknown quantization": (lambda _, c: c.update(quantization="fp4"), "'quantization' must be"),
    "too many bits": (lambda _, c: c.update(quantization="int9"), r"'quantization' .*\[2, 8\]"),
    "quantization a number": (lambda _, c: c.update(quantization=4), "'quantization' must be"),
    "quantization a truth": (lambda _, c: c.update(quantization=True), "'quantization' must be"),
    "unknown pattern": (lambda _, c: c.update(pattern="1:4"), "'pattern' of .* must be"),
    "pattern a list": (lambda _, c: c.update(pattern=["2:4"]), "'pattern' of .* must be"),
    "shares a number": (lambda _, c: c.update(shares=3), "'shares' must name a layer"),
}
WRONG_SIZES: dict[str, Any] = {
    "missing": None,
    "zero": 0,
    "negative": -1,
    "a truth": True,
    "a text": "3",
    "a float": 3.0,
}


@pytest.fixture(params=SIZES)
def record(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = WeightConfig(SHAPE, (one(request.param),)).to_json()
    assert WeightConfig.from_json(found).types == request.param
    return found


@pytest.mark.parametrize("case", WRONG_RECORDS)
def test_wrong_records_are_rejected(case: str, record: dict[str, Any]) -> None:
    spoil, words = WRONG_RECORDS[case]
    spoil(record, record["components"][0])
    with pytest.raises(ValueError, match=words):
        WeightConfig.from_json(record)
    sentence = rf"^config.json: modules\['layer'\]: .*{words}.*(edited|newer lrc)"
    with pytest.raises(CheckpointError, match=sentence) as caught:
        parse_modules({"layer": record}, "config.json")
    assert caught.value.code == "invalid-config"


@pytest.mark.parametrize("case", WRONG_SIZES)
def test_wrong_sizes_are_rejected(case: str, record: dict[str, Any]) -> None:
    (component,) = record["components"]
    for name in COMPONENTS[component["type"]].SIZES:
        wrong = {**component, name: WRONG_SIZES[case]}
        if case == "missing":
            del wrong[name]
        words = rf"'{name}' must be a whole number >= 1, got {WRONG_SIZES[case]!r}"
        with pytest.raises(ValueError, match=words):
            WeightConfig.from_json({**record, "components": [wrong]})


@pytest.mark.parametrize("whole", [None, 3, "low_rank", [], True])
def test_what_is_not_a_mapping_is_rejected(whole: Any) -> None:
    with pytest.raises(ValueError, match="must have a mapping with 'shape' and 'components'"):
        WeightConfig.from_json(whole)
    with pytest.raises(CheckpointError) as caught:
        parse_modules({"layer": whole}, "config.json")
    assert caught.value.code == "invalid-config"
    if whole != []:
        with pytest.raises(CheckpointError) as caught:
            parse_modules(whole, "config.json")
        assert caught.value.code == "invalid-config"


@pytest.mark.parametrize(
    ("kind", "sizes", "words"),
    [
        ("sparse", {"nonzeros": 24 * 48 + 1}, r"nonzeros must be in \[1, 1152\]"),
        ("pivoted_low_rank", {"rank": 25}, r"rank must be in \[1, 24\]"),
        ("block_sparse", {"groups": 24 * 3 + 1}, r"groups must be in \[1, 72\]"),
        ("semi_structured", {"n": 9}, r"n must be in \[1, 8\] for \[24, 48\], got 9"),
        ("semi_structured", {"n": 0}, "'n' must be a whole number >= 1, got 0"),
        ("semi_structured", {"n": 4.0}, "'n' must be a whole number >= 1, got 4.0"),
        ("dictionary", {"atoms": 3, "nonzeros": 4}, r"nonzeros must be in \[1, 3\]"),
    ],
)
def test_sizes_of_no_weight_are_rejected(kind: str, sizes: dict[str, int], words: str) -> None:
    record = WeightConfig(SHAPE, (one(kind),)).to_json()
    record["components"][0] |= sizes
    with pytest.raises(ValueError, match=words):
        WeightConfig.from_json(record)


@pytest.mark.parametrize("kind", SIZES)
def test_groups_that_do_not_divide_the_rows_are_rejected(kind: str) -> None:
    record = WeightConfig(SHAPE, (one(kind),)).to_json()
    record["components"][0]["quantization"] = "int4-g7"
    if kind in ("sparse", "semi_structured"):  # whose values have no rows
        assert WeightConfig.from_json(record).quantization == QuantizationArgs(4, 7)
        return
    with pytest.raises(ValueError, match="not a multiple of the group size 7"):
        WeightConfig.from_json(record)


@pytest.mark.parametrize("kind", NEEDS_QUANTIZATION)
def test_components_of_integers_need_a_quantization(kind: str) -> None:
    record = WeightConfig(SHAPE, (one(kind),)).to_json()
    del record["components"][0]["quantization"]
    with pytest.raises(ValueError, match="quantization"):
        WeightConfig.from_json(record)


@pytest.mark.parametrize("kind", [k for k, found in COMPONENTS.items() if not found.SHARED_SIZE])
def test_components_without_a_first_factor_cannot_share_it(kind: str) -> None:
    record = WeightConfig(SHAPE, (one(kind),)).to_json()
    record["components"][0]["shares"] = "other"
    with pytest.raises(ValueError, match="'shares' must name a layer of type low_rank or dict"):
        WeightConfig.from_json(record)


@pytest.mark.parametrize("kind", SIZES)
def test_a_shape_of_another_layer_is_rejected(kind: str) -> None:
    model = nn.Module()
    model.layer = nn.Linear(SHAPE[1], SHAPE[0] + 1)
    words = r"modules\['layer'\]: shape must be \[25, 48\], got \[24, 48\]"
    with pytest.raises(CheckpointError, match=words):
        replace_layers(model, {"layer": WeightConfig(SHAPE, (one(kind),))})


def test_a_sum_stores_and_multiplies_what_its_components_do() -> None:
    first, second = one("pivoted_low_rank"), one("sparse")
    alone = [WeightConfig(SHAPE, (component,)) for component in (first, second)]
    both = WeightConfig(SHAPE, (first, second))
    assert both.stored_bits(16) == sum(c.stored_bits(16) for c in alone) - 8  # one sentinel
    assert both.parameters() == sum(c.parameters() for c in alone)
    assert both.multiply_adds() == sum(c.multiply_adds() for c in alone)
    assert both.tensors() == alone[0].tensors() | alone[1].tensors()
    assert both.types == "pivoted_low_rank+sparse"
    assert both.sizes == {"rank": 8, "nonzeros": 576}
    assert both.description == ", ".join(c.description for c in alone)


def test_without_components_the_dense_weight_is_stored() -> None:
    dense = WeightConfig(SHAPE)
    assert not dense.compressed
    assert (dense.types, dense.description, dense.sizes) == ("dense", "", {})
    assert dense.stored_bits(16) == 16 * 24 * 48
    assert dense.parameters() == dense.multiply_adds() == 24 * 48
    assert dense.tensors() == {}


def test_a_bias_is_stored_where_the_source_or_the_layer_has_one() -> None:
    bare = WeightConfig(SHAPE, (one("low_rank"),))
    own = WeightConfig(SHAPE, (one("low_rank"),), bias=True)
    assert "bias" not in layer_tensors(bare)
    for tensors in (layer_tensors(bare, bias=True), layer_tensors(own)):
        assert tensors["bias"] == TensorSpec([24])
    assert own.stored_bits(16) == bare.stored_bits(16)  # which do not count it


def test_quantizing_changes_all_components() -> None:
    both = WeightConfig(SHAPE, (one("pivoted_low_rank"), one("sparse")))
    args = QuantizationArgs.parse("int8")
    changed = both.quantized(args)
    assert [c.quantization for c in changed.components] == [args, args]
    assert both.quantization is None
    assert changed.quantization == args
    assert changed.quantized(None) == both
