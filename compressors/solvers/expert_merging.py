"""Merge experts of a layer: which ones, and which of their neurons correspond to each other.

A neuron of an expert is a row of its first matrix (two if it has a gate) and a column of its second
one. Neurons have no common order, so that experts can be averaged only after those of each are put
in the order of one of them.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

DIMENSIONS = 64
"""Principal components of the weights of neurons by which these are compared, as published."""
ITERATIONS, MORE = 4, 16
"""Iterations, and directions besides those that are needed, of the search for them."""


def expert_similarity(outputs: Tensor, logits: Tensor) -> Tensor:
    """Return how similar experts are to each other, [n_experts, n_experts] in [0, 1].

    The mean of the cosine of their outputs and of a similarity of the scores that the router gives
    them, both mapped to [0, 1].

    Parameters
    ----------
    outputs : Tensor, shape [n_experts, d_model]
        Mean over tokens of the output times the weight of the router.
    logits : Tensor, shape [n_tokens, n_experts]
        Scores of the router.
    """
    unit = torch.nn.functional.normalize(outputs.double(), dim=1)
    by_output = (1 + unit @ unit.T) / 2
    scores = torch.nn.functional.normalize(logits.double().T, dim=1)  # [n_experts, n_tokens]
    distance = torch.cdist(scores, scores)
    by_router = 1 - distance / distance.max().clamp_min(torch.finfo(distance.dtype).tiny)
    return (by_output + by_router) / 2


def group_experts(
    scores: Tensor, similarity: Tensor, centres: Sequence[int], size: int
) -> list[list[int]]:
    """Assign every expert to one of the centres; the first of each group is its centre.

    In the order of their scores, each centre takes the most similar of the experts that are left,
    until its group is full, so that experts far from all centres end in the last groups.

    Parameters
    ----------
    scores : Tensor, shape [n_experts]
    similarity : Tensor, shape [n_experts, n_experts]
    centres : sequence of int
        Numbers of the experts that are kept.
    size : int
        Largest number of experts in a group.

    Returns
    -------
    list of list of int
        In ascending order of the centres.

    Raises
    ------
    ValueError
        If the groups do not hold all experts.
    """
    if size * len(centres) < len(scores):
        raise ValueError(
            f"{len(centres)} groups of at most {size} do not hold {len(scores)} experts"
        )
    left = {*range(len(scores))} - {*centres}
    groups = {centre: [centre] for centre in sorted(centres)}
    for centre in sorted(centres, key=lambda number: -float(scores[number])):
        near = sorted(left, key=lambda number: (-float(similarity[centre, number]), number))
        groups[centre] += near[: size - 1]
        left -= {*groups[centre]}
    return [*groups.values()]


def reduced_neurons(neurons: Tensor, generator: torch.Generator) -> Tensor:
    """Return the principal components of neurons, times the singular values.

    Parameters
    ----------
    neurons : Tensor, shape [n_experts, width, d]
        Weights of the neurons of all experts.
    generator : torch.Generator
        On the CPU.

    Returns
    -------
    Tensor, shape [n_experts, width, `DIMENSIONS` or less]
        Of unit rows.
    """
    X = torch.nn.functional.normalize(neurons.flatten(0, 1), dim=1)  # [n_experts * width, d]
    X = X - X.mean(dim=0)
    count = min(DIMENSIONS, *X.shape)
    start = torch.randn(X.shape[1], min(count + MORE, *X.shape), generator=generator)
    basis = torch.linalg.qr(start.to(X)).Q  # [d, count + MORE]
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(X.T @ (X @ basis)).Q
    image = X @ basis
    energies, turn = torch.linalg.eigh(image.T @ image)  # ascending
    weights = energies[-count:].clamp_min(0).sqrt()
    reduced = image @ (turn[:, -count:] * weights)
    return torch.nn.functional.normalize(reduced, dim=1).view(*neurons.shape[:2], count)


def align_neurons(activations: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]) -> Tensor:
    """Return for each neuron of a first expert the neuron of a second one that it corresponds to.

    The assignment has the least sum of distances between the activations on the same tokens
    [width, n_tokens], scaled to norm 1, and between the `reduced_neurons` [width, d] of the two.
    """
    first, second = (torch.nn.functional.normalize(each.float(), dim=1) for each in activations)
    cost = torch.cdist(first, second) + torch.cdist(*weights)
    _, found = linear_sum_assignment(cost.double().cpu().numpy())
    return torch.from_numpy(found)
