"""Plans of layers that share, of patterns and of dictionaries: their sizes from shapes alone."""

from collections.abc import Callable
from typing import Any

import pytest

from lrc.compressors.layers import SparseDictionary
from lrc.compressors.planning.plan import Plan
from lrc.configs.errors import RecipeError

Planner = Callable[..., Plan]


def test_the_same_matrix_of_layers_in_a_row_shares_a_factor(plan_of: Planner) -> None:
    plan = plan_of({"method": "basis-sharing", "keep": 0.5}, layers=5)
    up = [m for m in plan.matrices if m.name.endswith("up_proj")]
    assert [m.group and m.group.split(".")[1] for m in up] == ["0", "0", "2", "2", None]
    assert [m.form for m in up] == ["low_rank", "shared_low_rank"] * 2 + ["low_rank"]
    assert up[0].rank == up[1].rank
    assert up[0].bits + up[1].bits <= 0.5 * 2 * up[0].source_bits
    assert up[0].rank > up[4].rank  # sharing pays for rank


def test_the_same_matrix_of_layers_in_a_row_shares_a_dictionary(plan_of: Planner) -> None:
    plan = plan_of({"method": "cospadi", "keep": 0.7, "layers_per_group": 3}, layers=4)
    up = [m for m in plan.matrices if m.name.endswith("up_proj")]
    assert [m.group for m in up] == [up[0].name] * 3 + [None]
    assert [m.form for m in up] == ["dictionary"] + ["shared_dictionary"] * 2 + ["dictionary"]
    assert up[0].sizes == up[1].sizes == up[2].sizes is not None
    assert sum(m.bits for m in up[:3]) <= 0.7 * 3 * up[0].source_bits
    assert plan.modules()[up[2].name] == {
        "form": "shared_dictionary",
        **up[0].sizes,
        "shares": up[0].name,
    }
    assert up[3].sizes is not None
    assert up[0].sizes["nonzeros"] > up[3].sizes["nonzeros"]  # sharing pays for coefficients
    # Up to as many atoms as the layers together have outputs, and no more than inputs.
    k = next(m for m in plan.matrices if m.name.endswith("k_proj"))
    assert k.sizes is not None
    assert k.shape[0] < k.sizes["atoms"] <= k.shape[1]


def test_groups_of_one_dictionary_are_none(plan_of: Planner) -> None:
    stage = {"method": "cospadi", "keep": 0.5}
    assert plan_of({**stage, "layers_per_group": 1}) == plan_of(stage)


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"method": "svd"}, "low_rank"),
        ({"method": "svd", "storage": "pivoted_low_rank"}, "pivoted_low_rank"),
        ({"method": "mixed"}, "pivoted_low_rank"),
        ({"method": "mixed", "components": ["sparse", "low_rank"]}, "low_rank"),
        ({"method": "wanda"}, "sparse"),
        ({"method": "rocket"}, "dictionary"),
    ],
)
def test_the_recipe_names_the_form_of_a_plan(
    plan_of: Planner, options: dict[str, Any], form: str
) -> None:
    plan = plan_of({"keep": 0.5, **options})
    assert {m.form for m in plan.matrices} - {"dense"} == {form}


@pytest.mark.parametrize("method", ["basis-sharing", "cospadi"])
def test_groups_of_unequal_shapes_are_refused(plan_of: Planner, method: str) -> None:
    stage = {"method": method, "keep": 0.5, "layers_per_group": 2}
    other = {"layers.1.mlp.up_proj": (80, 64)}
    with pytest.raises(RecipeError) as caught:
        plan_of(stage, layers=3, other=other)
    assert list(map(str, caught.value.problems)) == [
        "stages[0].decompose.layers_per_group: what shares must have one shape, got "
        "layers.0.mlp.up_proj [96, 64] and layers.1.mlp.up_proj [80, 64]; give each shape a stage "
        "of its own, or list one of the two under 'ignore' (and 1 more of this kind)"
    ]
    # Both remedies help, and what would not share anyway is left alone.
    skipped = plan_of({**stage, "ignore": ["layers.1.*up_proj"]}, layers=3, other=other)
    assert len(skipped.matrices) == 3 * 4 - 1
    apart = {**stage, "ignore": ["layers.1.*"]}, {**stage, "targets": ["layers.1.*"]}
    assert not any(m.group for m in plan_of(*apart, layers=3, other=other).matrices)
    full = plan_of(stage, layers=4, other={f"layers.{i}.mlp.up_proj": (80, 64) for i in (2, 3)})
    assert all(m.group for m in full.matrices if m.name.endswith("up_proj"))


