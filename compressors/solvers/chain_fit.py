"""Chains of cores: tensor-train decomposition, refined under the metric of the method.

The metric mixes the factors of a dimension, so that a whitened weight cannot be decomposed and
un-whitened exactly. What can be is the separable part of the metric: a Kronecker product of one
small matrix for every factor of every dimension, which cores absorb. The decomposition starts from
the weight whitened by it, and alternating least squares under the whole metric follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from lrc.compressors.layers.chain_shape import ChainShape
from lrc.compressors.layers.tensor_train import multiply_out
from lrc.compressors.solvers.conjugate_gradients import conjugate_gradients
from lrc.compressors.solvers.linalg import descending_eigh
from lrc.compressors.solvers.metric import Metric, damped_metric
from lrc.compressors.solvers.moments import Moment

CG_STEPS = 16
"""Conjugate gradient steps for a core, before its neighbour is next.

The problem of a core is poorly conditioned. At `keep: 0.6`, 4 rounds of 16 steps left between 1 %
more and 25 % less error than 8 rounds of 8 steps, on ten matrices of SmolLM2-135M.
"""
CONVERGED = 1e-3
"""The search ends when a round reduces the error by less than this fraction."""
# Relative to the largest. A singular metric has no inverse; the start need not be exact.
SMALLEST_EIGENVALUE = 1e-8
ROUNDING = 1e-14
SHIFT = 1e-14
"""Added to the diagonal of a Gram matrix before it is factored, relative to its trace."""


@dataclass(frozen=True)
class ChainSolution:
    """Cores, and what they lose."""

    cores: list[Tensor]
    """[a, m, n, b], float64."""
    energy: float
    """Weighted squared error."""
    relative_error: float
    """Of removing the whole weight, in [0, 1]."""
    fallback: str | None = None


@dataclass(frozen=True)
class _Roots:
    """Symmetric roots of the separable part of one side of the metric, and their inverses."""

    roots: list[Tensor]
    """[f, f] for every factor f of the dimension."""
    inverses: list[Tensor]

    @classmethod
    def of(cls, M: Tensor, factors: Sequence[int]) -> "_Roots":
        """Take the partial traces of a moment [d, d], or of its diagonal [d]."""
        roots, inverses = [], []
        for k, f in enumerate(factors):
            a, b = prod(factors[:k]), prod(factors[k + 1 :])
            if M.ndim == 1:
                trace = M.view(a, f, b).sum(dim=(0, 2)).diag()
            else:
                trace = torch.einsum("afbagb->fg", M.view(a, f, b, a, f, b))
            values, Q = descending_eigh(trace)
            scale = values.mean().clamp_min(torch.finfo(M.dtype).tiny)
            root = (values / scale).clamp_min(SMALLEST_EIGENVALUE * values[0] / scale).sqrt()
            roots.append(Q * root @ Q.T)
            inverses.append(Q / root @ Q.T)
        return cls(roots, inverses)


def _along(matrices: Sequence[Tensor], X: Tensor) -> Tensor:
    """Multiply ``X`` [d, columns] by the Kronecker product of `matrices` from the left."""
    shape = X.shape
    for k, matrix in enumerate(matrices):
        before = prod(len(each) for each in matrices[:k])
        X = torch.einsum("fg,agc->afc", matrix, X.reshape(before, len(matrix), -1))
    return X.reshape(shape)


@dataclass(frozen=True)
class ChainProblem:
    """A weight, whitened by the separable part of a metric, and the metric that remains."""

    W: Tensor
    """[d_out, d_in], whitened."""
    metric: Metric
    """Of errors of `W`; they have the energy of the same errors before whitening."""
    left: _Roots | None
    right: _Roots | None
    total: float
    """Energy of the weight."""
    fallback: str | None
    _splits: dict[tuple[int, ...], "_Split"] = field(default_factory=dict, repr=False)
    """Of the first unfolding, which chains of all bond dimensions share."""

    @classmethod
    def of(
        cls,
        W: Tensor,
        inputs: Moment | None,
        gradients: Moment | None,
        factors: tuple[Sequence[int], Sequence[int]],
        **damping: float,
    ) -> "ChainProblem":
        """Whiten a weight [d_out, d_in].

        Parameters
        ----------
        inputs, gradients, **damping
            Those of `damped_metric`.
        factors : tuple
            Of the outputs and of the inputs.
        """
        metric, fallback = damped_metric(inputs, gradients, **damping)
        W, H, G = W.double(), metric.H, metric.G
        total = float(metric.energy(W))
        left = None if G is None else _Roots.of(G, factors[0])
        right = None if H is None else _Roots.of(H, factors[1])
        if right is not None and H is not None:
            W = _along(right.roots, W.T).T
            H = _along(right.inverses, _along(right.inverses, H).T)
        if left is not None and G is not None:
            W = _along(left.roots, W)
            half = _along(left.inverses, G if G.ndim == 2 else G[:, None])
            G = _along(left.inverses, half.T).view_as(G) if G.ndim == 2 else half[:, 0] ** 2 / G
        return cls(W, Metric(H, G), left, right, total, fallback)

    def solve(self, shape: ChainShape, rounds: int) -> ChainSolution:
        """Find the cores of a chain.

        Parameters
        ----------
        rounds : int
            Passes over all cores from the last to the first and back; 0 for the start alone.
        """
        search = _Search(self, self._start(shape))
        energy = before = float(self._energy(search.cores))
        for _ in range(rounds):
            search.round()
            before, energy = energy, float(self._energy(search.cores))
            if energy >= (1 - CONVERGED) * before:
                break
        relative = min(1.0, energy / self.total) if self.total > 0 else 0.0
        return ChainSolution(self._unwhitened(search.cores), energy, relative, self.fallback)

    def start_energies(self, shapes: Sequence[ChainShape]) -> list[float]:
        """Return the weighted squared errors of chains before any round."""
        energies = [self._energy(self._start(shape)) for shape in shapes]
        found: list[float] = torch.stack(energies).tolist()
        return found

    def _start(self, shape: ChainShape) -> list[Tensor]:
        return tensor_train_svd(self.W, shape, self._splits)

    def _energy(self, cores: Sequence[Tensor]) -> Tensor:
        """Return the weighted squared error of cores of the whitened weight."""
        return self.metric.energy(self.W - multiply_out(cores))

    def _unwhitened(self, cores: list[Tensor]) -> list[Tensor]:
        """Return cores of the weight itself, all with the same norm."""
        found = []
        for k, core in enumerate(cores):
            if self.left is not None:
                core = torch.einsum("ij,ajnb->ainb", self.left.inverses[k], core)
            if self.right is not None:
                core = torch.einsum("ij,amjb->amib", self.right.inverses[k], core)
            found.append(core)
        norms: list[float] = torch.stack([core.norm() for core in found]).tolist()
        if min(norms) == 0:
            return found
        mean = prod(norm ** (1 / len(norms)) for norm in norms)
        return [core * (mean / norm) for core, norm in zip(found, norms, strict=True)]


def tensor_train_svd(
    W: Tensor, shape: ChainShape, splits: dict[tuple[int, ...], "_Split"] | None = None
) -> list[Tensor]:
    """Decompose a matrix [d_out, d_in] by successive truncated singular value decompositions.

    The error is at most ``sqrt(N - 1)`` times the least one of a chain of N cores with these bond
    dimensions [1]_. All cores but the last are orthogonal: as matrices [a m n, b] they have
    orthonormal columns.

    Parameters
    ----------
    W : Tensor
        The matrix [d_out, d_in].
    splits : dict, optional
        Kept by the caller for decompositions of the same `W` with other bond dimensions, which
        have the decomposition of the first unfolding in common.

    References
    ----------
    .. [1] I. V. Oseledets, "Tensor-Train Decomposition", SIAM J. Sci. Comput. 33 (5), 2011.
       https://doi.org/10.1137/090752286
    """
    count = len(shape.outputs)
    order = [axis for k in range(count) for axis in (k, count + k)]
    rest = W.reshape(*shape.outputs, *shape.inputs).permute(order)
    cores: list[Tensor] = []
    splits = {} if splits is None else splits
    for core in shape.cores[:-1]:
        a, m, n, b = core
        rest = rest.reshape(a * m * n, -1)
        if cores:
            split = _Split.of(rest, b)
        else:
            key = (*shape.outputs, *shape.inputs)
            if key not in splits:
                splits[key] = _Split.of(rest, min(rest.shape))
            split = splits[key]
        Q, rest = split.truncated(b)
        cores.append(Q.reshape(core))
    return [*cores, rest.reshape(shape.cores[-1])]


@dataclass(frozen=True)
class _Split:
    """A product ``Q @ R @ V.T`` that is the best approximation of its rank of a matrix M."""

    Q: Tensor
    """[rows, rank], with orthonormal columns."""
    R: Tensor | None
    """[rank, rank], upper triangular; None if the product is ``Q @ V.T``."""
    V: Tensor
    """[columns, rank]: the leading right singular vectors, or ``M.T @ Q``."""

    @classmethod
    def of(cls, M: Tensor, rank: int) -> "_Split":
        """Use the eigenvectors of the smaller Gram matrix."""
        if M.shape[0] <= M.shape[1]:
            Q = descending_eigh(M @ M.T)[1][:, :rank].contiguous()
            return cls(Q, None, M.T @ Q)
        V = descending_eigh(M.T @ M)[1][:, :rank].contiguous()
        return cls(*orthonormalized(M @ V), V)

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return factors [rows, rank] and [rank, columns] of the best product of a lower rank."""
        right = self.V[:, :rank].T
        return self.Q[:, :rank], right if self.R is None else self.R[:rank, :rank] @ right


