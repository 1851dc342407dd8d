import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lrc.configs.errors import Problem, RecipeError
from lrc.configs.load import dump_recipe, load_recipe, parse_recipe
from lrc.configs.recipe import Recipe

GOOD = """\
model: org/name
stages:
  - decompose: {method: svd-llm, keep: 0.8}
output: out
"""


def problems(text: str, *overrides: str) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="recipe.yaml", overrides=overrides)
    assert caught.value.exit_code == 2
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return caught.value.problems


def test_all_problems_of_file_and_overrides_come_at_once_in_the_order_of_lines() -> None:
    text = """\
modle: {path: org/name, dtyp: float32}
stages:
  - decompose: {method: svdllm, keep: 1.3, damp: 1}
  - decompse: {method: svd, kep: 0.8}
seed: 1
seed: x
"""
    found = problems(text, "seed.x=1", "evaluate.tasks=", "nonsense")
    assert [(each.source, each.code, each.where) for each in found] == [
        ("recipe.yaml", "missing-key", "output"),
        ("recipe.yaml:1", "unknown-key", "modle"),
        ("recipe.yaml:1", "unknown-key", "modle.dtyp"),
        ("recipe.yaml:3", "unknown-value", "stages[0].decompose.method"),
        ("recipe.yaml:3", "out-of-range", "stages[0].decompose.keep"),
        ("recipe.yaml:3", "out-of-range", "stages[0].decompose.damp"),
        ("recipe.yaml:4", "unknown-key", "stages[1].decompse"),
        ("recipe.yaml:4", "unknown-key", "stages[1].decompse.kep"),
        ("recipe.yaml:5", "duplicate-key", "seed"),
        ("override 'seed.x=1'", "invalid-override", ""),
        ("override 'evaluate.tasks='", "wrong-type", "evaluate.tasks"),
        ("override 'nonsense'", "invalid-override", ""),
    ]


def test_what_cannot_be_read_does_not_hide_bad_overrides(tmp_path: Path) -> None:
    assert len(problems("[", "nonsense")) == 2
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "none.yaml", ["nonsense"])
    assert len(caught.value.problems) == 2


def test_a_problem_in_an_aliased_value_names_the_line_of_each_use() -> None:
    text = "model: a\noutput: b\nstages:\n- decompose: &s {method: svd, keep: 2}\n- decompose: *s\n"
    found = problems(text)
    assert [each.where for each in found] == [
        "stages[0].decompose.keep",
        "stages[1].decompose.keep",
    ]


def test_repeated_aliases_are_stopped_before_they_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (found,) = problems("\n".join(lines))
    assert found.code == "invalid-yaml"
    assert "more than 100,000 values" in found.message


def test_a_number_too_long_for_python_is_a_wrong_value_not_a_crash() -> None:
    (found,) = problems(GOOD + "seed: " + "9" * 5000)
    assert (found.code, found.where) == ("wrong-type", "seed")
    assert len(str(found)) < 200


def test_loading_keeps_the_text_as_given(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    loaded = load_recipe(path, ["seed=3"])
    assert loaded.recipe == parse_recipe(GOOD + "seed: 3", name="recipe.yaml")
    assert loaded.text == GOOD.replace("\n", "\r\n")
    assert loaded.overrides == ("seed=3",)


def test_a_written_out_recipe_parses_back_equal_and_names_the_method_first() -> None:
    text = (
        GOOD + "evaluate: {perplexity: [my.data.jsonl], tasks: [piqa]}\nseed: 9223372036854775807\n"
    )
    recipe = parse_recipe(text, name="recipe.yaml")
    written = dump_recipe(recipe)
    assert parse_recipe(written, name="written.yaml") == recipe
    assert list(yaml.safe_load(written)) == list(Recipe.model_fields)
    assert next(iter(yaml.safe_load(written)["stages"][0]["decompose"])) == "method"


def test_reading_a_recipe_imports_no_tensor_library() -> None:
    code = "import sys, lrc.configs.load; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
