"""Parameters of a 16-bit model are trained in float32."""

import torch
from torch import nn

from lrc.compressors.heal.budget import StepBudget
from lrc.compressors.heal.descent import Descent
from lrc.compressors.heal.parameters import TrainedParameters

RATE, STEPS = 1e-3, 40


def test_gradients_of_copies_are_added_and_small_steps_are_not_lost() -> None:
    used = nn.Parameter(torch.ones(4, dtype=torch.bfloat16), requires_grad=False)
    exact = nn.Parameter(torch.ones(2), requires_grad=False)
    trained = TrainedParameters({"x": used, "y": exact}, {"x": used.dtype, "y": exact.dtype})
    assert trained.parameters["y"] is exact
    assert trained.parameters["x"].dtype == torch.float32
    descent = Descent(trained, budget=StepBudget(10 * STEPS), rate=RATE)
    for _ in range(STEPS):
        for _ in range(2):  # of two batches
            trained.clear_copies_()
            (used.float().sum() + exact.sum()).backward()
            trained.collect_gradients_()
        assert trained.parameters["x"].grad is not None
        assert trained.parameters["x"].grad.tolist() == [2.0] * 4
        assert used.grad is None
        descent.update_()
        assert torch.equal(used, trained.parameters["x"].to(used.dtype))
    # Steps of 1e-3 are a quarter of the distance between numbers of bfloat16 below one.
    expected = 1 - torch.tensor(descent.rates[0][1]) * STEPS
    torch.testing.assert_close(trained.parameters["x"][0], expected, atol=0.01, rtol=0)
    assert torch.equal(trained.parameters["x"][:2], exact)


def test_values_as_stored_are_used_by_the_model_inside() -> None:
    used = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    trained = TrainedParameters({"x": used}, {"x": torch.bfloat16})
    trained.set_({"x": torch.tensor([1.001, 2.0, 3.0])})
    with trained.as_stored():
        assert trained.parameters["x"].tolist() == [1.0, 2.0, 3.0]
    assert trained.parameters["x"][0] != 1
    assert used.tolist() == [1.0, 2.0, 3.0]