def orthonormalized(C: Tensor) -> tuple[Tensor, Tensor]:
    """Factor a matrix C [rows, columns] into Q with orthonormal columns, and R upper triangular.

    By the Cholesky factor R of the Gram matrix with a small shift [1]_, which on a GPU takes a
    fraction of the time of Householder reflections. ``C == Q @ R`` holds up to rounding errors in
    any case. Columns of Q are shorter than 1 for singular values of C that are not above
    ``sqrt(SHIFT)`` of its norm.

    Rounding errors of the Gram matrix and of its factorization are at most
    ``(rows + columns + 1) * eps / 2`` times its trace, so that a shift of a few times as much
    cannot fail. It is used if `SHIFT` does.

    References
    ----------
    .. [1] T. Fukaya et al., "Shifted Cholesky QR for Computing the QR Factorization of
       Ill-Conditioned Matrices", SIAM J. Sci. Comput. 42 (1), 2020.
       https://doi.org/10.1137/18M1218212
    """
    gram, numbers = C.T @ C, torch.finfo(C.dtype)
    diagonal, trace = gram.diagonal(), gram.trace()
    diagonal.add_((SHIFT * trace).clamp_min(numbers.tiny))
    L, info = torch.linalg.cholesky_ex(gram)
    diagonal.add_((4 * sum(C.shape) * numbers.eps * trace).clamp_min(numbers.tiny))
    # Both are computed: a decision on the host would have to wait for a GPU.
    L = torch.where(info == 0, L, torch.linalg.cholesky_ex(gram)[0])
    return torch.linalg.solve_triangular(L.T, C, upper=True, left=False), L.T