def test_groups_do_not_cross_what_is_left_out_or_overridden(plan_of: Planner) -> None:
    overrides = [{"match": "layers.4.*.up_proj", "keep": 0.3}]
    stage = {
        "method": "basis-sharing",
        "keep": 0.5,
        "ignore": ["layers.1.*"],
        "layers_per_group": 3,
    }
    plan = plan_of({**stage, "overrides": overrides}, layers=6)
    up = [m for m in plan.matrices if m.name.endswith("up_proj")]
    assert [(m.layer, m.group and m.group.split(".")[1]) for m in up] == [
        (0, None),
        (2, "2"),
        (3, "2"),
        (4, None),
        (5, None),
    ]


TWO_OF_FOUR = {"method": "sparse", "pattern": "2:4", "ignore": ["*tiny"]}


def test_pruned_two_of_four_every_matrix_has_its_one_size(plan_of: Planner) -> None:
    plan = plan_of({**TWO_OF_FOUR, "keep": 0.6, "allocation": "uniform"})
    for m in plan.matrices:
        assert (m.form, m.pattern, m.sizes) == (
            "sparse",
            "2:4",
            {"nonzeros": m.shape[0] * m.shape[1] // 2},
        )
        assert m.bits == m.source_bits * 9 // 16 + 8
    assert {spec["pattern"] for spec in plan.modules().values()} == {"2:4"}
    pending = plan_of({**TWO_OF_FOUR, "keep": 0.6})
    assert {m.pending for m in pending.matrices} == {"lagrangian"}


def test_without_a_pattern_nothing_says_so(plan_of: Planner) -> None:
    plan = plan_of({"method": "magnitude", "keep": 0.6})
    assert {m.pattern for m in plan.matrices} == {None}
    assert not any("pattern" in spec for spec in plan.modules().values())


def test_dictionaries_two_of_four_keep_to_their_share(plan_of: Planner) -> None:
    stage = {**TWO_OF_FOUR, "method": "dictionary", "keep": 0.6, "allocation": "uniform"}
    for m in plan_of(stage).matrices:
        assert m.sizes is not None
        assert m.sizes["atoms"] % 4 == 0
        assert m.sizes["nonzeros"] == m.sizes["atoms"] // 2
        assert m.bits <= 0.6 * m.source_bits
        larger = {name: size + size // m.sizes["nonzeros"] * 2 for name, size in m.sizes.items()}
        assert m.at(larger).bits > 0.6 * m.source_bits


PATTERN_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a share below the one size": (
        {"keep": 0.5, "allocation": "uniform"},
        "stages[0].decompose.keep: must be at least 0.563 of the bits for layers.0.attn.k_proj "
        "[16, 64] with pattern 2:4, got 0.5; raise keep or list the layer under 'ignore' (and 5 "
        "more of this kind)",
    ),
    "a budget below the one size": (
        {"keep": 0.5},
        "stages[0].decompose.keep: must be at least 0.5627 of the bits, which the cheapest choice "
        "takes, got 0.5; raise keep",
    ),
    "an override below the one size": (
        {"keep": 0.8, "overrides": [{"match": "*.q_proj", "keep": 0.3}]},
        "stages[0].decompose.overrides[0].keep: must be at least 0.5627 of the bits for "
        "layers.0.attn.q_proj [64, 64] with pattern 2:4, got 0.3; raise keep or list the layer "
        "under 'ignore' (and 1 more of this kind)",
    ),
    "inputs not in fours": (
        {"keep": 0.8, "ignore": []},
        "stages[0].decompose.pattern: layers.0.tiny: pattern 2:4 needs inputs in fours, got a "
        "weight [2, 2]; list the layer under 'ignore' or take pattern: unstructured (and 1 more of "
        "this kind)",
    ),
    "fewer than four atoms": (
        {"method": "compot", "keep": 0.8, "ignore": []},
        "stages[0].decompose.pattern: layers.0.tiny: pattern 2:4 needs four atoms or more, got a "
        "weight [2, 2]; list the layer under 'ignore' or take pattern: unstructured (and 1 more of "
        "this kind)",
    ),
    "a floor above the one size": (
        {"keep": 0.8, "min_keep": 0.7},
        "stages[0].decompose.keep: must be at least 1 of the bits, which the cheapest choice takes,"
        " got 0.8; raise keep, lower 'min_keep' (0.7)",
    ),
}


