"""Ranks of the `low-rank` method: given, from the fraction that is kept, or from a size."""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lrc.compressors.deltas.calibrated_moments import Moments, MomentsOf, no_moments
from lrc.compressors.deltas.delta_codecs import difference
from lrc.compressors.deltas.lora_folder import Lora, truncated_product
from lrc.compressors.solvers.factor_balancing import equalize_norms
from lrc.configs.delta_methods import LowRank
from lrc.configs.errors import UsageError
from lrc.configs.size import least_text, parse_size, unit_of


@dataclass(frozen=True)
class _Matrix:
    """What the choice of a rank depends on."""

    shape: list[int]
    most: int
    """The largest rank."""
    numbers: int
    """Numbers of the matrix, or of both factors of an adapter."""
    energies: list[float] | None = None
    """Squared singular values, in descending order; only if a size is given."""


def matrix_ranks(
    pairs: Iterable[tuple[str, Tensor, Tensor]],
    options: LowRank,
    moments: MomentsOf = no_moments,
) -> dict[str, int]:
    """Return the ranks of the differences of matrices [d_out, d_in], by name.

    Parameters
    ----------
    pairs : iterable
        Name, tensor of the base and tuned tensor of everything that is stored. All except
        floating-point matrices are stored as they are.
    moments : callable
        Metrics of the differences. A matrix without one, such as an embedding, is weighted by the
        mean energy of all others over their squared norms.

    Raises
    ------
    UsageError
        If a rank is out of range, or the size too small.
    """
    matrices, rest = dict[str, _Matrix](), 0
    plain, weighted, without = 0.0, 0.0, set[str]()
    for name, base, tuned in pairs:
        if not is_matrix(tuned):
            rest += tuned.numel() * tuned.element_size()
            continue
        energies = None
        if options.size is not None:
            change, metric = difference(base, tuned).double(), moments(name)
            energies = metric.energies(change).tolist()
            if metric.known:
                plain += float(change.square().sum())
                weighted += sum(energies)
            else:
                without.add(name)
        shape = list(tuned.shape)
        matrices[name] = _Matrix(shape, min(shape), tuned.numel(), energies)
    if plain:
        for name in without:
            same = matrices[name]
            scaled = [weighted / plain * energy for energy in same.energies or []]
            matrices[name] = replace(same, energies=scaled)
    return _ranks(matrices, options, rest)


def is_matrix(tensor: Tensor) -> bool:
    """Return whether a tensor can be the sum of a tensor of the base and a product of factors."""
    return tensor.ndim == 2 and tensor.is_floating_point()


def adapter_ranks(lora: Lora, options: LowRank, moments: MomentsOf = no_moments) -> dict[str, int]:
    """Return the ranks of the products of an adapter by the names of the layers.

    Raises
    ------
    UsageError
        If a rank is out of range, or the size too small.
    """
    matrices = {}
    for module in lora.modules:
        B, A = lora.factors(module)
        energies = None
        if options.size is not None:
            scaled = lora.scaling(module) * _truncated(B, A, 1, moments(f"{module}.weight"))[2]
            energies = scaled.square().tolist()
        shape = [len(B), A.shape[1]]
        matrices[module] = _Matrix(shape, min(*shape, len(A)), B.numel() + A.numel(), energies)
    return _ranks(matrices, options, 0)


def truncated(lora: Lora, ranks: Mapping[str, int], moments: MomentsOf = no_moments) -> Lora:
    """Return an adapter with the closest products of these ranks, in the dtype of its tensors."""
    factors = {}
    for module, rank in ranks.items():
        B, A = lora.factors(module)
        B_hat, A_hat, _ = _truncated(B, A, rank, moments(f"{module}.weight"))
        factors[module] = (B_hat.to(B.dtype), A_hat.to(A.dtype))
    return lora.with_factors(factors)


def _truncated(B: Tensor, A: Tensor, rank: int, metric: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors of `truncated_product` in a metric, and all singular values."""
    if not metric.known:
        return truncated_product(B, A, rank)
    K, L = metric.roots(len(B), A.shape[1])
    left, right, values = truncated_product(K.T @ B.double(), A.double() @ L, rank)
    B_hat = torch.linalg.solve_triangular(K.T, left, upper=True)
    A_hat = torch.linalg.solve_triangular(L, right, upper=False, left=False)
    return *equalize_norms(B_hat, A_hat), values


def _ranks(matrices: Mapping[str, _Matrix], options: LowRank, rest: int) -> dict[str, int]:
    """Return the rank of every matrix; `rest` are bytes of other tensors."""
    if options.size is not None:
        return _within_size(matrices, options, rest)
    if options.rank is not None:
        for name, matrix in matrices.items():
            if options.rank > matrix.most:
                raise UsageError(
                    f"rank: must be in [1, {matrix.most}] for {name} {matrix.shape}, got "
                    f"{options.rank}; lower it, or give 'keep' instead"
                )
        return dict.fromkeys(matrices, options.rank)
    keep = options.keep or options.default_keep
    return {
        name: min(max(1, int(keep * matrix.numbers / sum(matrix.shape))), matrix.most)
        for name, matrix in matrices.items()
    }


def _within_size(matrices: Mapping[str, _Matrix], options: LowRank, rest: int) -> dict[str, int]:
    """Divide the bytes of `options.size` between matrices; every rank is at least 1.

    The next singular value is always taken where it removes the most squared error per byte.
    """
    assert options.size is not None
    width = getattr(torch, options.dtype).itemsize
    cost = {name: width * sum(matrix.shape) for name, matrix in matrices.items()}
    least = rest + sum(cost.values())
    left = parse_size(options.size) - least
    if left < 0:
        raise UsageError(
            f"size: must be at least {least_text(least, unit_of(options.size))}, for rank 1 and "
            f"tensors that are stored as they are, got {options.size}; raise it"
        )
    ranks = dict.fromkeys(matrices, 1)

    def gains(name: str) -> list[tuple[float, str]]:
        energies, rank = matrices[name].energies or [], ranks[name]
        return [(-energies[rank] / cost[name], name)] if rank < matrices[name].most else []

    queue = [gain for name in matrices for gain in gains(name)]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if cost[name] > left:
            continue
        left -= cost[name]
        ranks[name] += 1
        for gain in gains(name):
            heapq.heappush(queue, gain)
    return ranks
