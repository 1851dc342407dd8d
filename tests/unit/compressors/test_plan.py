"""Plans: what is decided from shapes alone, and what is refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from lrc.compressors.layers import LowRank, PivotedLowRank, SparseDictionary
from lrc.compressors.models.architecture import Architecture, Linear
from lrc.compressors.models.source import Source
from lrc.compressors.planning.make import make_plan
from lrc.compressors.planning.plan import Plan
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Model, Recipe

SHAPES = {"attn.q_proj": (64, 64), "attn.k_proj": (16, 64), "mlp.up_proj": (96, 64), "tiny": (2, 2)}


class Skeleton(nn.Module):
    """Some layers of linears on the meta device; all that a plan looks at."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64, device="meta", dtype=torch.bfloat16)
        for layer in range(layers):
            for name, (d_out, d_in) in SHAPES.items():
                module = nn.Linear(d_in, d_out, bias=False, device="meta", dtype=torch.bfloat16)
                self.add_module(f"layers_{layer}_{name}".replace(".", "_"), module)


def plan_of(
    *stages: dict[str, Any],
    layers: int = 2,
    other: Mapping[str, tuple[int, int]] | None = None,
    **calibration: int,
) -> Plan:
    """Plan for a model of equal layers; `other` are shapes by name that some have instead."""
    linears = []
    for layer in range(layers):
        for leaf, shape in SHAPES.items():
            name = f"layers.{layer}.{leaf}"
            linears.append(Linear(name, layer, *(other or {}).get(name, shape), bias=False))
    names = [f"layers.{layer}" for layer in range(layers)]
    architecture = Architecture(Skeleton(layers), names, linears, {})
    recipe = Recipe.model_validate(
        {
            "model": "m",
            "stages": [{"decompose": {"method": "svd", **stage}} for stage in stages],
            "calibration": calibration,
            "output": "o",
        }
    )
    source = Source(Model(path="m"), Path("m"), LlamaConfig(), weights_local=False)
    return make_plan(recipe, source, architecture)


def test_no_matrix_takes_more_than_its_share_and_the_total_is_counted() -> None:
    plan = plan_of({"keep": 0.5})
    assert len(plan.matrices) == 8
    for m in plan.matrices:
        if m.rank is not None:
            assert (
                m.bits == LowRank.stored_bits(*m.shape, bits=16, rank=m.rank) <= 0.5 * m.source_bits
            )
    assert plan.bits == sum(m.bits for m in plan.matrices)
    assert plan.kept == plan.bits / plan.source_bits
    assert plan.bytes - plan.compressed_bytes == (plan.source_bits - plan.bits) // 8


def test_a_matrix_too_small_for_any_rank_stays_dense_and_says_why() -> None:
    tiny = [m for m in plan_of({"keep": 0.5}).matrices if m.name.endswith("tiny")]
    assert {m.form for m in tiny} == {"dense"}
    assert tiny[0].note == "too small: rank 1 needs more than 50% of its bits"
    assert tiny[0].bits == tiny[0].source_bits


def test_factors_larger_than_the_matrix_are_not_made() -> None:
    override = {"match": "*.q_proj", "rank": 33}  # 33 (64 + 64) > 64 * 64
    plan = plan_of({"keep": 0.5, "overrides": [override]})
    q = plan.matrices[0]
    assert (q.form, q.note) == ("dense", "factors of rank 33 would be larger than the matrix")


def test_skipped_matrices_do_not_count() -> None:
    plan = plan_of({"keep": 0.5, "skip": ["*.k_proj", "*tiny"]})
    assert [m.name for m in plan.matrices] == [
        f"layers.{layer}.{name}" for layer in range(2) for name in ("attn.q_proj", "mlp.up_proj")
    ]


def test_the_first_override_that_matches_wins() -> None:
    overrides = [{"match": "layers.0.*q_proj", "rank": 3}, {"match": "*q_proj", "keep": 1.0}]
    plan = plan_of({"keep": 0.5, "overrides": overrides})
    q = [m for m in plan.matrices if m.name.endswith("q_proj")]
    assert (q[0].rank, q[1].rank, q[1].note) == (3, None, "keep is 1")


