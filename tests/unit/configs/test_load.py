import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lrc.configs.errors import RecipeError
from lrc.configs.load import dump_recipe, load_recipe, parse_recipe
from lrc.configs.recipe import Recipe

GOOD = """\
model: org/name
stages:
  - decompose: {method: svd-llm, keep: 0.8}
output: out
"""
TOP = "Allowed: model, calibration, stages, evaluate, output, seed"


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, name="recipe.yaml", overrides=overrides)
    assert caught.value.exit_code == 2
    assert str(caught.value) == "\n".join(caught.value.problems)
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
    assert found == [
        "recipe.yaml: output: missing; add a string that is not empty "
        "(Folder for checkpoint and report)",
        f"recipe.yaml:1: modle: unknown key; did you mean 'model'? {TOP}",
        "recipe.yaml:1: modle.dtyp: unknown key; did you mean 'dtype'? "
        "Allowed: path, file, revision, dtype, tokenizer, trust_remote_code",
        "recipe.yaml:3: stages[0].decompose.method: must be one of asvd, basis-sharing, compot, "
        "cospadi, dictionary, fwsvd, kfac, lord, magnitude, mixed, rocket, sparse, svd, svd-llm, "
        "wanda, got 'svdllm'; did you mean 'svd-llm'?",
        "recipe.yaml:3: stages[0].decompose.keep: must be in (0, 1], got 1.3; lower it",
        "recipe.yaml:3: stages[0].decompose.damp: must be in [0, 1), got 1; lower it",
        "recipe.yaml:4: stages[1].decompse: unknown key; did you mean 'decompose'? "
        "Allowed: slice, decompose, quantize",
        "recipe.yaml:4: stages[1].decompse.kep: unknown key; did you mean 'keep'? "
        "Allowed: method, keep, size, measure, allocation, rank_multiple, min_keep, max_loss, "
        "plan, storage, compensate, targets, skip, overrides",
        "recipe.yaml:6: seed: given twice, first in line 5; remove one of the two",
        "override 'seed.x=1': seed is 1, nothing can be set inside it; override seed itself",
        "override 'evaluate.tasks=': evaluate.tasks: must be a list of strings or a mapping with "
        "the keys names, include_path, limit, num_fewshot, batch_size, apply_chat_template, "
        "got nothing; write a value or remove the key",
        "override 'nonsense': must be key.path=value, as in stages.0.decompose.keep=0.6",
    ]


def test_what_cannot_be_read_does_not_hide_bad_overrides(tmp_path: Path) -> None:
    assert len(problems("[", "nonsense")) == 2
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "none.yaml", ["nonsense"])
    assert len(caught.value.problems) == 2


def test_a_problem_in_an_aliased_value_names_the_line_of_each_use() -> None:
    text = "model: a\noutput: b\nstages:\n- decompose: &s {method: svd, keep: 2}\n- decompose: *s\n"
    found = problems(text)
    assert [each.split(" ")[1] for each in found] == [
        "stages[0].decompose.keep:",
        "stages[1].decompose.keep:",
    ]


def test_repeated_aliases_are_stopped_before_they_fill_the_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert problems("\n".join(lines)) == [
        "recipe.yaml:1:1: not valid YAML: more than 100,000 values; repeat fewer aliases"
    ]


def test_a_number_too_long_for_python_is_a_wrong_value_not_a_crash() -> None:
    (found,) = problems(GOOD + "seed: " + "9" * 5000)
    assert found.startswith("recipe.yaml:5: seed: must be a whole number in [0, ")
    assert len(found) < 200


def test_loading_keeps_the_text_as_given(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    loaded = load_recipe(path, ["seed=3"])
    assert loaded.recipe == parse_recipe(GOOD + "seed: 3", name="recipe.yaml")
    assert loaded.text == GOOD.replace("\n", "\r\n")
    assert loaded.overrides == ("seed=3",)


def test_a_path_that_is_no_recipe_file_gets_its_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(GOOD)
    Path("empty").mkdir()
    Path("utf16.yaml").write_text(GOOD, encoding="utf-16")
    Path("big.yaml").write_bytes(b"#" * 1_000_001)
    Path("loop.yaml").symlink_to("loop.yaml")
    expected = {
        "svd-llm": "no such file; 'svd-llm' is a shipped recipe, "
        "`lrc recipes copy svd-llm` puts it here",
        "svd.yaml": "no such file; 'svd' is a shipped recipe, `lrc recipes copy svd` puts it here",
        "mine.yml": "no such file; did you mean 'mine.yaml'?",
        "empty/mine.yaml": "no such file; check the path, or start from a shipped one: "
        "`lrc recipes list`",
        ".": "is a folder; name one of those inside: big.yaml, loop.yaml, mine.yaml, utf16.yaml",
        "empty": "is a folder; name a recipe file",
        "utf16.yaml": "is not UTF-8 text (byte 0); a recipe is a YAML text, save it as UTF-8",
        "big.yaml": "is larger than 1,000,000 bytes; name the recipe, a short YAML text",
        "loop.yaml": "cannot be read: too many levels of symbolic links; "
        "check the path and its permissions",
        "mine.yaml/x": "cannot be read: not a directory; check the path and its permissions",
    }
    for path, sentence in expected.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert caught.value.problems == [f"{path}: {sentence}"]


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
