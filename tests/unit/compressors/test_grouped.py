"""One dictionary for the same matrix of several layers: planned, solved and put together again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.compressors.compress.finalize import Done, product
from lrc.compressors.compress.solve import factor
from lrc.compressors.io.journal import Journal
from lrc.compressors.layers import SharedDictionary, SparseDictionary
from lrc.compressors.methods.base import CodedMethod
from lrc.compressors.methods.table import METHODS
from lrc.compressors.planning.allocate import allocate_ranks
from lrc.compressors.planning.plan import Matrix, Plan
from lrc.compressors.planning.weight_groups import Unit
from lrc.compressors.solvers.dictionary_learning import Dictionary, DictionaryProblem
from lrc.compressors.solvers.linalg import damped, weighted_error
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.configs.recipe import Recipe

D_OUT, D_IN, ATOMS, NONZEROS, ROUNDS = 40, 16, 8, 2, 60
SIZES = {"atoms": ATOMS, "nonzeros": NONZEROS}
NAMES = ["layers.0.up", "layers.1.up"]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes(seed: int) -> Tensor:
    """Draw S [ATOMS, D_OUT] with NONZEROS in every column."""
    kept = normal(D_OUT, ATOMS, seed=seed).topk(NONZEROS).indices
    mask = torch.zeros(D_OUT, ATOMS, dtype=torch.bool).scatter(1, kept, True)
    return normal(ATOMS, D_OUT, seed=seed + 1) * mask.T


@pytest.fixture
def known() -> list[Statistics]:
    """Return inputs of two layers whose channels are mixed in different ways."""
    inputs = [normal(100, D_IN, seed=s) @ normal(D_IN, D_IN, seed=s + 1) for s in (10, 20)]
    return [Statistics(100, Moment.of(X.T @ X)) for X in inputs]


def unit_of(n_layers: int = 2) -> Unit:
    bits = D_OUT * D_IN * 64
    alone = [
        Matrix(name, layer, (D_OUT, D_IN), 0, "cospadi", "dictionary", None, bits, bits)
        for layer, name in enumerate(NAMES[:n_layers])
    ]
    return Unit(tuple(m.shared(NAMES[0]) if n_layers > 1 else m for m in alone)).at(SIZES)


def recipe_of(**changes: Any) -> Recipe:
    stage = {"method": "cospadi", "keep": 0.6, "rounds": ROUNDS, "layers_per_group": 2, **changes}
    return Recipe.model_validate({"model": "m", "stages": [{"decompose": stage}], "output": "o"})


def solved(
    unit: Unit, weights: Sequence[Tensor], known: Sequence[Statistics], **changes: Any
) -> Done:
    options = recipe_of(**changes).stages[0].decompose
    return factor(unit, options, weights, known, dtype=torch.float64)


def products(done: Done) -> list[Tensor]:
    return [product(m, done.tensors.__getitem__).double() for m in done.unit.members]


def test_a_dictionary_planted_in_two_layers_is_found(known: list[Statistics]) -> None:
    """Of these draws K-SVD ends beside the planted one in three of four; in this one it arrives."""
    D = normal(D_IN, ATOMS, seed=5)
    weights = [(D @ codes(seed)).T for seed in (50, 60)]
    done = solved(unit_of(), weights, known)
    assert [m.form for m in done.unit.members] == ["dictionary", "shared_dictionary"]
    for W, W_hat in zip(weights, products(done), strict=True):
        torch.testing.assert_close(W_hat, W, rtol=0, atol=1e-5)  # multiplied out in float32
    found = done.tensors[f"{NAMES[0]}.a.weight"].T  # [d_in, atoms]
    found, D = found / found.norm(dim=0), D / D.norm(dim=0)
    torch.testing.assert_close((D.T @ found).abs().amax(dim=1), torch.ones(ATOMS).double())


def test_the_layers_hold_the_slices_of_the_stacked_solution(known: list[Statistics]) -> None:
    weights = [normal(D_OUT, D_IN, seed=seed) for seed in (30, 40)]
    done, stack = solved(unit_of(), weights, known, rounds=3), torch.cat(weights)
    H = torch.stack([each.inputs.whole() for each in known if each.inputs]).sum(dim=0)

    def learned(moment: Tensor) -> Dictionary:
        problem = DictionaryProblem.of(stack, Moment.of(moment), solver="cospadi", damp=1e-6)
        return problem.solve(atoms=ATOMS, nonzeros=NONZEROS, rounds=3)

    expected = learned(H)
    assert [m.loss for m in done.unit.members] == pytest.approx([expected.loss] * 2, rel=1e-9)
    torch.testing.assert_close(
        torch.cat(products(done)), expected.weight(), rtol=0, atol=1e-5 * float(stack.abs().max())
    )
    lost = [
        weighted_error(W, W_hat, damped(H, 1e-6), None)
        for W, W_hat in zip(weights, products(done), strict=True)
    ]
    assert sum(lost) == pytest.approx(expected.energy, rel=1e-5)
    # What CoSpaDi takes, the mean of the moments, is the same problem.
    mean = learned(H / 2)
    torch.testing.assert_close(mean.weight(), expected.weight())


def test_the_dictionary_is_stored_and_counted_once(known: list[Statistics]) -> None:
    done = solved(unit_of(), [normal(D_OUT, D_IN, seed=seed) for seed in (30, 40)], known, rounds=1)
    assert [name for name in done.tensors if name.endswith(".a.weight")] == ["layers.0.up.a.weight"]
    bits = sum(8 * t.numel() * t.element_size() for t in done.tensors.values())
    assert bits == sum(m.bits for m in done.unit.members) == done.unit.bits(SIZES)
    alone = SparseDictionary.stored_bits(D_OUT, D_IN, bits=64, **SIZES)
    borrows = SharedDictionary.stored_bits(D_OUT, D_IN, bits=64, **SIZES)
    assert [m.bits for m in done.unit.members] == [alone, borrows]
    assert alone - borrows == ATOMS * D_IN * 64


def test_a_group_of_one_is_a_matrix_alone(known: list[Statistics]) -> None:
    W, method = normal(D_OUT, D_IN, seed=30), METHODS["cospadi"]
    assert isinstance(method, CodedMethod)
    parts = method.solve(W, known[0], SIZES, rounds=3).parts
    expected = SparseDictionary.encode(**parts)
    for size in (1, 2):  # what a group leaves over, too
        done = solved(unit_of(1), [W], known[:1], rounds=3, layers_per_group=size)
        assert done.tensors.keys() == {f"{NAMES[0]}.{leaf}" for leaf in expected}
        for leaf, tensor in expected.items():
            assert torch.equal(done.tensors[f"{NAMES[0]}.{leaf}"], tensor)


def test_a_member_that_saw_no_token_keeps_the_group_dense(known: list[Statistics]) -> None:
    weights = [normal(D_OUT, D_IN, seed=seed) for seed in (30, 40)]
    done = solved(unit_of(), weights, [known[0], Statistics()])
    assert {m.form for m in done.unit.members} == {"dense"}
    assert {m.fallback for m in done.unit.members} == {"saw no calibration token; stays dense"}


class Weights:
    """Stands for a `WeightReader`."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.tensors = {f"{name}.weight": W for name, W in zip(NAMES, weights, strict=True)}

    def read(self, name: str, *, device: str) -> Tensor:
        return self.tensors[name]


