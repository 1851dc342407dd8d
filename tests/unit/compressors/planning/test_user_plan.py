"""Plan files that a user may have edited: what is taken from them, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors.planning.plan import Matrix
from lrc.compressors.planning.user_plan import SHOWN, apply_given, read_given, refuse_strangers
from lrc.compressors.planning.weight_groups import Unit, units_of

BITS = 8 * 12 * 16


def asked(name: str, layer: int) -> Matrix:
    return Matrix(name, layer, (8, 12), 0, "svd", "low_rank", None, BITS, BITS)


ALONE = units_of([asked("a", 0), asked("b", 0)])
GROUP = units_of([asked(name, layer).shared("c") for layer, name in enumerate("cd")])


def entry(name: str, form: str = "low_rank", rank: Any = 2, **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": [8, 12], "form": form, "rank": rank, **more}


@pytest.fixture
def give(tmp_path: Path) -> Callable[..., tuple[list[Unit], list[str]]]:
    """Hold a list of entries against units; returns what was decided, and the problems."""

    def hold(entries: Any, units: list[Unit] = ALONE) -> tuple[list[Unit], list[str]]:
        file, problems = tmp_path / "plan.json", []
        file.write_text(entries if isinstance(entries, str) else json.dumps({"matrices": entries}))
        plan = read_given(str(file), "stages[0].decompose", problems)
        if plan is None:
            return [], problems
        members = {m.name for unit in units for m in unit.members}
        refuse_strangers(plan, members, members | {"skipped"}, problems)
        return apply_given(plan, units, problems), problems

    return hold


def test_form_and_rank_are_taken_and_other_keys_ignored(give) -> None:
    units, problems = give([entry("a", "pivoted_low_rank", 5, bits=1), entry("b", "dense", None)])
    assert problems == []
    (a,), (b,) = (unit.members for unit in units)
    assert (a.form, a.rank, a.bits) == ("pivoted_low_rank", 5, a.stored_bits({"rank": 5}))
    assert (b.form, b.rank, b.note) == ("dense", None, "dense in the given plan")


def test_a_group_takes_one_rank(give) -> None:
    units, problems = give([entry("c"), entry("d", "shared_low_rank")], GROUP)
    assert problems == []
    assert [(m.form, m.rank, m.group) for m in units[0].members] == [
        ("low_rank", 2, "c"),
        ("shared_low_rank", 2, "c"),
    ]


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "is not JSON"),
    "no plan": ("[]", "holds no list 'matrices'"),
    "an entry without a name": ([{"rank": 2}], "matrices[0]: has no 'name'"),
    "a name twice": ([entry("a"), entry("a"), entry("b")], "a: is there twice"),
    "a matrix left out": ([entry("a")], "b: is targeted but not there"),
    "one that is not targeted": (
        [entry("a"), entry("b"), entry("skipped")],
        "skipped: is targeted by no stage",
    ),
    "one that does not exist": ([entry("a"), entry("b"), entry("z")], "z: is no linear"),
    "another shape": (
        [entry("a"), entry("b") | {"shape": [12, 8]}],
        "b: must have the shape [8, 12] of the model, got [12, 8]",
    ),
    "no shape": ([entry("a"), entry("b") | {"shape": 3}], "b: shape must be [d_out, d_in], got 3"),
    "rank zero": ([entry("a", rank=0), entry("b")], "a: rank must be in [1, 8] for [8, 12], got 0"),
    "rank beyond the shape": ([entry("a", rank=9), entry("b")], "a: rank must be in [1, 8]"),
    "rank no number": ([entry("a", rank="2"), entry("b")], "a: rank must be a whole number"),
    "no rank": ([entry("a", rank=None), entry("b")], "a: rank must be a whole number for low_rank"),
    "dense with a rank": ([entry("a", "dense", 3), entry("b")], "a: a dense matrix has the rank"),
    "rank that saves nothing": (
        [entry("a", rank=5), entry("b")],
        "a: low_rank of rank 5 takes as much as the dense matrix; lower rank to at most 4",
    ),
    "unknown form": ([entry("a", "wavelet"), entry("b")], "a: form must be one of dense, low_rank"),
    "a factor of nobody's": (
        [entry("a", "shared_low_rank"), entry("b")],
        "a: form must be dense or low_rank or pivoted_low_rank here, got shared_low_rank",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_by_file_and_matrix(case: str, give) -> None:
    content, words = WRONG[case]
    _, problems = give(content)
    assert len(problems) == 1
    assert words in problems[0]
    assert "plan.json" in problems[0]


DICTIONARIES = units_of(
    [
        replace(m, method="cospadi", form="dictionary").shared("c")
        for m in [asked("c", 0), asked("d", 1)]
    ]
)


def learnt(name: str, form: str, atoms: Any = 4, nonzeros: Any = 2) -> dict[str, Any]:
    return {"name": name, "shape": [8, 12], "form": form, "atoms": atoms, "nonzeros": nonzeros}


def test_a_group_takes_one_dictionary(give) -> None:
    """Of up to as many atoms as its layers have outputs together."""
    entries = [learnt("c", "dictionary", 9, 3), learnt("d", "shared_dictionary", 9, 3)]
    units, problems = give(entries, DICTIONARIES)
    assert problems == []
    assert [(m.form, m.sizes) for m in units[0].members] == [
        ("dictionary", {"atoms": 9, "nonzeros": 3}),
        ("shared_dictionary", {"atoms": 9, "nonzeros": 3}),
    ]


UNEQUAL: dict[str, tuple[list[dict[str, Any]], list[Unit], str]] = {
    "ranks": (
        [entry("c"), entry("d", "shared_low_rank", 3)],
        GROUP,
        "c: must have the same rank as the 1 that share its factor, got 2, 3; make them equal",
    ),
    "dictionaries": (
        [learnt("c", "dictionary"), learnt("d", "shared_dictionary", 5)],
        DICTIONARIES,
        "c: must have the same atoms and nonzeros as the 1 that share its factor, got 2 of 4 "
        "atoms, 2 of 5 atoms; make them equal",
    ),
    "one of them dense": (
        [learnt("c", "dictionary"), entry("d", "dense", None)],
        DICTIONARIES,
        "c: must have the same atoms and nonzeros as the 1 that share its factor, got 2 of 4 "
        "atoms, dense; make them equal",
    ),
}


@pytest.mark.parametrize("case", UNEQUAL)
def test_a_group_of_two_sizes_is_refused(case: str, give) -> None:
    entries, units, words = UNEQUAL[case]
    _, problems = give(entries, units)
    assert len(problems) == 1
    assert problems[0].endswith(words)


def test_problems_come_together_up_to_a_page(give) -> None:
    strangers = [entry(f"z{number}") for number in range(SHOWN + 5)]
    _, problems = give([entry("a", rank=0), *strangers])
    assert len([p for p in problems if "is no linear" in p]) == SHOWN
    assert any(p.endswith("and 5 problems more") for p in problems)
    assert any("a: rank must be" in p for p in problems)
    assert any("b: is targeted but not there" in p for p in problems)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    problems: list[str] = []
    assert read_given(str(tmp_path / "no.json"), "stages[0].decompose", problems) is None
    assert "stages[0].decompose.plan" in problems[0]
    assert "no.json cannot be read: no such file" in problems[0]


def plain(name: str, atoms: Any, nonzeros: Any) -> dict[str, Any]:
    return learnt(name, "dictionary", atoms, nonzeros)


def dictionaries(method: str) -> list[Unit]:
    return units_of(
        Matrix(name, 0, (8, 12), 0, method, "dictionary", None, BITS, BITS) for name in "ab"
    )


@pytest.mark.parametrize("method", ["cospadi", "compot", "rocket", "dictionary"])
def test_dictionaries_of_any_ratio_are_taken(method: str, give) -> None:
    units, problems = give([plain("a", 4, 1), plain("b", 3, 3)], dictionaries(method))
    assert problems == []
    assert [unit.sizes for unit in units] == [
        {"atoms": 4, "nonzeros": 1},
        {"atoms": 3, "nonzeros": 3},
    ]


WRONG_SIZES = {
    "more atoms than a complete basis": (
        plain("b", 9, 2),
        "b: atoms must be in [1, 8] for [8, 12], got 9; lower it, or make it dense",
    ),
    "no coefficients": (
        plain("b", 4, 0),
        "b: nonzeros must be in [1, 8] for [8, 12], got 0; lower it, or make it dense",
    ),
    "more coefficients than atoms": (
        plain("b", 3, 4),
        "b: nonzeros must be in [1, 3], the number of atoms; got 4; correct it, or make it dense",
    ),
    "half an atom": (
        plain("b", 3.5, 2),
        "b: atoms must be a whole number for dictionary, got 3.5; give one, or dense",
    ),
    "too many coefficients for these atoms": (
        plain("b", 6, 4),
        "b: dictionary of nonzeros 4 takes as much as the dense matrix; lower nonzeros to at most "
        "2, or make it dense",
    ),
    "atoms that cost as much alone": (
        plain("b", 8, 2),
        "b: dictionary of nonzeros 2 takes as much as the dense matrix; lower atoms and nonzeros, "
        "or make it dense",
    ),
}


@pytest.mark.parametrize("method", ["cospadi", "compot", "rocket", "dictionary"])
@pytest.mark.parametrize("case", WRONG_SIZES)
def test_sizes_of_dictionaries_that_do_not_fit_are_refused_when_the_plan_is_read(
    case: str, method: str, give
) -> None:
    entry, words = WRONG_SIZES[case]
    _, problems = give([plain("a", 3, 2), entry], dictionaries(method))
    assert len(problems) == 1
    assert problems[0].endswith(words)
