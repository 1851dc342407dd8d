"""Seconds of the stages of a run, from counted work and given speeds."""

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.estimated_recipes import COMPENSATED, KFAC, LAYERS, LENGTH, MIXED, RATES
from tests.tiny_experts import tiny_experts

from lrc.compressors.estimates import stage_seconds as seconds_of_stages
from lrc.compressors.estimates.fixed_size_work import (
    OPERATION_SECONDS,
    OPERATIONS,
    curve_seconds,
    solution_seconds,
)
from lrc.compressors.estimates.machine_rates import MachineRates
from lrc.compressors.estimates.stage_seconds import stage_seconds
from lrc.compressors.estimates.workload import Workload
from lrc.compressors.prepare import Prepared, prepare
from lrc.compressors.stages import STAGES
from lrc.configs.load import load_recipe


def test_small_matrices_take_the_time_to_start_their_operations_on_a_gpu(
    prepared: Callable[..., Prepared],
) -> None:
    fast = MachineRates(1e18, 1e18, 1e18, ((100, 1e-9), (200, 8e-9)), 1e18, 1e18)
    recipe = prepared(MIXED)
    on_cpu, on_gpu = (stage_seconds(Workload(recipe, kind), fast) for kind in ("cpu", "cuda"))
    assert on_cpu["allocate"] < 1e-3
    # Of each layer the curves of q and o, k and v, gate and up are made together.
    sizes = on_gpu["allocate"] / (4 * LAYERS * OPERATIONS * OPERATION_SECONDS["cuda"])
    assert sizes > 100  # products with the metric


@pytest.mark.parametrize(("method", "masks"), [("sparse", True), ("dictionary", False)])
def test_searches_for_masks_take_elementwise_operations_besides_products(
    prepared: Callable[..., Prepared], method: str, masks: bool
) -> None:
    recipe = prepared([{"decompose": {"method": method, "keep": 0.7}}])
    never = MachineRates(math.inf, math.inf, math.inf, ((100, 1e-9), (200, 8e-9)), 1.0, math.inf)
    work = Workload(recipe, "cpu")
    numbers = sum(math.prod(task.shape) for task in work.tasks)
    assert (curve_seconds(work, never) > OPERATIONS * numbers) is masks
    assert (solution_seconds(work, never) > OPERATIONS * numbers) is masks


def test_time_is_proportional_to_the_text_and_inverse_to_the_speed(
    prepared: Callable[..., Prepared],
) -> None:
    few, many = (
        Workload(prepared(KFAC, calibration={"samples": n, "length": 64}), "cpu")
        for n in (100, 200)
    )
    rates = MachineRates(1e6, 1e6, 1e6, ((100, 1e-2), (200, 8e-2)), 1e6, 1e12)
    once, twice = (stage_seconds(work, rates)["calibrate"] for work in (few, many))
    assert twice / once == pytest.approx(2, rel=0.2)  # the trace and reading do not grow
    slower = MachineRates(5e5, 5e5, 5e5, ((100, 2e-2), (200, 16e-2)), 5e5, 1e12)
    assert stage_seconds(few, slower)["calibrate"] / once == pytest.approx(2, rel=0.01)


def test_runs_without_calibration_take_the_time_of_what_they_convert_read_round_and_write(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [{"quantize": {"method": "rtn", "bits": 8, "embeddings": "int8"}}]
    work = Workload(prepared(stages, evaluate={"perplexity": [], "baselines": []}), "cpu")
    monkeypatch.setattr(Workload, "stored_type", "Q4_1")
    monkeypatch.setattr(seconds_of_stages, "dequantizing_rate", {"Q4_1": 2.0}.get)
    rates = replace(RATES, disk=3.0, rounding=5.0, reading=7.0, hashing=11.0)
    found, plan = stage_seconds(work, rates), work.plan
    linears = sum(linear.d_out * linear.d_in for linear in work.architecture.linears)
    rounded = linears + work.embedding
    assert found.keys() == {"convert", "compress", "save"}
    assert found["convert"] == plan.dense_bytes / 3 + plan.dense_parameters / 2
    written = sum(work.results) / 3
    assert found["compress"] == pytest.approx(rounded / 5 + 2 * rounded / 7 + written)
    assert found["save"] == pytest.approx(plan.compressed_bytes * (1 / 3 + 1 / 7 + 1 / 11))


@pytest.mark.parametrize("stages", [KFAC, MIXED, COMPENSATED], ids=["kfac", "mixed", "svd-llm"])
def test_two_processes_need_half_of_what_is_divided(
    prepared: Callable[..., Prepared], stages: list[dict[str, Any]]
) -> None:
    text = [{"source": "python-docs", "window": 64, "windows": 8}]
    recipe = prepared(
        stages, calibration={"samples": 64, "length": LENGTH}, evaluate={"perplexity": text}
    )
    one, two = (Workload(recipe, "cpu", n) for n in (1, 2))
    assert two.states == one.states / 2
    assert two.scored_share == 1 / 2
    slow = MachineRates(1e6, 1e6, 1e6, ((100, 1.0), (200, 8.0)), 1e6, 1e12)
    alone, each = (stage_seconds(work, slow) for work in (one, two))
    assert alone.keys() == each.keys()
    faster = {stage: alone[stage] / each[stage] for stage in alone.keys() - {"save"}}
    assert each["save"] == alone["save"]  # one small file
    assert all(1.2 < times < 2.01 for times in faster.values()), faster
    if stages != COMPENSATED:  # two of three layers
        assert faster["compress"] == pytest.approx(1.5, rel=0.01)


def test_processes_share_the_cores_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4 * torch.get_num_threads())
    assert RATES.shared(4) == RATES
    assert RATES.shared(8).products == RATES.products / 2
    assert RATES.shared(8).eigenvectors(100) == 2 * RATES.eigenvectors(100)


def test_time_of_experts_counts_the_passes_over_the_text_and_the_experts_of_a_token(
    tiny_recipe: Callable[..., Path],
    make_tokenizer: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_experts("mixtral", hidden_size=32, intermediate_size=32)
    model.save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    recipe = load_recipe(tiny_recipe(tmp_path / "source", tmp_path / "run", stages=COMPENSATED))
    work = Workload(prepare(recipe.recipe, STAGES), "cpu")
    layer = model.model.layers[0]
    of_experts = sum(p.numel() for p in layer.mlp.experts.parameters())
    whole = sum(p.numel() for p in layer.parameters())
    assert work.used_share == pytest.approx(1 - of_experts / 2 / whole)  # two of four experts

    times = {}
    for together in (4, 2, 1):
        monkeypatch.setattr(seconds_of_stages, "EXPERT_BYTES", together * 2 * 4 * 32**2)
        times[together] = stage_seconds(work, RATES)["compress"]
    assert times[1] - times[4] == pytest.approx(3 * (times[2] - times[4]))
    assert times[2] > times[4]

    # Of two processes, each has half of the experts, and q and k or o and v, whose sizes are equal.
    assert seconds_of_stages._input_share(Workload(work.prepared, "cpu", 2)) == 0.5
