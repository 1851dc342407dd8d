import pytest

from lrc.configs.errors import RecipeError
from lrc.configs.gate_text import parse_gate
from lrc.configs.load import parse_recipe
from lrc.configs.recipe import Gate

RECIPE = """\
model: org/name
stages: [{decompose: {method: svd-llm, keep: 0.8}}]
output: out
evaluate:
  perplexity: [c4]
  gates: ["perplexity.c4 <= 1.02x", {metric: kl.c4, at_most: 0.1}]
"""


def test_a_gate_is_a_comparison_or_a_mapping() -> None:
    gates = parse_recipe(RECIPE, name="r").evaluate.gates
    assert gates == [
        Gate(metric="perplexity.c4", at_most=1.02, relative=True),
        Gate(metric="kl.c4", at_most=0.1),
    ]


@pytest.mark.parametrize(
    ("text", "bounds"),
    [
        ("tasks.piqa.acc,none >= 0.5", {"at_least": 0.5}),
        ("kl.c4<=1e-3", {"at_most": 1e-3}),
        ("size <= 80MiB", {"at_most": 80 * 2**20}),
        ("size <= 1.5 GB", {"at_most": 1.5e9}),
        ("size <= .3 x", {"at_most": 0.3}),
    ],
)
def test_comparisons(text: str, bounds: dict[str, float]) -> None:
    found = parse_gate(text)
    assert found.items() >= bounds.items()
    assert found["relative"] == text.endswith("x")
    assert found["metric"] in text


@pytest.mark.parametrize(
    "text",
    ["perplexity.c4", "a < 3", "a <= b", "a == 1", "<= 3", "a <= 3MiB", "a <= -1", "a <= 1e999"],
)
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE, name="r", overrides=[f"evaluate.gates=['{text}']"])
    (problem,) = caught.value.problems
    assert problem.where == "evaluate.gates[0]"
    assert text in str(problem)
