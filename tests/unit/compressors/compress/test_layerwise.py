"""Compress a chain of linears: biases, shared factors, fallbacks, compensation."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from lrc.compressors.compress.group import stored_weight
from lrc.compressors.compress.layerwise import compress_layers, layer_file
from lrc.compressors.io.journal import Journal
from lrc.compressors.layers import (
    COMPONENTS,
    ComponentConfig,
    QuantizationArgs,
    WeightConfig,
)
from lrc.compressors.layers.pivot_rows import NoPivotRows
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.allocate import allocate
from lrc.compressors.planning.measures import BITS
from lrc.compressors.planning.plan import Allocation, ModelInfo, Plan
from lrc.compressors.planning.sizes import SizeSteps
from lrc.compressors.planning.summary import summarize
from lrc.compressors.planning.tasks import Compensation, LayerTask, QuantizationTask, Weight
from lrc.compressors.solvers.error_compensation import PrefixMoments
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.configs.errors import Stopped

LAYERS, WIDTH, TOKENS = 3, 12, 200
OPTIONS = {"damp": 1e-6, "gradient_damp": 0.1, "alpha": 0.5, "rounds": 15}
NAMES = [f"layers.{layer}.{leaf}" for layer in range(LAYERS) for leaf in ("in", "out")]


class Weights:
    """Replaces a `WeightReader`: weights and biases in float32, by name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str, *, device: str = "cpu") -> Tensor:
        return self.tensors[name].clone()


@pytest.fixture
def reader() -> Weights:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in NAMES:
        tensors[f"{name}.weight"] = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        tensors[f"{name}.bias"] = torch.randn(WIDTH, generator=generator)
    return Weights(tensors)


@pytest.fixture
def tokens() -> Tensor:
    """Return inputs of the chain [TOKENS, WIDTH], correlated and with a mean."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    return torch.randn(TOKENS, WIDTH, generator=generator) @ mixing + 1


@dataclass
class Chain:
    """A `Prefix` over layers of two linears that add to a stream, and a nonlinearity between."""

    weights: dict[str, Tensor]
    tokens: Tensor
    log: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dense, self.now = self.tokens.double(), self.tokens.double()
        self.replaced: dict[str, Tensor] = {}
        self.capped: set[bool] = set()

    def groups(self, layer: int) -> list[list[str]]:
        return [[f"layers.{layer}.in"], [f"layers.{layer}.out"]]

    def inputs(self, layer: int, name: str) -> tuple[Tensor, Tensor]:
        if name.endswith(".in"):
            return self.dense, self.now
        before = f"layers.{layer}.in"
        return self.dense @ self._was(before).T, self.now @ self._is(before).T

    def measure(
        self, layer: int, names: Sequence[str], *, deficit: bool, capped: bool, gated: bool
    ) -> PrefixMoments:
        self.log.append(("measure", *names))
        self.capped.add(capped)
        X, now = self.inputs(layer, names[0])
        writes = deficit and names[0].endswith(".out")
        lacking = {names[0]: (self.dense - self.now).T @ now} if writes else {}
        return PrefixMoments(now.T @ now, X.T @ now, lacking)

    def insert(self, name: str, W_hat: Tensor) -> None:
        self.log.append(("replace", name))
        self.replaced[name] = W_hat.double()

    def advance(self, layer: int) -> None:
        self.log.append(("advance", layer))
        X, now = self.inputs(layer, f"layers.{layer}.out")
        last = f"layers.{layer}.out"
        self.dense = leaky_relu(self.dense + X @ self._was(last).T, 0.5)
        self.now = leaky_relu(self.now + now @ self._is(last).T, 0.5)

    def _was(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"].double()

    def _is(self, name: str) -> Tensor:
        return self.replaced.get(name, self._was(name))


@pytest.fixture
def statistics(reader: Weights, tokens: Tensor) -> Callable[[Weight], Statistics]:
    """Return the statistics of the dense model's inputs, and of random gradients."""
    chain = Chain(reader.tensors, tokens)
    known = {}
    generator = torch.Generator().manual_seed(2)
    for layer in range(LAYERS):
        for (name,) in chain.groups(layer):
            X, _ = chain.inputs(layer, name)
            g = torch.randn(TOKENS, WIDTH, generator=generator).double() * torch.arange(1, 13)
            known[name] = Statistics(
                TOKENS, Moment.of(X.T @ X), Moment.of(g.T @ g), X.sum(dim=0), X.abs().sum(dim=0)
            )
        chain.advance(layer)
    return lambda weight: known[weight.name]


