"""Recorded steps add the gradients that plain ones do."""

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.heal.gradient_step import GradientStep
from lrc.compressors.solvers import cuda_graphs

WINDOWS = torch.arange(8).view(2, 4)


def weights(device: str = "cpu") -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(8, device=device))
    parameter.grad = torch.zeros_like(parameter)
    return parameter


def adding(parameter: nn.Parameter, factor: float = 1.0) -> GradientStep:
    def add(windows: Tensor) -> None:
        (factor * parameter[windows].square().sum()).backward()

    return GradientStep(add, [parameter], parameter.device)


def test_without_a_gpu_gradients_are_added() -> None:
    parameter = weights()
    add = adding(parameter)
    for _ in range(3):
        add(WINDOWS[:, :2])
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [6, 6, 0, 0, 6, 6, 0, 0]


def test_a_recording_that_fails_leaves_the_gradients_of_plain_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(step: object, device: object, pool: object) -> None:
        step()  # type: ignore[operator]
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "record", broken)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    parameter = weights()
    add = adding(parameter)
    add._recordable = True
    place = parameter.grad
    for _ in range(3):
        add(WINDOWS)
    assert parameter.grad is place  # a recording would have its address
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [6.0] * 8


def test_an_error_of_the_step_itself_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "record", lambda step, *_: step())
    add = adding(weights())
    add._recordable = True
    with pytest.raises(IndexError):
        add(WINDOWS + 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_step_adds_the_gradients_of_its_input() -> None:
    parameter = weights("cuda")
    add = adding(parameter)
    add(WINDOWS[:, :2])
    add(WINDOWS[:, 2:])
    add(WINDOWS[:1])
    assert len(add._steps) == 2
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [4, 4, 4, 4, 2, 2, 2, 2]
