"""Plan files that a user may have edited: what is used of them, and what is rejected."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors.layers import WeightConfig
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.tasks import LayerTask, Weight
from lrc.compressors.planning.user_plan import SHOWN, apply_user_plan, check_names, read_user_plan


def requested(
    *weights: tuple[str, int], method: str = "svd", types: str = "low_rank", **changes: Any
) -> LayerTask:
    return LayerTask(
        weights=tuple(Weight(*each) for each in weights),
        config=WeightConfig((8, 12)),
        number_bits=16,
        stage=0,
        method=method,
        types=types,
        **changes,
    )


SINGLE = [requested(("a", 0)), requested(("b", 0))]
GROUP = [requested(("c", 0), ("d", 1), method="basis-sharing")]


def record(*names: str, component: Any = None, shape: Any = None, **more: Any) -> dict[str, Any]:
    """Return the record of a task; without a component it stays dense."""
    config = {"shape": shape or [8, 12], "components": [component] if component else []}
    return {"weights": [{"name": name} for name in names], "config": config, **more}


def low_rank(*names: str, rank: Any = 2, **more: Any) -> dict[str, Any]:
    return record(*names, component={"type": "low_rank", "rank": rank}, **more)


def dictionary(*names: str, atoms: Any = 4, nonzeros: Any = 2) -> dict[str, Any]:
    component = {"type": "dictionary", "atoms": atoms, "nonzeros": nonzeros}
    return record(*names, component=component)


Checked = tuple[list[LayerTask], Problems]


@pytest.fixture
def use(tmp_path: Path) -> Callable[..., Checked]:
    """Apply records to tasks; returns what was decided, and the problems."""

    def check(records: Any, tasks: Sequence[LayerTask] = SINGLE, **changes: Any) -> Checked:
        file, problems = tmp_path / "plan.json", Problems()
        values = {"tasks": records, "version": 2, **changes}
        file.write_text(records if isinstance(records, str) else json.dumps(values))
        plan = read_user_plan(str(file), "stages[0].decompose", problems)
        if plan is None:
            return [], problems
        targeted = {weight.name for task in tasks for weight in task.weights}
        check_names(plan, targeted, targeted | {"ignored"}, problems)
        return apply_user_plan(plan, tasks, METHODS[tasks[0].method], problems), problems

    return check


def test_configurations_are_used_and_other_keys_ignored(use: Callable[..., Checked]) -> None:
    pivoted = {"type": "pivoted_low_rank", "rank": 5}
    (a, b), problems = use([record("a", component=pivoted, bits=1), record("b")])
    assert problems == []
    assert (a.config.types, a.config.sizes) == ("pivoted_low_rank", {"rank": 5})
    assert a.bits == a.config.stored_bits(16)
    assert (b.config.compressed, b.note) == (False, "dense in the given plan")


def test_a_group_has_one_rank(use: Callable[..., Checked]) -> None:
    (task,), problems = use([low_rank("c", "d")], GROUP)
    assert problems == []
    assert task.config.sizes == {"rank": 2}
    assert [task.config_of(weight).shares for weight in task.weights] == [None, "c"]


def test_what_a_later_stage_quantizes_is_that_stages_decision(use: Callable[..., Checked]) -> None:
    """A plan shows configurations after quantization."""
    quantized = {"type": "low_rank", "rank": 2, "quantization": "int4"}
    whole = {"type": "dense", "quantization": "int8"}
    (a, b), problems = use([record("a", component=quantized), record("b", component=whole)])
    assert problems == []
    assert (a.config.types, a.config.quantization) == ("low_rank", None)
    assert not b.config.compressed


# Name -> content, code, part of the message.
INVALID: dict[str, tuple[Any, str, str]] = {
    "no JSON": ("{", "invalid-user-plan", "JSON"),
    "no plan": ("[]", "invalid-user-plan", "'tasks'"),
    "a plan of format version 1": ('{"matrices": []}', "invalid-user-plan", "version 1"),
    "a task without names": ([{"rank": 2}], "invalid-user-plan", "tasks[0]"),
    "a name twice": (
        [low_rank("a"), low_rank("a"), low_rank("b")],
        "invalid-user-plan",
        "a: is listed twice",
    ),
    "a weight left out": ([low_rank("a")], "missing-layer", "b: "),
    "one that is not targeted": (
        [low_rank("a"), low_rank("b"), low_rank("ignored")],
        "not-targeted",
        "ignored",
    ),
    "one that does not exist": (
        [low_rank("a"), low_rank("b"), low_rank("z")],
        "unknown-layer",
        "z: ",
    ),
    "another shape": (
        [low_rank("a"), low_rank("b", shape=[12, 8])],
        "unequal-shapes",
        "b: must have the shape [8, 12] of the model, got [12, 8]",
    ),
    "no shape": (
        [low_rank("a"), low_rank("b", shape=3)],
        "invalid-user-plan",
        "b: 'config' 'shape' must be [d_out, d_in], got 3",
    ),
    "rank zero": ([low_rank("a", rank=0), low_rank("b")], "invalid-user-plan", "got 0"),
    "rank beyond the shape": (
        [low_rank("a", rank=9), low_rank("b")],
        "size-out-of-range",
        "a: rank must be in [1, 8] for [8, 12], got 9",
    ),
    "rank no number": ([low_rank("a", rank="2"), low_rank("b")], "invalid-user-plan", "got '2'"),
    "no rank": ([low_rank("a", rank=None), low_rank("b")], "invalid-user-plan", "got None"),
    "a component without sizes that has a rank": (
        [record("a", component={"type": "dense", "rank": 3}), low_rank("b")],
        "invalid-user-plan",
        "a: 'config' a dense component has no 'rank'",
    ),
    "rank that saves nothing": (
        [low_rank("a", rank=5), low_rank("b")],
        "size-out-of-range",
        "lower rank to at most 4",
    ),
    "unknown component": (
        [record("a", component={"type": "wavelet", "rank": 2}), low_rank("b")],
        "invalid-user-plan",
        "a: 'config' 'type' must be one of dense, low_rank",
    ),
    "a component of another method": (
        [record("a", component={"type": "sparse", "nonzeros": 9}), low_rank("b")],
        "wrong-component",
        "low_rank or pivoted_low_rank here, got sparse",
    ),
    "a task of weights that share no factor": (
        [low_rank("a", "b")],
        "missing-layer",
        "a: ",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_what_does_not_fit_is_rejected_by_file_and_weight(
    case: str, use: Callable[..., Checked]
) -> None:
    content, code, part = INVALID[case]
    _, problems = use(content)
    first, *others = problems
    assert {problem.code for problem in problems} == {code}
    assert len(others) == (case == "a task of weights that share no factor")  # and b
    assert part in str(first)
    assert "plan.json" in str(first)


DICTIONARIES = [requested(("c", 0), ("d", 1), method="cospadi", types="dictionary")]


def test_a_group_has_one_dictionary(use: Callable[..., Checked]) -> None:
    """Of up to as many atoms as its layers have outputs together."""
    (task,), problems = use([dictionary("c", "d", atoms=9, nonzeros=3)], DICTIONARIES)
    assert problems == []
    assert task.config.types == "dictionary"
    for weight in task.weights:
        assert task.config_of(weight).sizes == {"atoms": 9, "nonzeros": 3}
    assert [task.config_of(weight).shares for weight in task.weights] == [None, "c"]


@pytest.mark.parametrize(
    ("records", "tasks"),
    [
        ([low_rank("c"), low_rank("d", rank=3)], GROUP),
        ([dictionary("c"), dictionary("d", atoms=5)], DICTIONARIES),
        ([dictionary("c"), record("d")], DICTIONARIES),
    ],
)
def test_a_group_that_is_listed_as_several_tasks_is_rejected(
    records: list[dict[str, Any]], tasks: list[LayerTask], use: Callable[..., Checked]
) -> None:
    """A task has one configuration, so that sizes in a group cannot differ."""
    _, problems = use(records, tasks)
    assert [problem.code for problem in problems] == ["missing-layer"]
    assert "as one task with d" in problems[0].message


def test_problems_are_reported_together_up_to_a_page(use: Callable[..., Checked]) -> None:
    unknown = [low_rank(f"z{number}") for number in range(SHOWN + 5)]
    _, problems = use([low_rank("a", rank=9), *unknown])
    codes = [problem.code for problem in problems]
    assert codes.count("unknown-layer") == SHOWN
    assert [p.message for p in problems if p.code == "more-problems"] == ["and 5 more problems"]
    assert any("a: rank must be" in str(problem) for problem in problems)
    assert any("b: is targeted but not listed" in str(problem) for problem in problems)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    problems = Problems()
    assert read_user_plan(str(tmp_path / "no.json"), "stages[0].decompose", problems) is None
    (problem,) = problems
    assert (problem.code, problem.where) == ("unreadable-file", "stages[0].decompose.plan")
    assert "no.json cannot be read: no such file" in problem.message


@pytest.mark.parametrize("version", [None, 1, 3, "2"])
def test_plans_of_other_versions_are_rejected(version: Any, use: Callable[..., Checked]) -> None:
    _, problems = use([low_rank("a"), low_rank("b")], version=version)
    (problem,) = problems
    assert (problem.code, problem.where) == ("invalid-user-plan", "stages[0].decompose.plan")
    assert "'version' must be 2" in problem.message


def dictionaries(method: str) -> list[LayerTask]:
    return [requested((name, 0), method=method, types="dictionary") for name in "ab"]


@pytest.mark.parametrize("method", ["cospadi", "compot", "rocket", "dictionary"])
def test_dictionaries_of_any_ratio_are_used(method: str, use: Callable[..., Checked]) -> None:
    records = [dictionary("a", atoms=4, nonzeros=1), dictionary("b", atoms=3, nonzeros=3)]
    tasks, problems = use(records, dictionaries(method))
    assert problems == []
    assert [task.config.sizes for task in tasks] == [
        {"atoms": 4, "nonzeros": 1},
        {"atoms": 3, "nonzeros": 3},
    ]


INVALID_SIZES = {
    "more atoms than a complete basis": (
        {"atoms": 9},
        "size-out-of-range",
        "b: atoms must be in [1, 8] for [8, 12], got 9; lower it, or make the weight dense",
    ),
    "no coefficients": (
        {"nonzeros": 0},
        "invalid-user-plan",
        "b: 'config' 'nonzeros' must be a whole number >= 1, got 0; correct it",
    ),
    "more coefficients than atoms": (
        {"atoms": 3, "nonzeros": 4},
        "invalid-user-plan",
        "b: 'config' nonzeros must be in [1, 3], the number of atoms; got 4; correct it",
    ),
    "half an atom": (
        {"atoms": 3.5},
        "invalid-user-plan",
        "b: 'config' 'atoms' must be a whole number >= 1, got 3.5; correct it",
    ),
    "too many coefficients for these atoms": (
        {"atoms": 6, "nonzeros": 4},
        "size-out-of-range",
        "b: dictionary with nonzeros 4 takes as much as the dense weight; lower nonzeros to at "
        "most 2, or make the weight dense",
    ),
    "atoms that cost as much as the weight": (
        {"atoms": 8},
        "size-out-of-range",
        "b: dictionary with nonzeros 2 takes as much as the dense weight; lower atoms and "
        "nonzeros, or make the weight dense",
    ),
}


@pytest.mark.parametrize("method", ["cospadi", "compot", "rocket", "dictionary"])
@pytest.mark.parametrize("case", INVALID_SIZES)
def test_sizes_of_dictionaries_that_do_not_fit_are_rejected_when_the_plan_is_read(
    case: str, method: str, use: Callable[..., Checked]
) -> None:
    sizes, code, message = INVALID_SIZES[case]
    records = [dictionary("a", atoms=3, nonzeros=2), dictionary("b", **sizes)]
    _, problems = use(records, dictionaries(method))
    (problem,) = problems
    assert problem.code == code
    assert str(problem).endswith(f"plan.json: {message}")