def task_of(
    *names: str, method: str, types: str = "low_rank", rank: int | None = 4, **changes: Any
) -> LayerTask:
    """Return a task with factors of a rank; dense without one."""
    options = METHODS[method].options
    sizes = () if rank is None else (ComponentConfig(types, {"rank": rank}),)
    bias = rank is not None and METHODS[method].has_bias
    return LayerTask(
        weights=tuple(Weight(name, int(name.split(".")[1])) for name in names),
        config=WeightConfig((WIDTH, WIDTH), sizes, bias),
        number_bits=32,
        stage=0,
        method=method,
        types=types,
        options={name: OPTIONS[name] for name in options},
        statistics=tuple(METHODS[method].statistics),
        **changes,
    )


def plan_with(tasks: Sequence[LayerTask], **changes: Any) -> Plan:
    info = ModelInfo("s", "float32", "Chain", 0, 0, None, False)
    return Plan(info, 0, {}, [*tasks], **changes)


def plan_of(method: str, **changes: Any) -> Plan:
    return plan_with([task_of(name, method=method, **changes) for name in NAMES])


def run(
    plan: Plan, folder: Path, reader: Weights, statistics: Any, **options: Any
) -> tuple[Plan, Journal]:
    journal = Journal(folder)
    on_step = options.pop("on_step", lambda *_: None)
    arguments: Any = (plan, reader, journal, statistics)
    return compress_layers(*arguments, device="cpu", on_step=on_step, **options), journal


def stored(plan: Plan, journal: Journal) -> Callable[[str], Tensor]:
    owners = plan.owner_layers()

    def read(key: str) -> Tensor:
        name = next(name for name in owners if key.startswith(f"{name}."))
        return journal.read_tensor(layer_file(owners[name]), key)

    return read


def weight_of(plan: Plan, name: str, journal: Journal) -> Tensor:
    """Return the weight that the tensors in the journal represent."""
    task = next(t for t in plan.tasks if name in [w.name for w in t.weights])
    return stored_weight(task, plan.results[task.name], name, stored(plan, journal))


@pytest.mark.parametrize("types", ["low_rank", "pivoted_low_rank"])
@pytest.mark.parametrize("source_bias", [True, False])
def test_a_bias_keeps_the_mean_output(
    types, source_bias, tmp_path, reader, statistics, tokens
) -> None:
    plan = plan_of("lord", types=types, source_bias=source_bias)
    done, journal = run(plan, tmp_path, reader, statistics)
    task = done.tasks[0]
    bias = stored(done, journal)(f"{task.name}.bias")
    mean = tokens.mean(dim=0)
    W, before = reader.read(f"{task.name}.weight"), reader.read(f"{task.name}.bias")
    expected = W @ mean + (before if source_bias else 0)
    torch.testing.assert_close(weight_of(done, task.name, journal) @ mean + bias, expected)
    assert done.modules()[task.name].bias is True
    without = replace(task.config, bias=False)
    assert task.bits - task.bits_of(without) == (not source_bias) * WIDTH * 32


def test_a_two_sided_method_predicts_nats_that_add_up(tmp_path, reader, statistics) -> None:
    plan = plan_of("kfac")
    done, _ = run(plan, tmp_path / "a", reader, statistics)
    assert all(done.results[name].predicted_nats > 0 for name in NAMES)
    # The allocation predicts what compression finds.
    arguments: Any = (plan, reader, Journal(tmp_path / "b"), statistics)
    predicted = allocate(*arguments, device="cpu", on_step=lambda *_: None, predict_all=True)
    for name in NAMES:
        there, here = done.results[name], predicted.results[name]
        assert there.predicted_nats == pytest.approx(here.predicted_nats, rel=1e-9)
        assert there.relative_error == pytest.approx(here.relative_error, rel=1e-9)
    assert plan.results == {}


