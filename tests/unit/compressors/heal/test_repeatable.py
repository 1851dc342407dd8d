"""Gradients are added in a fixed order where torch has one."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.heal.repeatable import Gradients, RepeatableGradients

ERROR = "cumsum does not have a deterministic implementation, but you set ..."


def parameter() -> Tensor:
    found = torch.ones(3)
    found.grad = torch.full((3,), 5.0)
    return found


def test_torch_refuses_operations_without_a_fixed_order_inside() -> None:
    gradients = RepeatableGradients([parameter()], torch.device("cuda"))
    seen = []
    gradients(lambda: seen.append(torch.is_deterministic_algorithms_warn_only_enabled()))
    gradients(lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    assert seen == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_that_is_refused_adds_its_gradients_once() -> None:
    one = parameter()
    gradients = RepeatableGradients([one], torch.device("cuda"))

    def add() -> None:
        assert one.grad is not None
        one.grad.add_(1)
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(ERROR)

    gradients(lambda: None)  # an operation may be refused later, too
    gradients(add)
    gradients(add)
    assert one.grad is not None
    assert one.grad.tolist() == [7.0] * 3


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_gradients_are_restored_in_place(value: float) -> None:
    one = parameter()
    assert one.grad is not None
    place = one.grad.fill_(value)
    before = Gradients([one])
    one.grad = torch.ones(3)
    place.add_(1)
    before.restore_()
    assert one.grad is place
    assert place.tolist() == [value] * 3


def test_other_errors_are_raised() -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        RepeatableGradients([parameter()], torch.device("cuda"))(fail)
    assert not torch.are_deterministic_algorithms_enabled()
