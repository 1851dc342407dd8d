"""The solver of CoSpaDi: its pursuit against independent ones, its sweep against the SVD."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lrc.compressors.solvers import ksvd
from lrc.compressors.solvers.dictionary_learning import DictionaryProblem
from lrc.compressors.solvers.ksvd import ksvd_update, matching_pursuit
from lrc.compressors.solvers.sparse_coding import squared_error

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(D: Tensor) -> Tensor:
    return D / D.norm(dim=0)


def plain_pursuit(D: Tensor, z: Tensor, nonzeros: int) -> Tensor:
    """Code one column as the textbook has it: residual, largest correlation, least squares."""
    chosen: list[int] = []
    residual = z
    values = z[:0]
    for _ in range(nonzeros):
        score = (D.T @ residual).abs()
        score[chosen] = -1
        chosen.append(int(score.argmax()))
        values = torch.linalg.lstsq(D[:, chosen], z[:, None]).solution[:, 0]
        residual = z - D[:, chosen] @ values
    s = torch.zeros(D.shape[1], dtype=D.dtype)
    s[chosen] = values
    return s


@pytest.mark.parametrize(("dim", "atoms"), [(20, 12), (20, 20), (12, 30)])
@pytest.mark.parametrize("nonzeros", [1, 4, 9])
def test_the_pursuit_is_that_of_one_column_at_a_time(dim: int, atoms: int, nonzeros: int) -> None:
    D, Z = unit(random(dim, atoms)), random(dim, 25, seed=1)
    S, mask = matching_pursuit(D, Z, nonzeros)
    expected = torch.stack([plain_pursuit(D, z, nonzeros) for z in Z.T], dim=1)
    torch.testing.assert_close(S, expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(mask, expected != 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_pursuit_is_that_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    D, Z = unit(random(20, 30)), random(20, 25, seed=1)
    expected = linear.orthogonal_mp_gram(
        (D.T @ D).numpy(), (D.T @ Z).numpy(), n_nonzero_coefs=8, copy_Gram=True, copy_Xy=True
    )
    torch.testing.assert_close(matching_pursuit(D, Z, 8)[0], torch.from_numpy(expected))


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    D, Z = unit(random(20, 30)), random(20, 25, seed=1)
    whole = matching_pursuit(D, Z, 6)
    monkeypatch.setattr(ksvd, "MAX_COLUMNS", 4)
    for a, b in zip(whole, matching_pursuit(D, Z, 6), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_pursuit_that_runs_out_of_directions_takes_the_rest_with_zeros() -> None:
    D = unit(random(3, 10))
    D[:, 4] = D[:, 2]
    Z = random(3, 15, seed=1)
    S, mask = matching_pursuit(D, Z, 7)
    assert (mask.sum(dim=0) == 7).all()
    assert ((S != 0).sum(dim=0) == 3).all()
    torch.testing.assert_close(D @ S, Z, rtol=1e-9, atol=1e-9)


def test_float32_pursuit_codes_as_well() -> None:
    D, Z = unit(random(40, 30)), random(40, 50, seed=1)
    S, mask = matching_pursuit(D.float(), Z.float(), 15)
    exact = squared_error(Z, D, matching_pursuit(D, Z, 15)[0])
    assert squared_error(Z, D, S.double()) == pytest.approx(exact, rel=1e-4)
    assert (mask.sum(dim=0) == 15).all()


def test_a_sweep_never_raises_the_error_and_holds_the_supports() -> None:
    D, Z = unit(random(20, 30)), random(20, 50, seed=1)
    S, mask = matching_pursuit(D, Z, 6)
    before = squared_error(Z, D, S)
    for _ in range(3):
        D, S = ksvd_update(Z, D, S, mask)
        after = squared_error(Z, D, S)
        assert after < before
        before = after
        assert not S[~mask].any()
        torch.testing.assert_close(D.norm(dim=0), torch.ones(30).double())


def test_an_update_of_one_atom_is_the_svd_of_its_residual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ksvd, "POWER_STEPS", 500)
    Z, d = random(10, 40), unit(random(10, 1, seed=2))
    used = random(1, 40, seed=3) > 0
    D, S = ksvd_update(Z, d, (d.T @ Z) * used, used)
    U, sigma, Vh = torch.linalg.svd(Z[:, used[0]])
    torch.testing.assert_close(D @ S[:, used[0]], sigma[0] * torch.outer(U[:, 0], Vh[0]))


def test_a_seed_decides_the_start() -> None:
    problem = DictionaryProblem.of(random(60, 12), solver="cospadi")
    runs = [problem.solve(atoms=8, nonzeros=3, rounds=1, seed=seed).weight() for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])


def test_the_start_is_columns_of_the_weight_itself() -> None:
    """A weight of few distinct outputs is its own dictionary, if no two of one kind are drawn."""
    W = random(6, 9)
    problem = DictionaryProblem.of(W, solver="cospadi")
    found = problem.solve(atoms=6, nonzeros=1, rounds=1)
    assert found.relative_error < 1e-20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_sweep_is_the_sweep_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    Z, D = random(24, 60).cuda(), unit(random(24, 16, seed=1)).cuda()
    S, mask = matching_pursuit(D, Z, 5)
    recorded = ksvd_update(Z, D, S, mask)

    def run_once(step: Callable[[], None], _: torch.device) -> Callable[[], None]:
        step()
        return step

    monkeypatch.setattr(ksvd, "record", run_once)
    for one, other in zip(recorded, ksvd_update(Z, D, S, mask), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