def test_layers_of_a_group_are_solved_together(tmp_path, reader, statistics) -> None:
    owner, member = "layers.0.in", "layers.1.in"
    plan = plan_with(
        [
            task_of(owner, member, method="basis-sharing"),
            *(task_of(n, method="svd-llm") for n in NAMES if n not in (owner, member)),
        ]
    )
    done, journal = run(plan, tmp_path, reader, statistics)
    assert {row.name for row in summarize(done)} == {*NAMES}
    assert [row.layer for row in summarize(done)] == [0, 0, 1, 1, 2, 2]
    assert done.modules()[member].shares == owner
    assert done.modules()[owner].shares is None
    W_hats = torch.cat([weight_of(done, name, journal) for name in (owner, member)])
    assert int(torch.linalg.matrix_rank(W_hats)) == 4
    # The sum of the moments weighs both: no other matrix of rank 4 is closer.
    H = sum(statistics(weight).inputs.whole() for weight in done.tasks[0].weights)
    L = torch.linalg.cholesky(H)
    W = torch.cat([reader.read(f"{name}.weight") for name in (owner, member)]).double()
    values = torch.linalg.svdvals(W @ L)
    lost = (((W - W_hats.double()) @ L) ** 2).sum()
    assert float(lost) == pytest.approx(float((values[4:] ** 2).sum()), rel=1e-4)


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_every_member_of_a_quantized_group_uses_the_quantized_factor(
    quantizer, tmp_path, reader, statistics
) -> None:
    """Coefficients of all members must match the factor that the first one stores."""
    names = "layers.0.in", "layers.1.in"
    task = task_of(*names, method="basis-sharing", rank=6)
    args = QuantizationArgs(8)
    how = QuantizationTask(0, quantizer, args)
    quantized = replace(task, config=how.applied_to(task.config), quantize=how)
    plain, journal = run(plan_with([task]), tmp_path / "a", reader, statistics)
    done, other = run(plan_with([quantized]), tmp_path / "b", reader, statistics)
    assert done.results[names[0]].config.quantization == args
    for name in names:
        W, W_hat = weight_of(plain, name, journal), weight_of(done, name, other)
        assert 0 < float((W - W_hat).norm() / W.norm()) < 0.03  # two factors of 8 bits


def test_factors_without_pivots_are_stored_as_two_factors(
    tmp_path, reader, statistics, monkeypatch
) -> None:
    def fail(B: Tensor, A: Tensor) -> dict[str, Tensor]:
        raise NoPivotRows("no pivot rows were found")

    monkeypatch.setattr(COMPONENTS["pivoted_low_rank"], "encode", staticmethod(fail))
    plan = plan_of("svd", types="pivoted_low_rank", rank=6)
    done, _ = run(plan, tmp_path, reader, statistics)
    for task in plan.tasks:
        result = done.results[task.name]
        assert result.config.types == "low_rank"
        assert task.bits_of(result.config) <= task.bits  # the budget of the plan is kept
        larger = SizeSteps(task, "low_rank").config(result.config.sizes["rank"] + 1)
        assert task.bits_of(larger) > task.bits
        assert result.fallback == "stored as low_rank of rank 4: no pivot rows were found"


def test_weights_without_a_calibration_token_stay_dense(tmp_path, reader) -> None:
    done, _ = run(plan_of("svd-llm"), tmp_path, reader, lambda weight: Statistics())
    assert not any(result.config.compressed for result in done.results.values())
    assert done.results[NAMES[0]].fallback == "saw no calibration token; stays dense"
    assert done.modules() == {}


MIXED = Compensation(mix=0.5, residual=0, damp=0.0)
BOTH = Compensation(mix=0.5, residual=0.5, damp=0.0)


def chain_error(chain: Chain) -> float:
    """Return the squared distance of the chain's outputs from those of the dense one."""
    chain.advance(LAYERS - 1)
    return float((chain.dense - chain.now).square().sum())


def test_layers_compensate_for_those_before(tmp_path, reader, statistics, tokens) -> None:
    errors = {}
    for name, compensate in {"plain": None, "mixed": MIXED, "both": BOTH}.items():
        plan = plan_of("svd-llm", rank=8, compensate=compensate)
        chain = Chain(reader.tensors, tokens)
        done, journal = run(plan, tmp_path / name, reader, statistics, prefix=chain)
        fresh = Chain(reader.tensors, tokens)
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
    tmp_path, reader, statistics, tokens
) -> None:
    chain = Chain(reader.tensors, tokens)
    run(plan_of("svd-llm", compensate=BOTH), tmp_path, reader, statistics, prefix=chain)
    expected = []
    for layer in range(LAYERS):
        for leaf in ("in", "out"):
            name = f"layers.{layer}.{leaf}"
            expected += [("measure", name), ("replace", name)]
        expected += [("advance", layer)] if layer < LAYERS - 1 else []
    assert chain.log == expected


@pytest.mark.parametrize("method", ["gptq", "svd-llm"])
def test_massive_tokens_weigh_less_for_integers_alone(
    method, tmp_path, reader, statistics, tokens
) -> None:
    plan = plan_of("svd-llm", compensate=BOTH)
    if method == "gptq":
        how = QuantizationTask(0, "gptq", QuantizationArgs(8))
        plan = plan_of(method, rank=None, compensate=BOTH, quantize=how)
        tasks = [replace(t, config=how.applied_to(t.config)) for t in plan.tasks]
        plan = plan.with_tasks(tasks)
    chain = Chain(reader.tensors, tokens)
    run(plan, tmp_path, reader, statistics, prefix=chain)
    assert chain.capped == {method == "gptq"}