def test_two_stages_share_the_model() -> None:
    first = {"keep": 0.5, "targets": ["*attn*"]}
    plan = plan_of(first, {"keep": 0.7, "targets": ["*mlp*"]})
    assert [m.stage for m in plan.matrices] == [0, 0, 1, 0, 0, 1]  # in the order of the model


def test_a_matrix_is_claimed_once() -> None:
    with pytest.raises(RecipeError, match=r"stages\[1\].*already compressed by stages\[0\]"):
        plan_of({"keep": 0.5}, {"keep": 0.5, "targets": ["*.q_proj"]})


def test_every_refusal_comes_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(
            {
                "keep": 0.5,
                "skip": ["*.q_porj"],
                "overrides": [{"match": "*.k_proj", "rank": 17}, {"match": "*nothing*", "rank": 1}],
            }
        )
    text = "\n".join(caught.value.problems)
    assert "skip: the pattern '*.q_porj' matches no linear layer; did you mean '*.q_proj'?" in text
    assert "overrides[0].rank: must be in [1, 16]" in text
    assert "(and 1 more of this kind)" in text  # the second layer's k_proj
    assert "overrides[1].match: the pattern '*nothing*'" in text


def test_a_plan_that_makes_nothing_smaller_is_refused() -> None:
    with pytest.raises(RecipeError, match="every targeted matrix stays dense"):
        plan_of({"keep": 1.0})


def test_few_calibration_tokens_are_a_warning() -> None:
    assert plan_of({"keep": 0.5, "method": "svd"}, samples=1, length=8).warnings == []
    warnings = plan_of({"keep": 0.5, "method": "svd-llm"}, samples=1, length=8).warnings
    assert len(warnings) == 1  # the tiny matrices stay dense but would have had enough
    assert "8 tokens are few" in warnings[0]
    assert "input width 64; 256 or more are advised" in warnings[0]


@pytest.mark.parametrize(("method", "said"), [("svd-llm", 1), ("wanda", 1), ("kfac", 0)])
def test_an_allocation_by_losses_that_do_not_compare_is_warned_of(method: str, said: int) -> None:
    stage = {"method": method, "keep": 0.5, "allocation": "lagrangian"}
    warnings = plan_of(stage).warnings
    assert sum("mostly far worse than uniform" in text for text in warnings) == said


def test_a_plan_is_json() -> None:
    plan = plan_of({"keep": 0.5})
    value = json.loads(json.dumps(plan.to_json()))
    assert value["totals"]["kept"] == plan.kept
    assert value["matrices"][0]["shape"] == [64, 64]
    assert set(plan.modules()) == {m.name for m in plan.matrices if m.rank}


LINEARS = 2 * sum(d_out * d_in for d_out, d_in in SHAPES.values())


