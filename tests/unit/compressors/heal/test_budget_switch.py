"""Training with a random budget in every step orders factors by what they contribute."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.heal.budget import StepBudget
from lrc.compressors.heal.budget_switch import BudgetSwitch
from lrc.compressors.heal.descent import Descent
from lrc.compressors.heal.parameters import TrainedParameters
from lrc.compressors.layers import ComponentConfig, CompressedLinear, WeightConfig

RANK, D_OUT, D_IN, STEPS = 4, 6, 5, 1500
BUDGETS = (0.9, 0.7, 0.5, 0.3)  # of ranks 4, 3, 2 and 1


def regression(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return inputs X [n, d_in] that are correlated, and targets Y [n, d_out]."""
    X = torch.randn(200, D_IN, generator=generator) @ torch.randn(D_IN, D_IN, generator=generator)
    U, _, Vt = torch.linalg.svd(
        X @ torch.randn(D_IN, D_OUT, generator=generator), full_matrices=False
    )
    sizes = torch.tensor([8.0, 5.0, 3.0, 1.5, 0.5])
    return X / 10, U[:, :5] * sizes @ Vt[:5]


def layer(ranks: tuple[int, ...]) -> CompressedLinear:
    config = ComponentConfig("low_rank", {"rank": RANK}, ranks=ranks)
    return CompressedLinear(WeightConfig((D_OUT, D_IN), (config,)))


def trained(*, ordered: bool) -> tuple[CompressedLinear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X, Y = regression(generator)
    model = layer((4, 3, 2, 1))
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    dtypes = dict.fromkeys(parameters, torch.float32)
    descent = Descent(TrainedParameters(parameters, dtypes), budget=StepBudget(STEPS), rate=0.1)
    switch = BudgetSwitch(model, BUDGETS if ordered else ())
    for step in range(STEPS):
        switch.use_for(step, seed=3)
        (model(X) - Y).square().sum().backward()
        descent.update_()
    return model, X, Y


def test_ordered_training_finds_the_top_singular_subspaces_in_order() -> None:
    model, X, Y = trained(ordered=True)
    _, values, Vt = torch.linalg.svd(Y.double(), full_matrices=False)
    switch = BudgetSwitch(model, BUDGETS)
    errors = [
        (model(X).double() - Y).square().sum().item()
        for index in range(len(BUDGETS))
        for _ in [switch.use(index)]
    ]
    # The best prediction of rank r is the truncated SVD of Y, of which X spans the column space.
    tails = [values[rank:].square().sum().item() for rank in (4, 3, 2, 1)]
    assert errors == pytest.approx(tails, rel=0.02)
    B = model.get_parameter("low_rank.b.weight").detach().double()
    for rank in (1, 2, 3, 4):
        Q = torch.linalg.qr(B[:, :rank]).Q  # [d_out, rank]
        best = Vt[:rank].T @ Vt[:rank]
        assert (Q @ Q.T - best).norm() < 0.1


def test_training_of_the_largest_budget_alone_leaves_no_order() -> None:
    model, X, Y = trained(ordered=False)
    values = torch.linalg.svdvals(Y.double())
    whole = (model(X).double() - Y).square().sum().item()
    assert whole == pytest.approx(values[4:].square().sum().item(), rel=0.02)
    BudgetSwitch(model, BUDGETS).use(3)
    first = (model(X).double() - Y).square().sum().item()
    assert first > 1.5 * values[1:].square().sum().item()


def test_a_budget_computes_as_the_layer_after_the_cut() -> None:
    model = layer((4, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(2))
    switch = BudgetSwitch(model, (0.9, 0.5))
    found = switch.measure(lambda: model(x).sum().item())
    whole = model(x).sum().item()
    assert found[1] == whole  # the last one is in use
    model.get_submodule("low_rank").used_rank = None  # type: ignore[assignment]
    assert found[0] == pytest.approx(model(x).sum().item(), rel=1e-5)
    model.cut_(1)
    assert sorted((list(p.shape) for p in model.parameters()), reverse=True) == [
        [D_OUT, 2],
        [2, D_IN],
    ]
    assert found[1] == pytest.approx(model(x).sum().item(), rel=1e-5)


def test_all_budgets_are_used_equally_often_in_a_random_order() -> None:
    model = layer((4, 3, 2, 1))
    switch = BudgetSwitch(model, BUDGETS)

    def order(seed: int) -> list[int]:
        found = []
        for step in range(20):
            switch.use_for(step, seed=seed)
            rank = model.get_submodule("low_rank").used_rank
            assert isinstance(rank, int)
            found.append(rank)
        return found

    assert Counter(order(0)) == dict.fromkeys((4, 3, 2, 1), 5)
    assert order(0) == order(0) != order(1)
    assert order(0) != sorted(order(0)[:4]) * 5


def test_other_models_are_left_alone() -> None:
    model = layer(())
    switch = BudgetSwitch(model, BUDGETS)
    switch.use_for(0, seed=0)
    assert switch.budgets == ()
    assert switch.measure(lambda: 1.0) == [1.0]
    assert model.get_submodule("low_rank").used_rank is None
