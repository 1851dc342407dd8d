"""Factors of one matrix are trained alike, however they are scaled and mixed."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.heal import factor_coordinates as module
from lrc.compressors.heal.budget import StepBudget
from lrc.compressors.heal.descent import Descent
from lrc.compressors.heal.factor_coordinates import factor_coordinates
from lrc.compressors.heal.parameters import TrainedParameters
from lrc.compressors.layers import ComponentConfig, CompressedLinear, WeightConfig
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank

D_OUT, D_IN, RANK = 12, 9, 4


def layer(kind: str, tensors: dict[str, Tensor], **options: object) -> CompressedLinear:
    config = ComponentConfig(kind, {"rank": RANK}, **options)  # type: ignore[arg-type]
    made = CompressedLinear(WeightConfig((D_OUT, D_IN), (config,)), dtype=torch.float64)
    named = {f"{kind}.{name}": tensor for name, tensor in tensors.items()}
    made.load_state_dict({**named, "weight": torch.zeros(1, dtype=torch.uint8)})
    return made


@pytest.fixture
def factors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([10.0, 1.0, 0.1, 0.01], dtype=torch.float64)
    B, A = (torch.randn(s, generator=generator).double() for s in ((D_OUT, RANK), (RANK, D_IN)))
    return B * scales, A


def matrix(made: CompressedLinear) -> Tensor:
    with torch.no_grad():
        found: Tensor = made(torch.eye(D_IN, dtype=torch.float64)).T
    return found


@pytest.mark.parametrize("kind", ["low_rank", "pivoted_low_rank"])
def test_a_change_of_coordinates_is_as_large_as_that_of_the_matrix(
    kind: str, factors: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DAMP", 1e-14)
    B, A = factors
    encode = LowRank.encode if kind == "low_rank" else PivotedLowRank.encode
    made = layer(kind, encode(B=B, A=A))
    parameters = dict(made.named_parameters())
    found = factor_coordinates(made, parameters)
    assert {*found} == {*parameters}
    for name, parameter in parameters.items():
        before, value = matrix(made), parameter.detach().clone()
        change = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).double()
        with torch.no_grad():
            parameter.add_(found[name].of_parameter(change))
            torch.testing.assert_close((matrix(made) - before).norm(), change.norm())
            parameter.copy_(value)  # coordinates are those of the first values
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)).double()
        expected = (gradient * found[name].of_parameter(change)).sum()
        torch.testing.assert_close((found[name].of_gradient(gradient) * change).sum(), expected)


def test_gradients_change_a_matrix_alike_for_all_factors_of_it(
    factors: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DAMP", 1e-14)
    B, A = factors
    M = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(2)).double()
    changes = []
    for pair in ((B, A), (B @ M.inverse(), M @ A)):
        made = layer("low_rank", LowRank.encode(*pair))
        parameters = dict(made.named_parameters())
        found = factor_coordinates(made, parameters)
        target = torch.randn(D_IN, D_OUT, generator=torch.Generator().manual_seed(1)).double()
        (made(torch.eye(D_IN, dtype=torch.float64)) * target).sum().backward()
        for name, parameter in parameters.items():
            before, value = matrix(made), parameter.detach().clone()
            gradient = found[name].of_gradient(parameter.grad)  # type: ignore[arg-type]
            with torch.no_grad():
                parameter.add_(found[name].of_parameter(gradient), alpha=found[name].size)
                changes.append(matrix(made) - before)
                parameter.copy_(value)
    for ours, theirs in zip(changes[:2], changes[2:], strict=True):
        assert ours.norm() > 0
        torch.testing.assert_close(ours, theirs)


def test_adam_steps_in_coordinates(factors: tuple[Tensor, Tensor]) -> None:
    """The first step is the learning rate times the sign of the gradient."""
    B, A = factors
    made = layer("low_rank", LowRank.encode(B, A))
    parameters = dict(made.named_parameters())
    found = factor_coordinates(made, parameters)
    trained = TrainedParameters(parameters, dict.fromkeys(parameters, torch.float64), {}, found)
    descent = Descent(trained, budget=StepBudget(1), rate=1e-3)
    expected = {}
    for name, parameter in parameters.items():
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)).double()
        parameter.grad.add_(gradient)  # type: ignore[union-attr]
        change = -1e-3 * found[name].size * found[name].of_gradient(gradient).sign()
        expected[name] = parameter.detach() + found[name].of_parameter(change)
    descent.update_()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=1e-6)


def test_factors_that_are_cut_or_not_trained_together_have_none() -> None:
    tensors = {"a.weight": torch.ones(RANK, D_IN), "b.weight": torch.ones(D_OUT, RANK)}
    elastic = layer("low_rank", tensors, ranks=(4, 2))
    assert factor_coordinates(elastic, dict(elastic.named_parameters())) == {}
    plain = layer("low_rank", tensors)
    first, *_ = plain.named_parameters()
    assert factor_coordinates(plain, dict([first])) == {}