def refusal(*stages: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        plan_of(*stages)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize("measure", ["bits", "macs"])
def test_pivoted_factors_have_more_rank_for_the_same_budget(measure: str) -> None:
    plain = plan_of({"keep": 0.5, "measure": measure})
    pivoted = plan_of({"keep": 0.5, "measure": measure, "storage": "pivot"})
    for m, p in zip(plain.matrices, pivoted.matrices, strict=True):
        if m.rank is not None and p.rank is not None:
            assert (m.form, p.form) == ("low_rank", "pivoted_low_rank")
            assert p.rank >= m.rank
            cost = (
                p.bits if measure == "bits" else PivotedLowRank.multiply_adds(*p.shape, rank=p.rank)
            )
            dense = p.source_bits if measure == "bits" else p.shape[0] * p.shape[1]
            assert cost <= 0.5 * dense
            assert p.bits < p.source_bits
    ranks = [sum(m.rank or 0 for m in plan.matrices) for plan in (plain, pivoted)]
    assert ranks[1] > 1.1 * ranks[0]  # measured 1.13 and 1.15


def test_ranks_are_multiples() -> None:
    ranks = [m.rank for m in plan_of({"keep": 0.5, "rank_multiple": 4}).matrices]
    assert all(rank is None or rank % 4 == 0 for rank in ranks)
    assert len({rank for rank in ranks if rank}) > 1


@pytest.mark.parametrize("allocation", ["lagrangian", "heavy-tail"])
def test_an_allocation_leaves_ranks_pending_within_a_budget(allocation: str) -> None:
    override = {"match": "*.q_proj", "rank": 8}
    plan = plan_of({"keep": 0.5, "allocation": allocation, "overrides": [override]})
    fixed = [m for m in plan.matrices if m.name.endswith("q_proj")]
    rest = [m for m in plan.matrices if m not in fixed]
    assert {(m.pending, m.rank) for m in fixed} == {(None, 8)}
    assert {(m.pending, m.rank, m.form) for m in rest} == {(allocation, None, "low_rank")}
    assert plan.budgets == [int(0.5 * LINEARS * 16) - sum(m.bits for m in fixed)]
    assert 0.49 < plan.kept <= 0.5  # of the pending matrices the even share counts
    assert plan.modules().keys() == {m.name for m in fixed}


@pytest.mark.parametrize("allocation", ["uniform", "lagrangian"])
def test_a_size_leaves_what_the_rest_of_the_file_does_not_take(allocation: str) -> None:
    plan = plan_of({"size": "43kB", "allocation": allocation})
    rest = plan.bytes - plan.source_bits // 8
    budget = plan.budgets[0]
    spent = plan.bits if budget is None else budget
    headers = 43_000 - rest - spent / 8
    assert 0 < headers < 6000  # of 20 and more tensors
    assert 0.3 < plan.kept < 0.7


def test_biases_that_a_layer_had_not_are_counted() -> None:
    for lord, svd in zip(
        plan_of({"keep": 0.5, "method": "lord"}).matrices,
        plan_of({"keep": 0.5}).matrices,
        strict=True,
    ):
        if lord.rank is not None:
            assert lord.bias == "added"
            assert lord.bits <= 0.5 * lord.source_bits
            assert lord.bits == replace(lord, bias=None).at(lord.rank).bits + lord.shape[0] * 16
            assert lord.rank <= (svd.rank or 0)


def test_the_same_matrix_of_layers_in_a_row_shares_a_factor() -> None:
    plan = plan_of({"method": "basis-sharing", "keep": 0.5}, layers=5)
    up = [m for m in plan.matrices if m.name.endswith("up_proj")]
    assert [m.group and m.group.split(".")[1] for m in up] == ["0", "0", "2", "2", None]
    assert [m.form for m in up] == ["low_rank", "shared_low_rank"] * 2 + ["low_rank"]
    assert up[0].rank == up[1].rank
    assert up[0].bits + up[1].bits <= 0.5 * 2 * up[0].source_bits
    assert up[0].rank > up[4].rank  # sharing pays for rank


def test_the_same_matrix_of_layers_in_a_row_shares_a_dictionary() -> None:
    plan = plan_of({"method": "cospadi", "keep": 0.7, "group_size": 3}, layers=4)
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


def test_groups_of_one_dictionary_are_none() -> None:
    stage = {"method": "cospadi", "keep": 0.5}
    assert plan_of({**stage, "group_size": 1}) == plan_of(stage)


@pytest.mark.parametrize("method", ["basis-sharing", "cospadi"])
def test_groups_of_unequal_shapes_are_refused(method: str) -> None:
    stage = {"method": method, "keep": 0.5, "group_size": 2}
    other = {"layers.1.mlp.up_proj": (80, 64)}
    with pytest.raises(RecipeError) as caught:
        plan_of(stage, layers=3, other=other)
    assert caught.value.problems == [
        "stages[0].decompose.group_size: what shares must have one shape, got "
        "layers.0.mlp.up_proj [96, 64] and layers.1.mlp.up_proj [80, 64]; give each shape a stage "
        "of its own, or list one of the two under 'skip' (and 1 more of this kind)"
    ]
    # Both remedies help, and what would not share anyway is left alone.
    skipped = plan_of({**stage, "skip": ["layers.1.*up_proj"]}, layers=3, other=other)
    assert len(skipped.matrices) == 3 * len(SHAPES) - 1
    apart = {**stage, "skip": ["layers.1.*"]}, {**stage, "targets": ["layers.1.*"]}
    assert not any(m.group for m in plan_of(*apart, layers=3, other=other).matrices)
    full = plan_of(stage, layers=4, other={f"layers.{i}.mlp.up_proj": (80, 64) for i in (2, 3)})
    assert all(m.group for m in full.matrices if m.name.endswith("up_proj"))


def test_groups_do_not_cross_what_is_left_out_or_overridden() -> None:
    overrides = [{"match": "layers.4.*.up_proj", "keep": 0.3}]
    stage = {"method": "basis-sharing", "keep": 0.5, "skip": ["layers.1.*"], "group_size": 3}
    plan = plan_of({**stage, "overrides": overrides}, layers=6)
    up = [m for m in plan.matrices if m.name.endswith("up_proj")]
    assert [(m.layer, m.group and m.group.split(".")[1]) for m in up] == [
        (0, None),
        (2, "2"),
        (3, "2"),
        (4, None),
        (5, None),
    ]


TWO_OF_FOUR = {"method": "sparse", "pattern": "2:4", "skip": ["*tiny"]}


def test_pruned_two_of_four_every_matrix_has_its_one_size() -> None:
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


def test_without_a_pattern_nothing_says_so() -> None:
    plan = plan_of({"method": "magnitude", "keep": 0.6})
    assert {m.pattern for m in plan.matrices} == {None}
    assert not any("pattern" in spec for spec in plan.modules().values())


def test_dictionaries_two_of_four_keep_to_their_share() -> None:
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
        "[16, 64] with pattern 2:4, got 0.5; raise keep or list the layer under 'skip' (and 5 more "
        "of this kind)",
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
        "under 'skip' (and 1 more of this kind)",
    ),
    "inputs not in fours": (
        {"keep": 0.8, "skip": []},
        "stages[0].decompose.pattern: layers.0.tiny: pattern 2:4 needs inputs in fours, got a "
        "weight [2, 2]; list the layer under 'skip' or take pattern: unstructured (and 1 more of "
        "this kind)",
    ),
    "fewer than four atoms": (
        {"method": "compot", "keep": 0.8, "skip": []},
        "stages[0].decompose.pattern: layers.0.tiny: pattern 2:4 needs four atoms or more, got a "
        "weight [2, 2]; list the layer under 'skip' or take pattern: unstructured (and 1 more of "
        "this kind)",
    ),
    "a floor above the one size": (
        {"keep": 0.8, "min_keep": 0.7},
        "stages[0].decompose.keep: must be at least 1 of the bits, which the cheapest choice takes,"
        " got 0.8; raise keep, lower 'min_keep' (0.7)",
    ),
}


