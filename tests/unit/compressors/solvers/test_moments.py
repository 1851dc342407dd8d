"""Moments: the forms of one quantity agree."""

import pytest
import torch

from lrc.compressors.solvers.linalg import damped
from lrc.compressors.solvers.moments import TOKEN_CAP, Moment, Statistics, token_weights


@pytest.fixture
def tokens() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(60, 8, generator=g, dtype=torch.float64) + 3


@pytest.fixture(name="W")
def weight() -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_seen_through_the_weight_it_is_the_moment_of_the_outputs(
    tokens: torch.Tensor, W: torch.Tensor, damp: float
) -> None:
    whole = Moment.of(tokens.T @ tokens)
    outputs = tokens @ W.T
    image = Moment(whole.diagonal, image=outputs.T @ outputs)
    torch.testing.assert_close(whole.through(W, damp), image.through(W, damp), rtol=1e-10, atol=0)
    expected = W @ damped(whole.whole(), damp) @ W.T
    torch.testing.assert_close(whole.through(W, damp), expected, rtol=1e-10, atol=0)


def test_centred_it_is_the_moment_about_the_mean(tokens: torch.Tensor, W: torch.Tensor) -> None:
    outputs = tokens @ W.T
    both = Moment(
        tokens.square().sum(0), full=tokens.T @ tokens, image=outputs.T @ outputs
    ).centred(tokens.sum(0), len(tokens), W)
    x, y = tokens - tokens.mean(0), outputs - outputs.mean(0)
    torch.testing.assert_close(both.full, x.T @ x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(both.image, y.T @ y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(both.diagonal, x.square().sum(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
def test_weights_of_columns_are_a_diagonal_moment(shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(2)
    W = torch.randn(shape, generator=g, dtype=torch.float64)
    weights = torch.rand(shape[1], generator=g, dtype=torch.float64)
    moment = Moment.weighted(weights, W)
    torch.testing.assert_close(moment.through(W, 0.1), Moment.of(weights.diag()).through(W, 0.1))
    assert (moment.full is None) == (shape[1] > shape[0])  # never the larger of the two squares
    assert (moment.image is None) == (shape[1] < shape[0])


def test_a_moment_without_content_is_rejected_and_an_image_is_not_the_whole() -> None:
    with pytest.raises(ValueError, match="'full' or 'image'"):
        Moment(torch.ones(3))
    with pytest.raises(ValueError, match="only its image"):
        Moment(torch.ones(3), image=torch.eye(2)).whole()


def test_statistics_name_what_is_missing() -> None:
    known = Statistics(7, inputs=Moment.of(torch.eye(3)), input_mean=torch.ones(3))
    assert known.missing({"row_fisher", "inputs", "gradients"}) == ["gradients", "row_fisher"]


def test_ordinary_tokens_count_in_full(tokens: torch.Tensor) -> None:
    weights = token_weights(tokens, 20)
    assert torch.equal(weights, torch.ones(60, 1).double())


def test_no_token_counts_for_more_than_the_cap(tokens: torch.Tensor) -> None:
    x = tokens.clone()
    x[::20] *= 1000  # the first token of every window
    weights = token_weights(x, 20)
    assert ((weights < 1).nonzero()[:, 0] == torch.arange(0, 60, 20)).all()
    counted = (weights[:, 0] * x.square().sum(1)).view(3, 20)
    medians = x.square().sum(1).view(3, 20).quantile(0.5, dim=1)
    torch.testing.assert_close(counted[:, 0], TOKEN_CAP * medians)


def test_weights_depend_on_neither_other_windows_nor_scale(tokens: torch.Tensor) -> None:
    x = tokens.clone()
    x[3], x[27] = 50 * x[3], 70 * x[27]
    weights = token_weights(x, 20)
    torch.testing.assert_close(weights[20:40], token_weights(x[20:40], 20))
    torch.testing.assert_close(weights, token_weights(1e-3 * x, 20))
    turned = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))[0]
    torch.testing.assert_close(weights, token_weights(x @ turned.double(), 20))


@pytest.mark.parametrize("n_tokens", [0, 1, 7])
def test_tokens_that_are_no_whole_windows_are_one(tokens: torch.Tensor, n_tokens: int) -> None:
    """An expert sees some tokens of a window."""
    weights = token_weights(tokens[:n_tokens], 20)
    assert torch.equal(weights, torch.ones(n_tokens, 1).double())


def test_mostly_zero_tokens_set_no_limit_and_bad_ones_stay_bad(tokens: torch.Tensor) -> None:
    x = tokens.clone()
    x[:15] = 0
    x[30] = torch.nan
    x[50] = torch.inf
    weights = token_weights(x, 20)
    assert torch.equal(weights[:20], torch.ones(20, 1).double())
    assert not bool((weights[30] * x[30]).isfinite().any())
    assert not bool((weights[50] * x[50]).isfinite().any())
