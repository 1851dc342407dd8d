"""The comparison of dense and compressed scores, and gates on them."""

import math

import pytest

from lrc.compressors.evaluate.gates import (
    check_gate_names,
    check_gates,
    evaluation_metrics,
    metrics_of,
)
from lrc.compressors.evaluate.scores import compare, recovery
from lrc.configs.errors import DataError, RecipeError
from lrc.configs.recipe import Evaluate, Gate, Perplexity


@pytest.mark.parametrize(
    ("dense", "compressed", "higher", "expected"),
    [
        (0.6, 0.54, True, 90.0),
        (10.0, 12.5, False, 80.0),
        (0.5, 0.6, True, 120.0),
        (0.6, 0.6, True, 100.0),
        (0.0, 0.1, True, None),
        (0.2, -0.1, True, None),
        (0.5, 0.5, None, None),
    ],
)
def test_recovery_is_the_share_of_the_dense_score(dense, compressed, higher, expected):
    assert recovery(dense, compressed, higher) == pytest.approx(expected)


# Dense and compressed side by side


def block(perplexity, accuracy, **changes):
    shared = {"tokens": 10, "window": 5, "windows": 2, "bos": False, "protocol": "p"}
    score = {"stderr": 0.1, "higher_is_better": True, "documents": 5, "version": "1"}
    return {
        "perplexity": {
            "w": {
                "perplexity": perplexity,
                "stderr": 0.5,
                **shared,
                "dtype": "float32",
                "text_sha256": "0",
                **changes,
            }
        },
        "tasks": {"t": {"acc": {"value": accuracy, **score}}},
    }


def test_compare_gives_the_shape_of_the_report():
    assert compare(block(20.0, 0.5), block(25.0, 0.4)) == {
        "perplexity": {
            "w": {
                "dense": 20.0,
                "compressed": 25.0,
                "ratio": 1.25,
                "stderr": {"dense": 0.5, "compressed": 0.5},
                "tokens": 10,
                "window": 5,
                "windows": 2,
                "bos": False,
                "protocol": "p",
                "text_sha256": "0",
                "dtype": "float32",
            }
        },
        "tasks": {
            "t": {
                "acc": {
                    "dense": 0.5,
                    "compressed": 0.4,
                    "stderr": {"dense": 0.1, "compressed": 0.1},
                    "recovery": 80.0,
                    "higher_is_better": True,
                    "documents": 5,
                    "version": "1",
                }
            }
        },
        "kl": {},
        "generations": [],
    }


def test_the_comparison_of_both_models_is_part_of_the_report():
    texts = {"10": "c", "2": "b", "0": "a"}
    pair = {"kl": {"w": {"forward": 0.1}}, "generations": texts, "similarity": {}}
    report = compare(block(20.0, 0.5), block(25.0, 0.4), pair)
    assert report["kl"] == {"w": {"forward": 0.1}}
    assert report["generations"] == ["a", "b", "c"]


def test_without_a_dense_model_nothing_is_relative():
    report = compare(None, block(25.0, 0.4))
    assert report["perplexity"]["w"]["dense"] is report["perplexity"]["w"]["ratio"] is None
    assert report["tasks"]["t"]["acc"]["stderr"] == {"dense": None, "compressed": 0.1}
    assert report["tasks"]["t"]["acc"]["recovery"] is None


def test_scores_in_different_precision_are_not_compared():
    with pytest.raises(DataError, match=r"perplexity\.w: .*dtype: 'bfloat16' and 'float32'"):
        compare(block(20.0, 0.5, dtype="bfloat16"), block(25.0, 0.4))


def test_scores_on_different_texts_are_not_compared():
    with pytest.raises(DataError, match=r"perplexity\.w: .*text_sha256"):
        compare(block(20.0, 0.5, text_sha256="1"), block(25.0, 0.4))


# Gates


def missed_gates(gates, evaluation):
    found = check_gates(gates, evaluation_metrics(evaluation))
    return [each.sentence for each in found if not each.passed]


@pytest.mark.parametrize(
    ("gate", "missed"),
    [
        ({"metric": "perplexity.w", "at_most": 25}, []),
        ({"metric": "perplexity.w", "at_most": 24}, ["is 25 (dense 20): must be at most 24"]),
        ({"metric": "perplexity.w", "at_most": 1.25, "relative": True}, []),
        (
            {"metric": "perplexity.w", "at_most": 1.2, "relative": True},
            ["compressed / dense 1.25: must be at most 1.2"],
        ),
        ({"metric": "tasks.t.acc", "at_least": 0.4}, []),
        ({"metric": "tasks.t.acc", "at_least": 0.9, "relative": True}, ["must be at least 0.9"]),
        (
            {"metric": "tasks.t.acc", "at_least": 0.5, "at_most": 0.3},
            ["must be at most 0.3", "must be at least 0.5"],
        ),
    ],
)
def test_missed_gates_are_sentences(gate, missed):
    found = missed_gates([Gate(**gate)], compare(block(20.0, 0.5), block(25.0, 0.4)))
    assert len(found) == len(missed)
    for sentence, words in zip(found, missed, strict=True):
        assert words in sentence
        assert gate["metric"] in sentence


