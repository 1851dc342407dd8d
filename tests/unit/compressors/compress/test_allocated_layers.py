"""Choose sizes for a chain of linears, and compress it to them."""

import json
from dataclasses import replace
from typing import Any

import torch
from tests.linear_chain import NAMES, TOKENS, WIDTH, plan_with, run, task_of

from lrc.compressors.io.journal import Journal
from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.planning.allocate import allocate
from lrc.compressors.planning.measures import BITS
from lrc.compressors.planning.plan import Allocation, Plan
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.tasks import QuantizationTask, Weight
from lrc.compressors.solvers.moments import Moment, Statistics


def test_whole_weights_in_integers_keep_the_prediction_of_their_allocation(
    tmp_path, linears, statistics
) -> None:
    """Quantization measures a loss under the inputs only, which predicts no nats."""
    int4 = QuantizationArgs(4)
    tasks = [
        task_of(name, method="mixed", rank=None, quantize=QuantizationTask(0, "gptq"))
        for name in NAMES
    ]
    allocation = Allocation(0, "lagrangian", 0, BITS, (), quantization=(int4,), keep=0.2)
    budget = sum(SizeSteps(task, "dense", int4).cost(1, BITS) for task in tasks)
    pending = [replace(task, allocation=0, estimated_bits=budget // len(tasks)) for task in tasks]
    plan = plan_with(pending, allocations=[replace(allocation, budget=budget)])
    arguments: Any = (plan, linears, Journal(tmp_path / "a"), statistics)
    planned = allocate(*arguments, device="cpu", on_step=lambda *_: None)
    done, _ = run(planned, tmp_path / "b", linears, statistics)
    for name in NAMES:
        before, after = planned.results[name], done.results[name]
        assert after.config == before.config
        assert str(after.config.quantization) == "int4"
        assert after.predicted_nats == before.predicted_nats > 0
        assert after.relative_error != before.relative_error


def test_an_allocation_from_a_plan_that_is_read_back_is_the_same(
    tmp_path, linears, statistics
) -> None:
    tasks = [task_of(name, method="kfac", rank=None) for name in NAMES]
    total = sum(task.dense_bits for task in tasks)
    allocation = Allocation(0, "lagrangian", int(0.6 * total), BITS, ("low_rank",), keep=0.6)
    pending = [
        replace(task, allocation=0, estimated_bits=int(0.6 * task.dense_bits)) for task in tasks
    ]
    plan = plan_with(pending, allocations=[allocation])
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    done = []
    for name, each in {"a": plan, "b": again}.items():
        arguments: Any = (each, linears, Journal(tmp_path / name), statistics)
        done.append(allocate(*arguments, device="cpu", on_step=lambda *_: None))
    assert done[0] == done[1]
    assert done[0].results
    assert done[0].bits <= 0.6 * total


def test_weights_with_zero_statistics_get_an_average_fraction_and_unmeasured_ones_stay_dense(
    tmp_path, linears, statistics
) -> None:
    """Zeros on one side of a layer allow ranks, no token at all does not."""
    tasks = [task_of(name, method="svd-llm", rank=None) for name in NAMES]
    total = sum(task.dense_bits for task in tasks)
    allocation = Allocation(0, "lagrangian", int(0.6 * total), BITS, ("low_rank",), keep=0.6)
    pending = [
        replace(task, allocation=0, estimated_bits=int(0.6 * task.dense_bits)) for task in tasks
    ]
    plan = plan_with(pending, allocations=[allocation])

    def known(weight: Weight) -> Statistics:
        if weight.name == NAMES[0]:
            return Statistics(TOKENS, Moment.of(torch.zeros(WIDTH, WIDTH)))
        return Statistics() if weight.name == NAMES[1] else statistics(weight)

    arguments: Any = (plan, linears, Journal(tmp_path), known)
    done = allocate(*arguments, device="cpu", on_step=lambda *_: None)
    assert not any(task.pending for task in done.tasks)
    zeros = done.tasks[0]
    rank = zeros.config.sizes["rank"]
    larger = zeros.bits_of(SizeSteps(zeros, "low_rank").config(rank + 1))
    assert zeros.bits <= 0.6 * zeros.dense_bits < larger
    assert zeros.name not in done.results
    assert done.tasks[1].note == "saw no calibration token; stays dense"
    assert done.bits <= 0.6 * total
    assert all("rank" in task.config.sizes for task in done.tasks[2:])