@pytest.mark.parametrize("case", PATTERN_REFUSED)
def test_what_a_pattern_has_no_size_for_is_refused(case: str) -> None:
    changes, expected = PATTERN_REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        plan_of({**TWO_OF_FOUR, **changes})
    assert caught.value.problems == [expected]


@pytest.mark.parametrize("stage", [{}, {"allocation": "uniform"}])
def test_the_smallest_share_that_is_named_can_be_met(stage: dict[str, Any]) -> None:
    least = 0.5627 if not stage else 0.563
    plan = plan_of({**TWO_OF_FOUR, **stage, "keep": least})
    assert plan.kept <= least


@pytest.mark.parametrize("method", ["cospadi", "compot", "rocket", "dictionary"])
@pytest.mark.parametrize("ratio", [1, 1.5, 2.5, 4])
def test_dictionaries_have_the_ratio_that_is_asked_for(method: str, ratio: float) -> None:
    stage = {"method": method, "keep": 0.6, "allocation": "uniform", "ratio": ratio}
    sized = [m for m in plan_of(stage).matrices if m.sizes is not None]
    assert len(sized) == 6  # all but the tiny ones
    for m in sized:
        assert m.sizes["atoms"] == min(round(ratio * m.sizes["nonzeros"]), *m.shape)
        assert m.bits == SparseDictionary.stored_bits(*m.shape, bits=16, **m.sizes)
        assert m.bits <= 0.6 * m.source_bits


def test_without_a_word_the_published_methods_have_twice_as_many_atoms_and_ours_three_times() -> (
    None
):
    for method, ratio in (("cospadi", 2), ("compot", 2), ("rocket", 2), ("dictionary", 3)):
        plan = plan_of({"method": method, "keep": 0.5, "allocation": "uniform"})
        (sizes,) = {tuple(m.sizes.values()) for m in plan.matrices if m.shape == (64, 64)}
        assert sizes[0] == ratio * sizes[1]