@pytest.mark.parametrize(
    ("gate", "missed"),
    [
        ({"metric": "kl.w", "at_most": 0.1}, []),
        ({"metric": "kl.w", "at_most": 0.05}, ["is 0.1: must be at most 0.05"]),
        ({"metric": "agreement.w", "at_least": 0.9}, []),
        (
            {"metric": "agreement.w", "at_least": 0.95},
            ["is 0.9: must be at least 0.95"],
        ),
    ],
)
def test_gates_on_predictions(gate, missed):
    kl = {"w": {"forward": 0.1, "reverse": 0.3, "agreement": 0.9}}
    pair = {"kl": kl, "generations": {}, "similarity": {}}
    evaluation = compare(block(20.0, 0.5), block(25.0, 0.4), pair)
    sentences = missed_gates([Gate(**gate)], evaluation)
    assert sentences == [f"{gate['metric']} {words}" for words in missed]


@pytest.mark.parametrize(
    ("metric", "options", "words"),
    [
        ("kl.c44", {}, r"gates\[0\]\.metric: .*did you mean 'kl\.c4'"),
        ("agreement.c", {}, r"gates\[0\]\.metric: .*did you mean 'agreement\.c4'"),
        ("kl.c4", {"kl_tokens": 0}, r"evaluate\.kl_tokens is 0; change it or remove the gate"),
        ("kl.c4", {"dense": False}, r"evaluate\.dense is false; change it or remove the gate"),
        ("kl.c4", {"perplexity": []}, "allowed: none"),
    ],
)
def test_gates_on_predictions_that_are_not_compared_are_refused(metric, options, words):
    evaluate = Evaluate(**{"perplexity": [Perplexity(source="c4")], **options})
    with pytest.raises(RecipeError, match=words) as caught:
        check_gate_names([Gate(metric=metric, at_most=0.1)], evaluate)
    assert len(caught.value.problems) == 1


def test_a_comparison_of_predictions_has_no_relative_gate():
    evaluate = Evaluate(perplexity=[Perplexity(source="c4")])
    check_gate_names([Gate(metric="kl.c4", at_most=0.1)], evaluate)
    with pytest.raises(RecipeError, match=r"gates\[0\]\.relative: kl\.c4 is a comparison"):
        check_gate_names([Gate(metric="kl.c4", at_most=0.1, relative=True)], evaluate)


@pytest.mark.parametrize("threshold", [{"at_most": 30.0}, {"at_least": 0.0}])
def test_a_score_that_is_not_a_number_misses_every_gate(threshold):
    evaluation = compare(block(20.0, 0.5), block(math.nan, 0.4))
    assert len(missed_gates([Gate(metric="perplexity.w", **threshold)], evaluation)) == 1


def test_gates_on_the_size_compare_bytes():
    report = {
        "evaluation": compare(None, block(25.0, 0.4)),
        "size": {"model": {"file_bytes": {"dense": 4 * 2**20, "compressed": 2**20}}},
    }
    texts = ["size <= 0.3x", "size <= 1 MiB", "size <= 1.0e6"]
    found = check_gates([Gate.model_validate(each) for each in texts], metrics_of(report))
    assert [each.passed for each in found] == [True, True, False]
    assert found[0].gate == "size <= 0.3x"
    assert (found[0].value, found[1].value) == (0.25, 2**20)
    assert [each.sentence for each in found] == [
        "size is 1.0 MiB (dense 4.0 MiB), compressed / dense 0.25: must be at most 0.3x",
        "size is 1.0 MiB (dense 4.0 MiB): must be at most 1MiB",
        "size is 1.1 MB (dense 4.2 MB): must be at most 1MB",
    ]


def test_gates_on_what_is_not_there_are_errors():
    evaluation = compare(None, block(25.0, 0.4))
    gates = [
        Gate(metric="tasks.t.accc", at_least=0.1),
        Gate(metric="perplexity.w", at_most=2, relative=True),
    ]
    with pytest.raises(RecipeError) as caught:
        missed_gates(gates, evaluation)
    assert "did you mean 'tasks.t.acc'" in str(caught.value.problems[0])
    assert "dense model was not scored" in str(caught.value.problems[1])
