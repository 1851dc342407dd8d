"""The penalty on ranks is the nuclear norm, and finds a planted rank."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.heal.budget import StepBudget
from lrc.compressors.heal.descent import Descent
from lrc.compressors.heal.nuclear_norm import NuclearNorm, truncated_factors
from lrc.compressors.heal.parameters import TrainedParameters
from lrc.compressors.layers import ComponentConfig, CompressedLinear, WeightConfig

D_OUT, D_IN, RANK, PLANTED = 8, 10, 6, 2


def factors(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    B, A = (torch.randn(s, generator=generator).double() for s in ((D_OUT, RANK), (RANK, D_IN)))
    return B, A


def half_squares(B: Tensor, A: Tensor) -> Tensor:
    return (B.square().sum() + A.square().sum()) / 2


def test_half_the_squares_of_balanced_factors_are_the_nuclear_norm_and_of_others_more() -> None:
    B, A = factors(torch.Generator().manual_seed(0))
    norm = torch.linalg.matrix_norm(B @ A, "nuc")
    balanced = truncated_factors(B, A, 0.0)
    torch.testing.assert_close(balanced[0] @ balanced[1], B @ A)
    torch.testing.assert_close(half_squares(*balanced), norm)
    assert half_squares(B, A) > norm


def test_the_gradient_of_balanced_factors_is_the_subgradient_of_the_norm() -> None:
    """By the chain rule U V^T gives B^T U V^T = A for A, and U V^T A^T = B for B."""
    B, A = truncated_factors(*factors(torch.Generator().manual_seed(1)), 0.0)
    U, _, Vt = torch.linalg.svd(B @ A, full_matrices=False)
    sign = U[:, :RANK] @ Vt[:RANK]
    torch.testing.assert_close(B.T @ sign, A)
    torch.testing.assert_close(sign @ A.T, B)


@pytest.mark.parametrize("tolerance", [0.0, 0.3, 0.99])
def test_singular_values_below_the_tolerance_are_removed(tolerance: float) -> None:
    B, A = factors(torch.Generator().manual_seed(2))
    U, S, Vt = torch.linalg.svd(B @ A, full_matrices=False)
    kept = int((S[:RANK] > tolerance * S[0]).sum())
    left, right = truncated_factors(B, A, tolerance)
    assert left.shape == (D_OUT, kept)
    torch.testing.assert_close(left @ right, (U[:, :kept] * S[:kept]) @ Vt[:kept])


def test_a_planted_rank_is_found() -> None:
    """The solution for inputs without correlations: every singular value is lower by the weight."""
    generator = torch.Generator().manual_seed(3)
    weight = 0.5
    Q, P = (torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in (D_OUT, D_IN))
    planted = torch.tensor([4.0, 3.0, 0.3, 0.2, 0.1, 0.05])
    target = (Q[:, :RANK] * planted) @ P[:RANK]
    layer = CompressedLinear(
        WeightConfig((D_OUT, D_IN), (ComponentConfig("low_rank", {"rank": RANK}),))
    )
    parameters = dict(layer.named_parameters())
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    named = {f"layer.{name}": each for name, each in parameters.items()}
    root = torch.nn.ModuleDict({"layer": layer})
    trained = TrainedParameters(named, dict.fromkeys(named, torch.float32))
    descent = Descent(trained, budget=StepBudget(400), rate=0.1)
    penalty = NuclearNorm(weight, root, trained.parameters)
    assert len(penalty) == 1
    for _ in range(400):
        ((layer(torch.eye(D_IN)).T - target).square().sum() / 2).backward()
        penalty.add_gradients_()
        descent.update_()
    values, ranks = penalty.truncated(trained.rounded(), 0.01)
    assert ranks == {"layer": PLANTED}
    cut = penalty.cut(values, ranks)
    A, B = (cut[f"layer.low_rank.{leaf}.weight"] for leaf in ("a", "b"))
    assert (A.shape, B.shape) == ((PLANTED, D_IN), (D_OUT, PLANTED))
    found = torch.linalg.svdvals(B @ A)[:PLANTED]
    torch.testing.assert_close(found, planted[:PLANTED] - weight, rtol=1e-2, atol=0)
    trained.set_(values)
    torch.testing.assert_close(layer(torch.eye(D_IN)).T, B @ A)