class _Search:
    """Alternating least squares; one core after the other is solved for, given the others.

    The cores before the current one have orthonormal columns, as in `tensor_train_svd`, and those
    after it orthonormal rows. The problem of a core is then no worse conditioned than the metric.
    """

    def __init__(self, problem: ChainProblem, cores: list[Tensor]) -> None:
        self.problem, self.cores = problem, cores
        # A tensor: a number would have to be waited for.
        self.floor = (ROUNDING * problem.metric(problem.W).norm()) ** 2
        left, right = (side.mean() for side in problem.metric.diagonals(problem.W))
        tiny = torch.finfo(problem.W.dtype).tiny
        H, G = problem.metric.H, problem.metric.G
        self.metric = Metric(
            None if H is None else (H / right.clamp_min(tiny)).float(),
            None if G is None else (G / left.clamp_min(tiny)).float(),
        )

    def round(self) -> None:
        """Solve for all cores from the last one to the first, and back."""
        last = len(self.cores) - 1
        for k in range(last, 0, -1):
            self._improve(k)
            a, m, n, b = self.cores[k].shape
            Q, R = orthonormalized(self.cores[k].reshape(a, -1).T)  # [m * n * b, a], [a, a]
            self.cores[k] = Q.T.reshape(a, m, n, b)
            self.cores[k - 1] = self.cores[k - 1] @ R.T
        for k in range(last):
            self._improve(k)
            a, m, n, b = self.cores[k].shape
            Q, R = orthonormalized(self.cores[k].reshape(-1, b))  # [a * m * n, b], [b, b]
            self.cores[k] = Q.reshape(a, m, n, b)
            self.cores[k + 1] = torch.einsum("cb,bmnd->cmnd", R, self.cores[k + 1])

    def _improve(self, k: int) -> None:
        """Reduce the error by changing core `k` alone.

        The residual is computed in float64, and the change that it requires in float32. The best
        step along this change, in float64 again, never increases the error.
        """
        frame = _Frame.of(self.cores, k)
        metric, core = self.problem.metric, self.cores[k]
        residual = frame.core(metric(self.problem.W - frame.matrix(core)))
        size = residual.norm().clamp_min(torch.finfo(core.dtype).tiny)
        single = frame.single()
        change, _ = conjugate_gradients(
            lambda change: single.core(self.metric(single.matrix(change))),
            torch.zeros_like(core, dtype=torch.float32),
            (residual / size).float(),
            steps=CG_STEPS,
            floor=self.floor / size**2,
        )
        # Of a metric that is singular in float32, the change may have overflowed.
        step = torch.where(change.isfinite().all(), change, 0).double()
        curvature = (step * frame.core(metric(frame.matrix(step)))).sum()
        length = torch.where(curvature > 0, (step * residual).sum() / curvature, 0)
        self.cores[k] = core + length * step


