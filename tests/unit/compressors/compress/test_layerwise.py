"""Carrying out a plan: biases, shared factors, fallbacks, compensation; on a chain of linears."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from lrc.compressors.compress import solve as factor
from lrc.compressors.compress.finalize import product
from lrc.compressors.compress.layerwise import decompose, factors_file
from lrc.compressors.io.journal import Journal
from lrc.compressors.planning.allocate import allocate_ranks
from lrc.compressors.planning.plan import Matrix, Plan
from lrc.compressors.solvers.error_compensation import PrefixMoments
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.configs.errors import Stopped
from lrc.configs.recipe import Recipe

LAYERS, WIDTH, TOKENS = 3, 12, 200
NAMES = [f"layers.{layer}.{leaf}" for layer in range(LAYERS) for leaf in ("in", "out")]


class Weights:
    """Stands for a `WeightReader`: weights and biases in float32, by name."""

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
    """Make inputs of the chain [TOKENS, WIDTH], correlated and off centre."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    return torch.randn(TOKENS, WIDTH, generator=generator) @ mixing + 1


@dataclass
class ActivationCache:
    """A `Prefix` over layers of two linears that add to a stream, and a nonlinearity between."""

    weights: dict[str, Tensor]
    tokens: Tensor
    log: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dense, self.now = self.tokens.double(), self.tokens.double()
        self.replaced: dict[str, Tensor] = {}

    def groups(self, layer: int) -> list[list[str]]:
        return [[f"layers.{layer}.in"], [f"layers.{layer}.out"]]

    def inputs(self, layer: int, name: str) -> tuple[Tensor, Tensor]:
        if name.endswith(".in"):
            return self.dense, self.now
        before = f"layers.{layer}.in"
        return self.dense @ self._was(before).T, self.now @ self._is(before).T

    def measure(self, layer: int, names: Sequence[str], *, deficit: bool) -> PrefixMoments:
        self.log.append(("measure", *names))
        X, now = self.inputs(layer, names[0])
        writes = deficit and names[0].endswith(".out")
        lacking = {names[0]: (self.dense - self.now).T @ now} if writes else {}
        return PrefixMoments(now.T @ now, X.T @ now, lacking)

    def replace(self, name: str, W_hat: Tensor) -> None:
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
def statistics(reader: Weights, tokens: Tensor) -> Callable[[Matrix], Statistics]:
    """Tell what the dense model's inputs tell; gradients are as good as random."""
    chain = ActivationCache(reader.tensors, tokens)
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
    return lambda matrix: known[matrix.name]


