"""Time and disk space of training, against what is counted independently."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from lrc.compressors.estimates.disk_space import disk_space
from lrc.compressors.estimates.machine_rates import EFFICIENCY, MachineRates
from lrc.compressors.estimates.stage_seconds import stage_seconds
from lrc.compressors.estimates.training_seconds import (
    DEQUANTIZATION,
    START,
    measurements,
)
from lrc.compressors.estimates.workload import Workload
from lrc.compressors.heal.budget import StepBudget
from lrc.compressors.prepare import prepare
from lrc.compressors.stages import STAGES
from lrc.configs.load import load_recipe

LENGTH, BATCH, HELD_OUT, RATE = 32, 2, 64, 1e6
MATRICES = 2 * (32 * (32 + 2 * 16 + 32) + 3 * 32 * 48)
"""Numbers in the matrices of the two layers."""
EIGENPROBLEMS = ((100, 1e-2), (200, 8e-2))
LOW_RANK = {"decompose": {"method": "svd-llm", "keep": 0.6}}
INTEGERS = {"quantize": {"method": "rtn", "bits": 3, "group_size": 16}}


@pytest.fixture
def workload(
    tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> Callable[..., Workload]:
    """Return the work of a stage that trains after another one."""

    def prepared(before: dict[str, Any], **options: Any) -> Workload:
        given = {"batch": BATCH, "length": LENGTH, "held_out": HELD_OUT, **options}
        recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", stages=[before, {"heal": given}])
        return Workload(prepare(load_recipe(recipe).recipe, STAGES), "cpu")

    return prepared


@pytest.fixture
def seconds(workload: Callable[..., Workload]) -> Callable[..., float]:
    """Return the estimate of a stage after another one."""

    def estimate(before: dict[str, Any], rates: MachineRates, **options: Any) -> float:
        return stage_seconds(workload(before, **options), rates)["heal"]

    return estimate


def only(*, products: float = math.inf, elementwise: float = math.inf) -> MachineRates:
    """Return a machine with finite speeds where they are given."""
    return MachineRates(products, math.inf, math.inf, EIGENPROBLEMS, elementwise, math.inf)


def counted_model(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """Return a model whose attention is made of operations that torch counts."""
    model = tiny_llama()
    model.set_attn_implementation("eager")
    return model


def test_a_step_of_distillation_has_the_products_of_both_models_and_of_the_gradients(
    seconds: Callable[..., float], tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    dense, trained = counted_model(tiny_llama), counted_model(tiny_llama)
    trained.model.embed_tokens.requires_grad_(False)
    trained.lm_head.requires_grad_(False)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counted:
        with torch.no_grad():
            dense(ids)
        trained(ids).logits.sum().backward()
    few, more = (
        seconds(LOW_RANK, only(products=RATE), method="distill", steps=n) for n in (20, 30)
    )
    products = EFFICIENCY * RATE * (more - few) / 10
    assert products == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_a_step_of_a_fit_of_layers_has_the_products_of_the_layers(
    seconds: Callable[..., float], tiny_llama: Callable[..., LlamaForCausalLM]
) -> None:
    trained = counted_model(tiny_llama)
    hidden = torch.ones(BATCH, LENGTH, trained.config.hidden_size, requires_grad=True)
    positions = torch.arange(LENGTH)[None]
    rotary = trained.model.rotary_emb(hidden, positions)
    with FlopCounterMode(display=False) as counted:
        for layer in trained.model.layers:
            layer(hidden, position_embeddings=rotary).sum().backward()
    few, more = (
        seconds(LOW_RANK, only(products=RATE), method="block", samples=1, steps=n) for n in (20, 30)
    )
    products = EFFICIENCY * RATE * (more - few) / 10
    assert products == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_held_out_text_takes_time_without_steps(seconds: Callable[..., float]) -> None:
    machine = only(products=RATE)
    few, many = (
        seconds(LOW_RANK, machine, method="distill", steps=0, held_out=n) for n in (64, 128)
    )
    assert many - few == pytest.approx(few - START["cpu"])


def test_integers_are_unpacked_in_every_step(seconds: Callable[..., float]) -> None:
    machine = only(elementwise=RATE)
    one, two = (
        [seconds(INTEGERS, machine, method="scales", steps=n, batch=batch) for n in (10, 20)]
        for batch in (1, 2)
    )
    # Twice the tokens take less than twice the time, because the matrices are the same.
    saved = 2 * (one[1] - one[0]) - (two[1] - two[0])
    assert saved == pytest.approx(10 * DEQUANTIZATION * MATRICES / RATE)
    parts = [
        seconds(INTEGERS, machine, method="scales", steps=n, batch=2, micro_batch=1)
        for n in (10, 20)
    ]
    more = parts[1] - parts[0] - (two[1] - two[0])
    assert more == pytest.approx(saved)


@pytest.mark.parametrize("steps", [0, 1, 9, 16, 19, 20, 147])
def test_measurements_are_those_of_the_budget(steps: int) -> None:
    budget = StepBudget(steps)
    expected = 1 + sum(budget.is_judged(done) for done in range(1, steps + 1))
    assert measurements(steps, separate=False) == expected
    assert measurements(steps, separate=True) == expected + 2


def test_a_limit_of_time_is_the_estimate(seconds: Callable[..., float]) -> None:
    assert seconds(LOW_RANK, only(products=1.0), method="distill", minutes=3) == 180


def test_snapshots_hold_four_tensors_for_each_that_is_trained(
    workload: Callable[..., Workload],
) -> None:
    def snapshots(before: dict[str, Any], **options: Any) -> int:
        work = workload(before, **options)
        short, long = (
            disk_space(work, {}, {"calibrate": 0.0, "heal": seconds})["heal"]
            for seconds in (1.0, 1e3)
        )
        return long - short

    each = 3 * 4 + 2  # bytes: three tensors in float32, the best values in 16 bits
    # While a snapshot is replaced, there are two.
    assert snapshots(INTEGERS, method="scales") == 2 * each * MATRICES // 16
    moving = snapshots(
        {"decompose": {"method": "sparse", "keep": 0.6}},
        method="distill",
        train="values",
        support="moving",
    )
    assert moving == pytest.approx(2 * each * MATRICES, rel=0.02)  # and norms
