import math

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.heal.budget import StepBudget
from lrc.compressors.heal.descent import BETAS, EPSILON, LARGEST_NORM, LOWER, Descent
from lrc.compressors.heal.parameters import SMALLEST_SCALE, TrainedParameters
from lrc.compressors.heal.schedule import WARM_UP, learning_rate

TARGET = torch.tensor([0.5, -0.25, 2.0])


def start(rate: float = 0.05, steps: int = 60) -> Descent:
    parameters = {"x": nn.Parameter(torch.ones(3)), "unused": nn.Parameter(torch.ones(2))}
    dtypes = dict.fromkeys(parameters, torch.bfloat16)
    trained = TrainedParameters(parameters, dtypes)
    return Descent(trained, budget=StepBudget(steps), rate=rate)


def loss_of(descent: Descent) -> Tensor:
    return (descent.trained.parameters["x"] - TARGET).square().sum()


def advance(descent: Descent, steps: int) -> None:
    for _ in range(steps):
        loss_of(descent).backward()
        descent.update_()
        descent.judge(loss_of(descent).item())


def test_it_descends_and_the_best_is_stored_in_its_dtype() -> None:
    descent = start()
    descent.judge(loss_of(descent).item())
    advance(descent, 60)
    assert descent.best_loss < 1e-2 * descent.losses[0][1]
    assert descent.best["x"].dtype == torch.bfloat16
    torch.testing.assert_close(descent.best["x"].float(), TARGET, atol=0.1, rtol=0)


@pytest.mark.parametrize("rate", [0.05, 30.0])
def test_a_saved_state_continues_to_the_same_bits(rate: float) -> None:
    undisturbed, first, second = (start(rate) for _ in range(3))
    for each in (undisturbed, first):
        each.judge(loss_of(each).item())
    advance(undisturbed, 60)
    advance(first, 23)
    tensors, facts = first.state()
    assert {*tensors} <= {*first.state_names()}
    second.resume({name: tensor.clone() for name, tensor in tensors.items()}, facts)
    advance(second, 37)
    ours, theirs = undisturbed.state(), second.state()
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][name], theirs[0][name]) for name in ours[0])


def test_steps_are_those_of_adam_with_a_rate_for_every_tensor() -> None:
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(4, generator=g), 100 * torch.randn(3, 2, generator=g)]
    parameters = {f"{i}": nn.Parameter(value.clone()) for i, value in enumerate(values)}
    trained = TrainedParameters(parameters, dict.fromkeys(parameters, torch.float32))
    descent = Descent(trained, budget=StepBudget(20), rate=0.01)
    expected = [nn.Parameter(value.clone()) for value in values]
    sizes = [float(value.square().mean().sqrt()) for value in values]
    adam = torch.optim.Adam([{"params": [p]} for p in expected], betas=BETAS, eps=EPSILON)
    for step in range(20):
        for group, size in zip(adam.param_groups, sizes, strict=True):
            group["lr"] = learning_rate(step, 20, 0.01) * size
        gradients = [torch.randn(p.shape, generator=g) for p in expected]
        norm = math.sqrt(sum(float(each.square().sum()) for each in gradients))
        for ours, theirs, gradient in zip(parameters.values(), expected, gradients, strict=True):
            ours.grad.add_(gradient)  # type: ignore[union-attr]
            theirs.grad = gradient * min(1.0, LARGEST_NORM / norm)
        descent.update_()
        adam.step()
    for ours, theirs in zip(parameters.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gradients_that_are_not_finite_are_skipped() -> None:
    descent = start()
    descent.judge(1.0)
    before = descent.trained.rounded()
    (loss_of(descent) * math.inf).backward()
    descent.update_()
    assert (descent.done, descent.skipped) == (1, 1)
    assert torch.equal(descent.trained.parameters["x"], before["x"].float())


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    descent = start()
    descent.judge(1.0)
    advance(descent, 1)
    descent.judge(math.nan)
    assert math.isfinite(descent.best_loss)
    broken = start()  # a model that overflows may be repaired
    broken.judge(math.nan)
    advance(broken, 1)
    assert broken.best_step == 1


def test_training_starts_again_with_a_lower_rate_until_a_step_is_better() -> None:
    """With a rate of 30 the first steps overshoot; what is restored is the start, bit by bit."""
    descent = start(rate=30.0, steps=200)
    descent.judge(loss_of(descent).item())
    before = descent.trained.parameters["x"].detach().clone()
    while descent.best_step == 0:
        assert torch.equal(descent.trained.parameters["x"], before) == (descent.done % WARM_UP == 0)
        advance(descent, 1)
    assert [step for step, _ in descent.rates] == [WARM_UP * i for i in range(len(descent.rates))]
    assert [rate for _, rate in descent.rates] == pytest.approx(
        [30 * LOWER**i for i in range(len(descent.rates))]
    )
    assert 1 < len(descent.rates) < 8
    count = len(descent.rates)
    advance(descent, 200 - descent.done)
    assert descent.best_loss < 1e-2 * descent.losses[0][1]
    assert len(descent.rates) == count  # a worse step after a better one is no reason


def test_a_restart_is_a_new_descent_for_the_steps_that_are_left() -> None:
    descent = start(rate=30.0, steps=WARM_UP + 19)
    fresh = start(rate=30.0 * LOWER, steps=19)
    for each in (descent, fresh):
        each.judge(loss_of(each).item())
    advance(descent, WARM_UP)
    assert len(descent.rates) == 2
    for each in (descent, fresh):
        loss_of(each).backward()
        each.update_()
    assert torch.equal(*(each.trained.parameters["x"] for each in (descent, fresh)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scales_stay_away_from_zero(sign: float) -> None:
    scale = nn.Parameter(torch.full((2,), sign * 0.01))
    name = "layer.weight_scale"
    trained = TrainedParameters({name: scale}, {name: torch.float32})
    with torch.no_grad():
        scale.copy_(torch.tensor([-sign, sign]))
    trained.limit_()
    torch.testing.assert_close(
        scale.detach(), torch.tensor([sign * 0.01 * SMALLEST_SCALE, sign]), rtol=1e-6, atol=0
    )


def test_values_are_rounded_as_stored_only_inside_the_context() -> None:
    x = nn.Parameter(torch.ones(1))
    trained = TrainedParameters({"x": x}, {"x": torch.bfloat16})
    with torch.no_grad():
        x.fill_(1.001)
    exact = x.detach().clone()
    with trained.as_stored():
        assert x.item() == 1.0
    assert torch.equal(x, exact)