def allocated(plan: Plan, known: list[Statistics], folder: Path, **options: Any) -> Plan:
    weights = Weights([normal(D_OUT, D_IN, seed=seed) for seed in (30, 40)])
    recipe = recipe_of(rounds=3, allocation="lagrangian")
    looked: Any = (plan, recipe, weights, Journal(folder), lambda matrix: known[matrix.layer])
    return allocate_ranks(*looked, device="cpu", on_step=lambda *_: None, **options)


def plan_of(unit: Unit, **changes: Any) -> Plan:
    members = list(unit.members)
    return Plan(members, 0, 0, "s", None, False, "float64", "Two", **{"budgets": [None], **changes})


def test_what_is_predicted_of_a_group_is_what_it_loses(
    known: list[Statistics], tmp_path: Path
) -> None:
    weights = [normal(D_OUT, D_IN, seed=seed) for seed in (30, 40)]
    done = solved(unit_of(), weights, known, rounds=3)
    predicted = allocated(plan_of(unit_of()), known, tmp_path, every=True)
    for there, here in zip(done.unit.members, predicted.matrices, strict=True):
        assert here.loss == pytest.approx(there.loss, rel=1e-9)
        assert here.predicted_nats is None


def test_an_allocation_gives_a_group_one_size(known: list[Statistics], tmp_path: Path) -> None:
    unit = unit_of()
    pending = Unit(
        tuple(m.undecided("lagrangian", 0.6) for m in unit.in_form("dictionary").members)
    )
    budget = int(0.6 * unit.source_bits)
    plan = allocated(plan_of(pending, budgets=[budget]), known, tmp_path)
    owner, member = plan.matrices
    assert owner.sizes == member.sizes is not None
    assert [m.form for m in plan.matrices] == ["dictionary", "shared_dictionary"]
    assert 0.5 * unit.source_bits < plan.bits <= budget
