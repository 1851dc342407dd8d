import pytest

from lrc.configs.errors import RecipeError
from lrc.configs.load import parse_recipe

GOOD = """\
model: org/name
stages:
  - decompose: {method: svd-llm, keep: 0.8}
output: out
"""


def test_overrides_reach_every_place_in_order() -> None:
    recipe = parse_recipe(
        GOOD,
        name="recipe.yaml",
        overrides=[
            "stages.0.decompose.keep=0.6",
            "stages[0].decompose.damp=1e-3",
            "stages.0.decompose.rank_multiple=8",
            "stages.0.decompose.compensate.mix=0.5",
            'stages.0.decompose.targets=["*.q_proj", b]',
            "evaluate.tasks.limit=10",
            "evaluate.perplexity=[c4]",
            "seed=1",
            "seed=2",
            "model.revision='12'",
        ],
    )
    stage = recipe.stages[0].decompose
    assert stage.model_dump() == {
        "method": "svd-llm",
        "keep": 0.6,
        "size": None,
        "elastic": None,
        "drafter": None,
        "measure": "bits",
        "rows": 1,
        "latency_table": None,
        "allocation": "uniform",
        "rank_multiple": 8,
        "min_keep": 0.0,
        "max_relative_error": 1.0,
        "plan": None,
        "compensate": {"mix": 0.5, "residual": 0.5, "damp": 1e-4},
        "targets": ["*.q_proj", "b"],
        "ignore": [],
        "overrides": [],
        "storage": "low_rank",
        "damp": 1e-3,
    }
    assert recipe.evaluate.tasks.limit == 10
    assert recipe.evaluate.perplexity[0].source == "c4"
    assert recipe.seed == 2
    assert recipe.model.revision == "12"


def test_overrides_write_out_short_forms() -> None:
    text = GOOD + "calibration: c4\nevaluate: {perplexity: [wikitext2], tasks: [piqa]}\n"
    changes = ["model.dtype=float32", "calibration.samples=3", "evaluate.tasks.limit=4"]
    changes += ["evaluate.perplexity.0.window=5", "evaluate.tasks.names.0=arc_easy"]
    recipe = parse_recipe(text, name="recipe.yaml", overrides=changes)
    assert (recipe.model.path, recipe.model.dtype) == ("org/name", "float32")
    assert (recipe.calibration.source, recipe.calibration.samples) == ("c4", 3)
    assert (recipe.evaluate.tasks.names, recipe.evaluate.tasks.limit) == (["arc_easy"], 4)
    perplexity = recipe.evaluate.perplexity[0]
    assert (perplexity.source, perplexity.window) == ("wikitext2", 5)


def test_an_override_changes_one_use_of_an_anchor() -> None:
    text = "model: a\noutput: b\nstages:\n- &s {decompose: {method: svd, keep: 0.8}}\n- *s\n"
    recipe = parse_recipe(text, name="recipe.yaml", overrides=["stages.1.decompose.keep=0.5"])
    assert [stage.decompose.keep for stage in recipe.stages] == [0.8, 0.5]


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("kep=0.5", "did you mean 'keep'?"),
        ("decompose.keep=0.5", "did you mean 'stages[0].decompose.keep'?"),
        ("sead=1", "did you mean 'seed'?"),
        ("xyz=1", "xyz: unknown key; remove it."),
    ],
)
def test_a_misspelled_or_shortened_key_is_named(override: str, meant: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(GOOD, name="recipe.yaml", overrides=[override])
    (problem,) = refused.value.problems
    assert problem.code == "unknown-key"
    assert meant in str(problem)
