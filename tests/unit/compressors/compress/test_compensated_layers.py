"""Compress a chain of linears so that each compensates for those before it."""

from dataclasses import replace

import pytest
import torch
from tests.linear_chain import BOTH, LAYERS, NAMES, Chain, plan_of, run, weight_of

from lrc.compressors.compress.layerwise import layer_file
from lrc.compressors.layers import QuantizationArgs
from lrc.compressors.planning.tasks import Compensation, QuantizationTask
from lrc.configs.errors import Stopped

MIXED = Compensation(mix=0.5, residual=0, damp=0.0)


def chain_error(chain: Chain) -> float:
    """Return the squared distance of the chain's outputs from those of the dense one."""
    chain.advance(LAYERS - 1)
    return float((chain.dense - chain.now).square().sum())


def test_layers_compensate_for_those_before(tmp_path, linears, statistics, tokens) -> None:
    errors = {}
    for name, compensate in {"plain": None, "mixed": MIXED, "both": BOTH}.items():
        plan = plan_of("svd-llm", rank=8, compensate=compensate)
        chain = Chain(linears.tensors, tokens)
        done, journal = run(plan, tmp_path / name, linears, statistics, prefix=chain)
        fresh = Chain(linears.tensors, tokens)
        for layer in range(LAYERS):
            if layer:
                fresh.advance(layer - 1)
            for task in done.tasks:
                if task.layer == layer:
                    fresh.insert(task.name, weight_of(done, task.name, journal))
        errors[name] = chain_error(fresh)
        assert all(result.refit == (name != "plain") for result in done.results.values())
    assert errors["mixed"] < 0.75 * errors["plain"]  # measured 0.63
    assert errors["both"] < 0.9 * errors["mixed"]  # measured 0.80


def test_every_weight_is_measured_after_the_replaced_ones(
    tmp_path, linears, statistics, tokens
) -> None:
    chain = Chain(linears.tensors, tokens)
    run(plan_of("svd-llm", compensate=BOTH), tmp_path, linears, statistics, prefix=chain)
    expected = []
    for layer in range(LAYERS):
        for leaf in ("in", "out"):
            name = f"layers.{layer}.{leaf}"
            expected += [("measure", name), ("replace", name)]
        expected += [("advance", layer)] if layer < LAYERS - 1 else []
    assert chain.log == expected


@pytest.mark.parametrize("method", ["gptq", "svd-llm"])
def test_massive_tokens_weigh_less_for_integers_alone(
    method, tmp_path, linears, statistics, tokens
) -> None:
    plan = plan_of("svd-llm", compensate=BOTH)
    if method == "gptq":
        how = QuantizationTask(0, "gptq", QuantizationArgs(8))
        plan = plan_of(method, rank=None, compensate=BOTH, quantize=how)
        tasks = [replace(t, config=how.applied_to(t.config)) for t in plan.tasks]
        plan = plan.with_tasks(tasks)
    chain = Chain(linears.tensors, tokens)
    run(plan, tmp_path, linears, statistics, prefix=chain)
    assert chain.capped == {method == "gptq"}


def test_a_dense_weight_is_refit_too(tmp_path, linears, statistics, tokens) -> None:
    plan = plan_of("svd-llm", compensate=BOTH)
    plan = plan.with_tasks([plan.tasks[2].kept_dense("keep is 1")])
    chain = Chain(linears.tensors, tokens)
    done, journal = run(plan, tmp_path, linears, statistics, prefix=chain)
    task = done.tasks[2]
    result = done.results[task.name]
    assert (result.config.compressed, result.refit) == (False, True)
    assert task.bits_of(result.config) == task.dense_bits
    weight = journal.read_tensor(layer_file(1), f"{task.name}.weight")
    assert not torch.equal(weight, linears.read(f"{task.name}.weight"))
    assert torch.equal(chain.replaced[task.name].float(), weight)
    assert task.name not in done.modules()


@pytest.mark.parametrize("method", ["svd", "asvd", "kfac"])
def test_any_metric_can_decompose_the_refit_weight(
    method, tmp_path, linears, statistics, tokens
) -> None:
    compensate = Compensation(mix=0.3, residual=0.5, damp=1e-4)
    chain = Chain(linears.tensors, tokens)
    plan = plan_of(method, compensate=compensate)
    done, _ = run(plan, tmp_path, linears, statistics, prefix=chain)
    assert len(done.results) == len(NAMES)
    assert all(r.refit and r.config.sizes == {"rank": 4} for r in done.results.values())


def test_a_stopped_compensation_continues_to_the_same_bytes(
    tmp_path, linears, statistics, tokens
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Stopped("requested")

    plan = plan_of("svd-llm", compensate=BOTH)
    whole = (plan, tmp_path / "whole", linears, statistics)
    parts = (plan, tmp_path / "parts", linears, statistics)
    run(*whole, prefix=Chain(linears.tensors, tokens))
    with pytest.raises(Stopped):
        run(*parts, prefix=Chain(linears.tensors, tokens), on_step=stop)
    chain = Chain(linears.tensors, tokens)
    run(*parts, prefix=chain)
    assert [step[0] for step in chain.log] == [
        *("replace", "replace", "advance") * 2,  # finished layers are put into the prefix
        *("measure", "replace") * 2,
    ]
    for layer in range(LAYERS):
        file = f"work/{layer_file(layer)}"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    chain = Chain(linears.tensors, tokens)
    run(*parts, prefix=chain)
    assert chain.log == []  # no layer is left that needs it
