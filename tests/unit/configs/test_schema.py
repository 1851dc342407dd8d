import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from lrc.configs import shipped
from lrc.configs.load import dump_recipe, parse_recipe
from lrc.configs.recipe import recipe_schema
from lrc.configs.yaml_text import read_yaml

SCHEMA = recipe_schema()
VALIDATOR = Draft202012Validator(SCHEMA)

SHORT = """
model: org/name
calibration: c4
stages: [decompose: {method: svd, keep: 0.8}]
evaluate: {perplexity: [c4, {source: wikitext2}], tasks: [piqa]}
output: out
"""


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if "properties" in schema:
            yield schema
        for each in schema.values():
            yield from objects(each)
    elif isinstance(schema, list):
        for each in schema:
            yield from objects(each)


def test_the_schema_is_itself_valid_and_is_json() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMA["title"] == "lrc recipe"


@pytest.mark.parametrize("name", shipped.names())
def test_editors_accept_every_shipped_recipe(name: str) -> None:
    text = shipped.read(name)
    written = dump_recipe(parse_recipe(text, name=name))
    for each in (text, written):
        assert [error.message for error in VALIDATOR.iter_errors(yaml.safe_load(each))] == []


def test_editors_accept_every_short_form() -> None:
    parse_recipe(SHORT, name="short.yaml")
    assert list(VALIDATOR.iter_errors(read_yaml(SHORT).value)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model", 3),
        ("model", ""),
        ("model", {"path": "x", "pth": "y"}),
        ("calibration", ["c4"]),
        ("calibration", {"samples": 0}),
        ("evaluate", {"tasks": "piqa"}),
        ("evaluate", {"perplexity": "c4"}),
        ("stages", []),
        ("stages", [{"decompose": {"method": "none", "keep": 0.5}}]),
        ("stages", [{"decompose": {"method": "svd", "keep": 1.5}}]),
        ("stages", [{"decompose": {"method": "svd", "size": "180"}}]),
        ("stages", [{"decompose": {"method": "svd", "keep": 1, "compensate": True}}]),
        ("stages", [{"decompose": {"method": "basis-sharing", "keep": 1, "compensate": {}}}]),
        ("stages", [{"decompose": {"method": "basis-sharing", "keep": 1, "storage": "low_rank"}}]),
        ("seed", -1),
        ("sead", 1),
    ],
)
def test_editors_reject_what_loading_rejects(path: str, value: Any) -> None:
    assert list(VALIDATOR.iter_errors(read_yaml(SHORT).value | {path: value}))


def test_every_key_is_described() -> None:
    found = list(objects(SCHEMA))
    assert len(found) > 8
    for each in found:
        for key, inner in each["properties"].items():
            assert "description" in inner, f"{each['title']}.{key}"
