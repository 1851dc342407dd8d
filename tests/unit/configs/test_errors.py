import pytest

from lrc.configs.errors import (
    CheckpointError,
    GateMissed,
    LrcError,
    ModelError,
    Problem,
    RecipeError,
    UsageError,
)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (
            "stages[0].decompose.keep: must be at most 1, got 2; lower it",
            "stages[0].decompose.keep",
        ),
        ("recipe.yaml: no such file: recipe.yaml", "recipe.yaml"),
        ("nothing would be smaller; lower 'rank_multiple': 16", ""),
        ("plan.json, model.layers.0: must have the shape [1, 2]", ""),
    ],
)
def test_a_sentence_is_split_at_its_place_and_prints_unchanged(text: str, where: str) -> None:
    problem = Problem.parse(text)
    assert (problem.code, problem.where, str(problem)) == ("invalid-recipe", where, text)


def test_an_error_has_the_code_of_its_class_or_its_own() -> None:
    assert ModelError("damaged").code == "invalid-model"
    error = CheckpointError("is damaged", code="hash-mismatch", where="model.safetensors")
    assert str(error) == "model.safetensors: is damaged"
    assert error.problems == [Problem("hash-mismatch", "model.safetensors", "is damaged")]
    assert UsageError("--keep: must be a number").problems == [
        Problem("usage", "--keep", "must be a number")
    ]


def test_every_class_of_errors_has_a_code_and_an_exit_code() -> None:
    classes = LrcError.__subclasses__()
    assert len({each.default_code for each in classes}) == len(classes) > 5
    assert {each.exit_code for each in classes} == {1, 2, 4, 75}


def test_problems_and_sentences_may_be_mixed() -> None:
    error = RecipeError(
        [Problem("unknown-key", "sead", "unknown key", "r.yaml:1"), "seed: too low"]
    )
    assert [each.code for each in error.problems] == ["unknown-key", "invalid-recipe"]
    assert str(error) == "r.yaml:1: sead: unknown key\nseed: too low"


def test_each_missed_gate_is_a_problem() -> None:
    assert [each.code for each in GateMissed(["a", "b"], {}).problems] == ["gate-missed"] * 2