def test_a_dense_weight_is_refit_too(tmp_path, reader, statistics, tokens) -> None:
    plan = plan_of("svd-llm", compensate=BOTH)
    plan = plan.with_tasks([plan.tasks[2].kept_dense("keep is 1")])
    chain = Chain(reader.tensors, tokens)
    done, journal = run(plan, tmp_path, reader, statistics, prefix=chain)
    task = done.tasks[2]
    result = done.results[task.name]
    assert (result.config.compressed, result.refit) == (False, True)
    assert task.bits_of(result.config) == task.dense_bits
    weight = journal.read_tensor(layer_file(1), f"{task.name}.weight")
    assert not torch.equal(weight, reader.read(f"{task.name}.weight"))
    assert torch.equal(chain.replaced[task.name].float(), weight)
    assert task.name not in done.modules()


@pytest.mark.parametrize("method", ["svd", "asvd", "kfac"])
def test_any_metric_can_decompose_the_refit_weight(
    method, tmp_path, reader, statistics, tokens
) -> None:
    compensate = Compensation(mix=0.3, residual=0.5, damp=1e-4)
    chain = Chain(reader.tensors, tokens)
    plan = plan_of(method, compensate=compensate)
    done, _ = run(plan, tmp_path, reader, statistics, prefix=chain)
    assert len(done.results) == len(NAMES)
    assert all(r.refit and r.config.sizes == {"rank": 4} for r in done.results.values())


def test_a_stopped_compensation_continues_to_the_same_bytes(
    tmp_path, reader, statistics, tokens
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Stopped("requested")

    plan = plan_of("svd-llm", compensate=BOTH)
    whole = (plan, tmp_path / "whole", reader, statistics)
    parts = (plan, tmp_path / "parts", reader, statistics)
    run(*whole, prefix=Chain(reader.tensors, tokens))
    with pytest.raises(Stopped):
        run(*parts, prefix=Chain(reader.tensors, tokens), on_step=stop)
    chain = Chain(reader.tensors, tokens)
    run(*parts, prefix=chain)
    assert [step[0] for step in chain.log] == [
        *("replace", "replace", "advance") * 2,  # finished layers are put into the prefix
        *("measure", "replace") * 2,
    ]
    for layer in range(LAYERS):
        file = f"work/{layer_file(layer)}"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    chain = Chain(reader.tensors, tokens)
    run(*parts, prefix=chain)
    assert chain.log == []  # no layer is left that needs it


def test_whole_weights_in_integers_keep_the_prediction_of_their_allocation(
    tmp_path, reader, statistics
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
    arguments: Any = (plan, reader, Journal(tmp_path / "a"), statistics)
    planned = allocate(*arguments, device="cpu", on_step=lambda *_: None)
    done, _ = run(planned, tmp_path / "b", reader, statistics)
    for name in NAMES:
        before, after = planned.results[name], done.results[name]
        assert after.config == before.config
        assert str(after.config.quantization) == "int4"
        assert after.predicted_nats == before.predicted_nats > 0
        assert after.relative_error != before.relative_error


@pytest.mark.parametrize("method", ["svd-llm", "lord", "kfac"])
def test_a_plan_that_is_read_back_gives_the_same_bytes(
    method, tmp_path, reader, statistics, tokens
) -> None:
    """The plan is complete: no recipe is needed after it was compiled."""
    compensate = None if method == "lord" else BOTH
    plan = plan_of(method, compensate=compensate)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    done = [
        run(each, tmp_path / name, reader, statistics, prefix=Chain(reader.tensors, tokens))[0]
        for name, each in {"a": plan, "b": again}.items()
    ]
    assert done[0] == done[1]
    assert len(done[0].results) == len(NAMES)
    assert Plan.from_json(json.loads(json.dumps(done[0].to_json()))) == done[0]
    for layer in range(LAYERS):
        a, b = (tmp_path / name / "work" / layer_file(layer) for name in "ab")
        assert a.read_bytes() == b.read_bytes()


def test_an_allocation_from_a_plan_that_is_read_back_is_the_same(
    tmp_path, reader, statistics
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
        arguments: Any = (each, reader, Journal(tmp_path / name), statistics)
        done.append(allocate(*arguments, device="cpu", on_step=lambda *_: None))
    assert done[0] == done[1]
    assert done[0].results
    assert done[0].bits <= 0.6 * total


def test_weights_with_zero_statistics_get_an_average_fraction_and_unmeasured_ones_stay_dense(
    tmp_path, reader, statistics
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

    arguments: Any = (plan, reader, Journal(tmp_path), known)
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
