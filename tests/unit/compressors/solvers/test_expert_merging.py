"""Neurons that correspond to each other are found again, and groups hold what is similar."""

import pytest
import torch
from torch import Tensor

from lrc.compressors.solvers.expert_merging import (
    DIMENSIONS,
    align_neurons,
    expert_similarity,
    group_experts,
    reduced_neurons,
)


@pytest.fixture
def g() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def test_a_permutation_of_neurons_is_undone(g):
    neurons, activations = torch.randn(1, 40, 90, generator=g), torch.randn(40, 25, generator=g)
    order = torch.randperm(40, generator=g)
    noise = 0.05 * torch.randn(2, 40, 90, generator=g)
    both = torch.cat([neurons, neurons[:, order]]) + noise
    reduced = reduced_neurons(both, g)
    shifted = activations[order] + 0.05 * torch.randn(40, 25, generator=g)
    found = align_neurons((activations, shifted), (reduced[0], reduced[1]))
    assert torch.equal(order[found], torch.arange(40))


def test_reduced_neurons_have_the_angles_of_the_principal_components_times_singular_values(g):
    scales = torch.arange(1, 81, dtype=torch.float64).pow(-2)
    neurons = torch.randn(3, 50, 80, generator=g, dtype=torch.float64) * scales
    X = unit(neurons.flatten(0, 1))
    X = X - X.mean(dim=0)
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    expected = unit(U[:, :DIMENSIONS] * S[:DIMENSIONS].square())
    found = reduced_neurons(neurons, g)
    assert found.shape == (3, 50, DIMENSIONS)
    flat = found.flatten(0, 1)
    torch.testing.assert_close(flat @ flat.T, expected @ expected.T, rtol=0, atol=1e-6)


def test_similarity_is_the_mean_over_outputs_and_router(g):
    outputs = torch.randn(5, 30, generator=g, dtype=torch.float64)
    logits = torch.randn(20, 5, generator=g, dtype=torch.float64)
    outputs[3], logits[:, 3] = 2 * outputs[1], 3 * logits[:, 1]
    outputs[4], logits[:, 4] = -outputs[1], -logits[:, 1]
    found = expert_similarity(outputs, logits)
    torch.testing.assert_close(found, found.T)
    assert float(found[1, 3]) == pytest.approx(1, abs=1e-6)
    assert float(found[1, 4]) == pytest.approx(0, abs=1e-6)
    cosine = float(unit(outputs[0]) @ unit(outputs[1]))
    distance = torch.linalg.norm(unit(logits.T)[0] - unit(logits.T)[1])
    expected = ((1 + cosine) / 2 + 1 - float(distance) / 2) / 2  # the largest distance is 2
    assert float(found[0, 1]) == pytest.approx(expected)


def test_centres_take_the_most_similar_of_what_is_left_in_the_order_of_their_scores():
    scores = torch.tensor([1.0, 5.0, 0.5, 4.0, 0.1, 0.2])
    similarity = torch.eye(6)
    similarity[1, [0, 2, 4, 5]] = torch.tensor([0.9, 0.8, 0.1, 0.2])
    similarity[3, [0, 2, 4, 5]] = torch.tensor([0.99, 0.7, 0.3, 0.4])
    assert group_experts(scores, similarity, [3, 1], 3) == [[1, 0, 2], [3, 5, 4]]
    assert group_experts(scores, similarity, [3, 1], 5) == [[1, 0, 2, 5, 4], [3]]
    with pytest.raises(ValueError, match="2 groups of at most 2 do not hold 6 experts"):
        group_experts(scores, similarity, [3, 1], 2)