@pytest.mark.parametrize("case", PATTERN_REFUSED)
def test_what_a_pattern_has_no_size_for_is_refused(plan_of: Planner, case: str) -> None:
    changes, expected = PATTERN_REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        plan_of({**TWO_OF_FOUR, **changes})
    assert list(map(str, caught.value.problems)) == [expected]


@pytest.mark.parametrize("stage", [{}, {"allocation": "uniform"}])
def test_the_smallest_share_that_is_named_can_be_met(
    plan_of: Planner, stage: dict[str, Any]
) -> None:
    least = 0.5627 if not stage else 0.563
    plan = plan_of({**TWO_OF_FOUR, **stage, "keep": least})
    assert plan.kept <= least


@pytest.mark.parametrize("method", ["cospadi", "compot", "rocket", "dictionary"])
@pytest.mark.parametrize("ratio", [1, 1.5, 2.5, 4])
def test_dictionaries_have_the_ratio_that_is_asked_for(
    plan_of: Planner, method: str, ratio: float
) -> None:
    stage = {"method": method, "keep": 0.6, "allocation": "uniform", "ratio": ratio}
    sized = [m for m in plan_of(stage).matrices if m.sizes is not None]
    assert len(sized) == 6  # all but the tiny ones
    for m in sized:
        assert m.sizes["atoms"] == min(round(ratio * m.sizes["nonzeros"]), *m.shape)
        assert m.bits == SparseDictionary.stored_bits(*m.shape, bits=16, **m.sizes)
        assert m.bits <= 0.6 * m.source_bits


def test_without_a_word_the_published_methods_have_twice_as_many_atoms_and_ours_three_times(
    plan_of: Planner,
) -> None:
    for method, ratio in (("cospadi", 2), ("compot", 2), ("rocket", 2), ("dictionary", 3)):
        plan = plan_of({"method": method, "keep": 0.5, "allocation": "uniform"})
        (sizes,) = {tuple(m.sizes.values()) for m in plan.matrices if m.shape == (64, 64)}
        assert sizes[0] == ratio * sizes[1]


def test_several_ratios_wait_for_the_allocation(plan_of: Planner) -> None:
    plan = plan_of({"method": "dictionary", "keep": 0.6, "ratio": [3, 1.5]})
    assert {m.pending for m in plan.matrices} == {"lagrangian"}


def test_what_a_dictionary_would_need_is_said_of_one_that_is_too_small(plan_of: Planner) -> None:
    plan = plan_of({"method": "dictionary", "keep": 0.5, "allocation": "uniform", "ratio": 20})
    notes = {m.name: m.note for m in plan.matrices if m.note}
    assert notes["layers.0.attn.k_proj"] == (
        "too small: 1 of 16 atoms needs more than 50% of its bits"
    )
