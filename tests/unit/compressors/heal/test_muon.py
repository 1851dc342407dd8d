"""Updates of Muon are the orthogonal factors of gradients, whatever is computed together."""

import math

import pytest
import torch

from lrc.compressors.heal.muon import ROOT_MEAN_SQUARE, muon_updates

SHAPES = [(5, 9), (9, 5), (70, 9), (9, 9), (4, 9)]


def test_updates_are_nearly_orthogonal_with_the_singular_vectors_of_the_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [1e-3 * torch.randn(shape, generator=generator) for shape in SHAPES]
    for gradient, update in zip(gradients, muon_updates(gradients), strict=True):
        assert update.shape == gradient.shape
        U, _, Vt = torch.linalg.svd(gradient, full_matrices=False)
        inside = U.T @ update @ Vt.T / (ROOT_MEAN_SQUARE * math.sqrt(max(gradient.shape)))
        values = inside.diagonal()
        assert float((inside - values.diag()).abs().max()) < 1e-4
        assert float(values.min()) > 0.3
        assert float(values.max()) < 1.3  # the iteration is meant to be rough


def test_matrices_are_independent_of_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
    together = muon_updates(gradients)
    for gradient, update in zip(gradients, together, strict=True):
        torch.testing.assert_close(muon_updates([gradient])[0], update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gradient_of_zero_moves_nothing(shape: tuple[int, int]) -> None:
    assert torch.equal(muon_updates([torch.zeros(shape)])[0], torch.zeros(shape))