def test_several_ratios_wait_for_the_allocation() -> None:
    plan = plan_of({"method": "dictionary", "keep": 0.6, "ratio": [3, 1.5]})
    assert {m.pending for m in plan.matrices} == {"lagrangian"}


def test_what_a_dictionary_would_need_is_said_of_one_that_is_too_small() -> None:
    plan = plan_of({"method": "dictionary", "keep": 0.5, "allocation": "uniform", "ratio": 20})
    notes = {m.name: m.note for m in plan.matrices if m.note}
    assert notes["layers.0.attn.k_proj"] == (
        "too small: 1 of 16 atoms needs more than 50% of its bits"
    )


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no rank of that multiple": (
        [{"keep": 0.5, "rank_multiple": 64}],
        "rank_multiple: must be in [1, 38]",
    ),
    "multiples that cost too much": (
        [{"keep": 0.2, "rank_multiple": 24, "allocation": "lagrangian"}],
        "keep: must be at least 0.7",
    ),
    "nothing left by the multiple": (
        [{"keep": 0.2, "rank_multiple": 24}],
        "lower 'rank_multiple', or raise 'keep'",
    ),
    "a floor between two ranks": (
        [{"keep": 0.5, "rank_multiple": 10, "min_keep": 0.49}],
        "min_keep: layers.0.",
    ),
    "a floor above the size": (
        [{"size": "30kB", "min_keep": 0.9, "allocation": "lagrangian"}],
        "size: must be at least",
    ),
    "a cap without predictions": (
        [{"keep": 0.5, "max_loss": 0.1}],
        "max_loss: needs allocation: lagrangian",
    ),
    "overrides that take it all": (
        [
            {
                "keep": 0.2,
                "allocation": "lagrangian",
                "overrides": [{"match": "*.q_proj", "keep": 0.9}],
            }
        ],
        "which the cheapest choice takes beside what the overrides fix",
    ),
    "a size that the rest exceeds": (
        [{"size": "10kB"}],
        "size: must be above",
    ),
    "a size above the dense model": (
        [{"size": "1GB"}],
        "of the dense model, got 1GB (1,000,000,000); lower size",
    ),
    "a size for two stages": (
        [{"size": "43kB", "targets": ["*mlp*"]}, {"keep": 0.5, "targets": ["*attn*"]}],
        "size: must be the budget of a single stage, got 2 stages",
    ),
    "atoms that leave no room for coefficients": (
        [{"method": "dictionary", "keep": 0.5, "ratio": [2, 70], "targets": ["*q_proj"]}],
        "stages[0].decompose.ratio: must be in [1, 61], beyond which the smallest dictionaries are "
        "as large as the matrices of this stage, got 70; lower it",
    ),
    "nothing left by the atoms": (
        [{"method": "compot", "keep": 0.4, "allocation": "uniform", "ratio": 50}],
        "every targeted matrix stays dense, so nothing would be smaller; "
        "raise 'keep' or 'size', or lower 'ratio'",
    ),
    "groups larger than the model": (
        [{"method": "basis-sharing", "keep": 0.5, "group_size": 3}],
        "group_size: must be in [2, 2], the number of layers, got 3",
    ),
    "groups of dictionaries larger than the model": (
        [{"method": "cospadi", "keep": 0.5, "group_size": 3}],
        "group_size: must be in [1, 2], the number of layers, got 3; lower group_size",
    ),
    "means behind a compressed prefix": (
        [{"method": "lord", "keep": 0.5, "compensate": {}}],
        "lord cannot stand beside 'compensate'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_met_is_refused_with_a_remedy(case: str) -> None:
    stages, words = REFUSED[case]
    text = refusal(*stages)
    assert words in text
    assert ";" in text


def test_refusals_of_several_stages_come_together() -> None:
    text = refusal(
        {"keep": 0.5, "max_loss": 0.1, "targets": ["*mlp*"]},
        {"keep": 0.1, "allocation": "lagrangian", "rank_multiple": 60, "targets": ["*attn*"]},
    )
    assert "stages[0].decompose.max_loss" in text
    assert "stages[1].decompose.rank_multiple" in text