@dataclass(frozen=True)
class _Frame:
    """The chain without one core: a linear map from the core to the matrix, and its adjoint."""

    before: Tensor
    """Product of the cores before it [rows * columns, a]."""
    after: Tensor
    """Product of the cores after it [b, rows * columns]."""
    sizes: tuple[int, int, int, int, int, int]
    """Outputs before the core, of the core and after it; inputs likewise."""
    bonds: tuple[int, int]

    @classmethod
    def of(cls, cores: Sequence[Tensor], k: int) -> "_Frame":
        """Return the chain without core `k`."""
        before, after = cores[0].new_ones(1, 1), cores[0].new_ones(1, 1)
        m0 = n0 = m1 = n1 = 1
        for core in cores[:k]:
            a, m, n, b = core.shape
            before = (before @ core.reshape(a, -1)).view(m0, n0, m, n, b)
            before = before.transpose(1, 2).reshape(-1, b)
            m0, n0 = m0 * m, n0 * n
        for core in reversed(cores[k + 1 :]):
            a, m, n, b = core.shape
            after = (core.reshape(-1, b) @ after).view(a, m, n, m1, n1)
            after = after.transpose(2, 3).reshape(a, -1)
            m1, n1 = m * m1, n * n1
        a, m, n, b = cores[k].shape
        return cls(before, after, (m0, m, m1, n0, n, n1), (a, b))

    def single(self) -> "_Frame":
        """Return the same frame in float32."""
        return replace(self, before=self.before.float(), after=self.after.float())

    def matrix(self, core: Tensor) -> Tensor:
        """Return the matrix [d_out, d_in] with a core [a, m, n, b]."""
        m0, m, m1, n0, n, n1 = self.sizes
        a, b = self.bonds
        found = (self.before @ core.reshape(a, -1)).view(-1, b) @ self.after
        found = found.view(m0, n0, m, n, m1, n1).permute(0, 2, 4, 1, 3, 5)
        return found.reshape(m0 * m * m1, n0 * n * n1)

    def core(self, E: Tensor) -> Tensor:
        """Return the image [a, m, n, b] of a matrix [d_out, d_in] under the adjoint map."""
        m0, m, m1, n0, n, n1 = self.sizes
        a, b = self.bonds
        split = E.reshape(m0, m, m1, n0, n, n1).permute(0, 3, 1, 4, 2, 5)
        found = split.reshape(-1, m1 * n1) @ self.after.T  # [m0 * n0 * m * n, b]
        return (self.before.T @ found.view(m0 * n0, -1)).view(a, m, n, b)
