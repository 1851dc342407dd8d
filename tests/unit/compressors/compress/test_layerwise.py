"""Compress a chain of linears: biases, groups, fallbacks, plans that are read back."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.linear_chain import (
    BOTH,
    LAYERS,
    NAMES,
    WIDTH,
    Chain,
    plan_of,
    plan_with,
    run,
    stored,
    task_of,
    weight_of,
)
from torch import Tensor

from lrc.compressors.compress.layerwise import layer_file
from lrc.compressors.io.journal import Journal
from lrc.compressors.layers import COMPONENTS, QuantizationArgs
from lrc.compressors.layers.pivot_rows import NoPivotRows
from lrc.compressors.planning.allocate import allocate
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.summary import summarize
from lrc.compressors.planning.tasks import QuantizationTask
from lrc.compressors.solvers.moments import Statistics


@pytest.mark.parametrize("types", ["low_rank", "pivoted_low_rank"])
@pytest.mark.parametrize("source_bias", [True, False])
def test_a_bias_keeps_the_mean_output(
    types, source_bias, tmp_path, linears, statistics, tokens
) -> None:
    plan = plan_of("lord", types=types, source_bias=source_bias)
    done, journal = run(plan, tmp_path, linears, statistics)
    task = done.tasks[0]
    bias = stored(done, journal)(f"{task.name}.bias")
    mean = tokens.mean(dim=0)
    W, before = linears.read(f"{task.name}.weight"), linears.read(f"{task.name}.bias")
    expected = W @ mean + (before if source_bias else 0)
    torch.testing.assert_close(weight_of(done, task.name, journal) @ mean + bias, expected)
    assert done.modules()[task.name].bias is True
    without = replace(task.config, bias=False)
    assert task.bits - task.bits_of(without) == (not source_bias) * WIDTH * 32


def test_a_two_sided_method_predicts_nats_that_add_up(tmp_path, linears, statistics) -> None:
    plan = plan_of("kfac")
    done, _ = run(plan, tmp_path / "a", linears, statistics)
    assert all(done.results[name].predicted_nats > 0 for name in NAMES)
    # The allocation predicts what compression finds.
    arguments: Any = (plan, linears, Journal(tmp_path / "b"), statistics)
    predicted = allocate(*arguments, device="cpu", on_step=lambda *_: None, predict_all=True)
    for name in NAMES:
        there, here = done.results[name], predicted.results[name]
        assert there.predicted_nats == pytest.approx(here.predicted_nats, rel=1e-9)
        assert there.relative_error == pytest.approx(here.relative_error, rel=1e-9)
    assert plan.results == {}


def test_layers_of_a_group_are_solved_together(tmp_path, linears, statistics) -> None:
    owner, member = "layers.0.in", "layers.1.in"
    plan = plan_with(
        [
            task_of(owner, member, method="basis-sharing"),
            *(task_of(n, method="svd-llm") for n in NAMES if n not in (owner, member)),
        ]
    )
    done, journal = run(plan, tmp_path, linears, statistics)
    assert {row.name for row in summarize(done)} == {*NAMES}
    assert [row.layer for row in summarize(done)] == [0, 0, 1, 1, 2, 2]
    assert done.modules()[member].shares == owner
    assert done.modules()[owner].shares is None
    W_hats = torch.cat([weight_of(done, name, journal) for name in (owner, member)])
    assert int(torch.linalg.matrix_rank(W_hats)) == 4
    # The sum of the moments weighs both: no other matrix of rank 4 is closer.
    H = sum(statistics(weight).inputs.whole() for weight in done.tasks[0].weights)
    L = torch.linalg.cholesky(H)
    W = torch.cat([linears.read(f"{name}.weight") for name in (owner, member)]).double()
    values = torch.linalg.svdvals(W @ L)
    lost = (((W - W_hats.double()) @ L) ** 2).sum()
    assert float(lost) == pytest.approx(float((values[4:] ** 2).sum()), rel=1e-4)


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_every_member_of_a_quantized_group_uses_the_quantized_factor(
    quantizer, tmp_path, linears, statistics
) -> None:
    """Coefficients of all members must match the factor that the first one stores."""
    names = "layers.0.in", "layers.1.in"
    task = task_of(*names, method="basis-sharing", rank=6)
    args = QuantizationArgs(8)
    how = QuantizationTask(0, quantizer, args)
    quantized = replace(task, config=how.applied_to(task.config), quantize=how)
    plain, journal = run(plan_with([task]), tmp_path / "a", linears, statistics)
    done, other = run(plan_with([quantized]), tmp_path / "b", linears, statistics)
    assert done.results[names[0]].config.quantization == args
    for name in names:
        W, W_hat = weight_of(plain, name, journal), weight_of(done, name, other)
        assert 0 < float((W - W_hat).norm() / W.norm()) < 0.03  # two factors of 8 bits


def test_factors_without_pivots_are_stored_as_two_factors(
    tmp_path, linears, statistics, monkeypatch
) -> None:
    def fail(B: Tensor, A: Tensor) -> dict[str, Tensor]:
        raise NoPivotRows("no pivot rows were found")

    monkeypatch.setattr(COMPONENTS["pivoted_low_rank"], "encode", staticmethod(fail))
    plan = plan_of("svd", types="pivoted_low_rank", rank=6)
    done, _ = run(plan, tmp_path, linears, statistics)
    for task in plan.tasks:
        result = done.results[task.name]
        assert result.config.types == "low_rank"
        assert task.bits_of(result.config) <= task.bits  # the budget of the plan is kept
        larger = SizeSteps(task, "low_rank").config(result.config.sizes["rank"] + 1)
        assert task.bits_of(larger) > task.bits
        assert result.fallback == "stored as low_rank of rank 4: no pivot rows were found"


def test_weights_without_a_calibration_token_stay_dense(tmp_path, linears) -> None:
    done, _ = run(plan_of("svd-llm"), tmp_path, linears, lambda weight: Statistics())
    assert not any(result.config.compressed for result in done.results.values())
    assert done.results[NAMES[0]].fallback == "saw no calibration token; stays dense"
    assert done.modules() == {}


@pytest.mark.parametrize("method", ["svd-llm", "lord", "kfac"])
def test_a_plan_that_is_read_back_gives_the_same_bytes(
    method, tmp_path, linears, statistics, tokens
) -> None:
    """The plan is complete: no recipe is needed after it was compiled."""
    compensate = None if method == "lord" else BOTH
    plan = plan_of(method, compensate=compensate)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    done = [
        run(each, tmp_path / name, linears, statistics, prefix=Chain(linears.tensors, tokens))[0]
        for name, each in {"a": plan, "b": again}.items()
    ]
    assert done[0] == done[1]
    assert len(done[0].results) == len(NAMES)
    assert Plan.from_json(json.loads(json.dumps(done[0].to_json()))) == done[0]
    for layer in range(LAYERS):
        a, b = (tmp_path / name / "work" / layer_file(layer) for name in "ab")
        assert a.read_bytes() == b.read_bytes()