def recipe_of(*stages: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(
        {
            "model": "m",
            "stages": [{"decompose": {"keep": 0.9, **stage}} for stage in stages],
            "output": "o",
        }
    )


def plan_of(method: str, *, form: str = "low_rank", rank: int = 4, **changes: Any) -> Plan:
    bits = WIDTH * WIDTH * 32
    matrices = []
    for name in NAMES:
        layer = int(name.split(".")[1])
        m = Matrix(name, layer, (WIDTH, WIDTH), 0, method, form, None, bits, bits)
        matrices.append(replace(m, **changes).at(rank))
    return Plan(matrices, 0, 0, "s", None, False, "float32", "ActivationCache", budgets=[None])


def run(
    plan: Plan, recipe: Recipe, folder: Path, reader: Weights, statistics: Any, **options: Any
) -> tuple[Plan, Journal]:
    journal = Journal(folder)
    on_step = options.pop("on_step", lambda *_: None)
    arguments: Any = (plan, recipe, reader, journal, statistics)
    return decompose(*arguments, device="cpu", on_step=on_step, **options), journal


def stored(plan: Plan, journal: Journal) -> Callable[[str], Tensor]:
    homes = plan.homes()

    def read(key: str) -> Tensor:
        name = next(name for name in homes if key.startswith(f"{name}."))
        return journal.read_tensor(factors_file(homes[name]), key)

    return read


@pytest.mark.parametrize("form", ["low_rank", "pivoted_low_rank"])
@pytest.mark.parametrize("dense_bias", ["replaced", "added"])
def test_a_bias_keeps_the_mean_output(
    form, dense_bias, tmp_path, reader, statistics, tokens
) -> None:
    plan = plan_of("lord", form=form, bias=dense_bias)
    done, journal = run(plan, recipe_of({"method": "lord"}), tmp_path, reader, statistics)
    m = done.matrices[0]
    leaf = "b.bias" if form == "low_rank" else "bias"
    bias = stored(done, journal)(f"{m.name}.{leaf}")
    mean = tokens.mean(dim=0)
    W, was = reader.read(f"{m.name}.weight"), reader.read(f"{m.name}.bias")
    expected = W @ mean + (was if dense_bias == "replaced" else 0)
    torch.testing.assert_close(product(m, stored(done, journal)) @ mean + bias, expected)
    assert done.modules()[m.name]["bias"] is True
    assert m.bits - replace(m, bias=None).at(m.rank).bits == (dense_bias == "added") * WIDTH * 32


def test_a_two_sided_method_predicts_nats_that_add_up(tmp_path, reader, statistics) -> None:
    recipe = recipe_of({"method": "kfac", "storage": "low_rank"})
    plan = plan_of("kfac")
    done, _ = run(plan, recipe, tmp_path / "a", reader, statistics)
    assert all(m.predicted_nats > 0 for m in done.matrices)
    # What the allocation pass predicts is what factoring finds.
    looked: Any = (plan, recipe, reader, Journal(tmp_path / "b"), statistics)
    predicted = allocate_ranks(*looked, device="cpu", on_step=lambda *_: None, every=True)
    for there, here in zip(done.matrices, predicted.matrices, strict=True):
        assert there.predicted_nats == pytest.approx(here.predicted_nats, rel=1e-9)
        assert there.loss == pytest.approx(here.loss, rel=1e-9)
    assert [m.predicted_nats for m in plan.matrices] == [None] * len(NAMES)


def test_layers_of_a_group_are_factored_together(tmp_path, reader, statistics) -> None:
    plan = plan_of("basis-sharing")
    owner, member = "layers.0.in", "layers.1.in"
    plan = plan.with_matrices(
        m.shared(owner).at(4) for m in plan.matrices if m.name in (owner, member)
    )
    done, journal = run(plan, recipe_of({"method": "basis-sharing"}), tmp_path, reader, statistics)
    assert [m.name for m in done.matrices] == NAMES
    assert done.modules()[member]["shares"] == owner
    read = stored(done, journal)
    both = [m for m in done.matrices if m.name in (owner, member)]
    W_hats = torch.cat([product(m, read) for m in both])
    assert int(torch.linalg.matrix_rank(W_hats)) == 4
    # The sum of the moments weighs both: nothing of rank 4 comes closer.
    H = sum(statistics(m).inputs.whole() for m in both)
    L = torch.linalg.cholesky(H)
    W = torch.cat([reader.read(f"{m.name}.weight") for m in both]).double()
    values = torch.linalg.svdvals(W @ L)
    lost = (((W - W_hats.double()) @ L) ** 2).sum()
    assert float(lost) == pytest.approx(float((values[4:] ** 2).sum()), rel=1e-4)


def test_factors_that_have_no_pivots_are_stored_plainly(
    tmp_path, reader, statistics, monkeypatch
) -> None:
    def refuse(B: Tensor, A: Tensor) -> dict[str, Tensor]:
        raise ValueError("no pivot rows were found")

    form = factor.FORMS["pivoted_low_rank"]
    monkeypatch.setattr(form, "encode", staticmethod(refuse))
    plan = plan_of("svd", form="pivoted_low_rank", rank=6)
    done, _ = run(plan, recipe_of({"method": "svd"}), tmp_path, reader, statistics)
    for before, after in zip(plan.matrices, done.matrices, strict=True):
        assert after.form == "low_rank"
        assert after.bits <= before.bits  # the budget of the plan is kept
        assert after.at(after.rank + 1).bits > before.bits
        assert after.fallback == "stored as low_rank of rank 4: no pivot rows were found"


def test_what_no_token_reached_stays_dense(tmp_path, reader) -> None:
    plan = plan_of("svd-llm")
    recipe = recipe_of({"method": "svd-llm"})
    done, _ = run(plan, recipe, tmp_path, reader, lambda matrix: Statistics())
    assert {m.form for m in done.matrices} == {"dense"}
    assert done.matrices[0].fallback == "saw no calibration token; stays dense"


PLAIN: dict[str, Any] = {"method": "svd-llm"}
MIXED = PLAIN | {"compensate": {"mix": 0.5, "residual": 0, "damp": 0.0}}
COMPENSATED = PLAIN | {"compensate": {"mix": 0.5, "residual": 0.5, "damp": 0.0}}


def chain_error(chain: ActivationCache) -> float:
    """Return the squared distance of the chain's outputs from those of the dense one."""
    chain.advance(LAYERS - 1)
    return float((chain.dense - chain.now).square().sum())


def test_layers_make_up_for_those_before(tmp_path, reader, statistics, tokens) -> None:
    errors = {}
    for name, stage in {"plain": PLAIN, "mixed": MIXED, "both": COMPENSATED}.items():
        plan, chain = plan_of("svd-llm", rank=8), ActivationCache(reader.tensors, tokens)
        recipe = recipe_of(stage)
        folder = tmp_path / name
        done, journal = run(plan, recipe, folder, reader, statistics, prefix=chain)
        fresh = ActivationCache(reader.tensors, tokens)
        for layer in range(LAYERS):
            if layer:
                fresh.advance(layer - 1)
            for m in done.matrices:
                if m.layer == layer:
                    fresh.replace(m.name, product(m, stored(done, journal)))
        errors[name] = chain_error(fresh)
        assert all(m.refit == (name != "plain") for m in done.matrices)
    assert errors["mixed"] < 0.75 * errors["plain"]  # measured 0.63
    assert errors["both"] < 0.9 * errors["mixed"]  # measured 0.80


def test_every_matrix_is_measured_behind_what_was_replaced(
    tmp_path, reader, statistics, tokens
) -> None:
    chain = ActivationCache(reader.tensors, tokens)
    run(plan_of("svd-llm"), recipe_of(COMPENSATED), tmp_path, reader, statistics, prefix=chain)
    expected = []
    for layer in range(LAYERS):
        for leaf in ("in", "out"):
            name = f"layers.{layer}.{leaf}"
            expected += [("measure", name), ("replace", name)]
        expected += [("advance", layer)] if layer < LAYERS - 1 else []
    assert chain.log == expected


def test_a_dense_matrix_is_refitted_too(tmp_path, reader, statistics, tokens) -> None:
    plan = plan_of("svd-llm")
    plan = plan.with_matrices([plan.matrices[2].dense(note="keep is 1")])
    chain = ActivationCache(reader.tensors, tokens)
    done, journal = run(plan, recipe_of(COMPENSATED), tmp_path, reader, statistics, prefix=chain)
    m = done.matrices[2]
    assert (m.form, m.refit, m.bits) == ("dense", True, m.source_bits)
    weight = journal.read_tensor(factors_file(1), f"{m.name}.weight")
    assert not torch.equal(weight, reader.read(f"{m.name}.weight"))
    assert torch.equal(chain.replaced[m.name].float(), weight)
    assert m.name not in done.modules()


@pytest.mark.parametrize("stage", [{"method": "svd"}, {"method": "asvd"}, {"method": "kfac"}])
def test_any_metric_can_factor_the_refitted_weight(
    stage, tmp_path, reader, statistics, tokens
) -> None:
    recipe = recipe_of({**stage, "compensate": {}})
    chain = ActivationCache(reader.tensors, tokens)
    done, _ = run(plan_of(stage["method"]), recipe, tmp_path, reader, statistics, prefix=chain)
    assert all(m.refit and m.rank == 4 for m in done.matrices)


def test_a_stopped_compensation_continues_to_the_same_bytes(
    tmp_path, reader, statistics, tokens
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Stopped("asked to")

    plan, recipe = plan_of("svd-llm"), recipe_of(COMPENSATED)
    whole = (plan, recipe, tmp_path / "whole", reader, statistics)
    parts = (plan, recipe, tmp_path / "parts", reader, statistics)
    run(*whole, prefix=ActivationCache(reader.tensors, tokens))
    with pytest.raises(Stopped):
        run(*parts, prefix=ActivationCache(reader.tensors, tokens), on_step=stop)
    chain = ActivationCache(reader.tensors, tokens)
    run(*parts, prefix=chain)
    assert [step[0] for step in chain.log] == [
        *("replace", "replace", "advance") * 2,  # finished layers are shown to the prefix
        *("measure", "replace") * 2,
    ]
    for layer in range(LAYERS):
        file = f"work/{factors_file(layer)}"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    chain = ActivationCache(reader.tensors, tokens)
    run(*parts, prefix=chain)
    assert chain.log == []  # nothing left that needs it


def test_what_cannot_be_weighed_gets_an_even_share_or_stays_dense(
    tmp_path, reader, statistics
) -> None:
    """Zeros on one side of a layer leave ranks possible, no token at all does not."""
    recipe = recipe_of({"method": "svd-llm", "allocation": "lagrangian", "keep": 0.6})
    plan = plan_of("svd-llm")
    pending = [replace(m, sizes=None).undecided("lagrangian", 0.6) for m in plan.matrices]
    total = sum(m.source_bits for m in pending)
    plan = replace(plan.with_matrices(pending), budgets=[int(0.6 * total)])

    def known(matrix: Matrix) -> Statistics:
        if matrix.name == NAMES[0]:
            return Statistics(TOKENS, Moment.of(torch.zeros(WIDTH, WIDTH)))
        return Statistics() if matrix.name == NAMES[1] else statistics(matrix)

    looked: Any = (plan, recipe, reader, Journal(tmp_path), known)
    done = allocate_ranks(*looked, device="cpu", on_step=lambda *_: None)
    zeros = done.matrices[0]
    assert zeros.rank is not None
    assert zeros.bits <= 0.6 * zeros.source_bits < zeros.at(zeros.rank + 1).bits
    assert (zeros.loss, zeros.predicted_nats) == (None, None)
    assert done.matrices[1].note == "saw no calibration token; stays dense"
    assert done.bits <= 0.6 * total
    assert all(m.rank for m in done.matrices[2:])
