"""Plans: what is decided from shapes alone, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from lrc.compressors.layers import LowRank
from lrc.compressors.models.architecture import Architecture, Linear
from lrc.compressors.models.source import Source
from lrc.compressors.plan import Plan
from lrc.compressors.planning import make_plan
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Model, Recipe

SHAPES = {"attn.q_proj": (64, 64), "attn.k_proj": (16, 64), "mlp.up_proj": (96, 64), "tiny": (2, 2)}


class Skeleton(nn.Module):
    """Two layers of linears on the meta device; all that a plan looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64, device="meta", dtype=torch.bfloat16)
        for layer in range(2):
            for name, (d_out, d_in) in SHAPES.items():
                module = nn.Linear(d_in, d_out, bias=False, device="meta", dtype=torch.bfloat16)
                self.add_module(f"layers_{layer}_{name}".replace(".", "_"), module)


def plan_of(*stages: dict[str, Any], **calibration: int) -> Plan:
    linears = [
        Linear(f"layers.{layer}.{name}", layer, d_out, d_in, bias=False)
        for layer in range(2)
        for name, (d_out, d_in) in SHAPES.items()
    ]
    architecture = Architecture(Skeleton(), ["layers.0", "layers.1"], linears, {})
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
            assert m.bits == LowRank.stored_bits(*m.shape, m.rank, bits=16) <= 0.5 * m.source_bits
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


def test_a_plan_is_json() -> None:
    plan = plan_of({"keep": 0.5})
    value = json.loads(json.dumps(plan.to_json()))
    assert value["totals"]["kept"] == plan.kept
    assert value["matrices"][0]["shape"] == [64, 64]
    assert set(plan.modules()) == {m.name for m in plan.matrices if m.rank}
