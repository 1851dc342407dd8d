"""Dictionary-sparse factorisation: every output of a weight from its own few atoms.

Transposed, the weight is a product ``W^T ~ D @ S`` of a dictionary D [d_in, atoms] and
coefficients S [atoms, d_out] with the same number of non-zeros in every column. Atoms live in
input space: whitening touches D alone, and S keeps its zeros. The metric of the outputs has to be
diagonal for the same reason: it scales the columns of S, where a full one would mix them.

All solvers work in the eigenbasis of the whitened weight, of ``min(d_out, d_in)`` dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc.compressors.decompose.coding import Code, Pattern, Task
from lrc.compressors.decompose.ksvd import cospadi
from lrc.compressors.decompose.moments import Moment
from lrc.compressors.decompose.spectrum import spectrum
from lrc.compressors.decompose.thresholding import compot, htp, rocket
from lrc.compressors.linalg import RANK_TOLERANCE, whitening_factor

# Up to this many coefficients float64 costs nothing that one would notice.
SMALL = 2**16
# Outputs without gradients keep this share of the largest weight, or their codes would be lost.
FLOOR = 1e-12


@dataclass(frozen=True)
class Dictionary:
    """A weight as ``W_hat = (D @ S).T`` and what that costs in quality.

    `energy` is the weighted squared error, `loss` its share of the weighted energy of W; `errors`
    holds the energy of the best dictionary after each round. `fallback` says what had to deviate
    from the request, None if nothing.
    """

    D: Tensor
    """[d_in, atoms], float64; every atom that is used has length 1 in the metric of the inputs."""
    S: Tensor
    """[atoms, d_out], float64; zero outside `mask`."""
    mask: Tensor
    """[atoms, d_out], bool; exactly `nonzeros` true in every column."""
    energy: float
    loss: float
    fallback: str | None = None
    errors: tuple[float, ...] = ()

    def weight(self) -> Tensor:
        """Return the product ``W_hat`` [d_out, d_in]."""
        return (self.D @ self.S).T


@dataclass(frozen=True)
class Solver:
    """What a solver can do, beside how."""

    solve: Callable[[Task], Code]
    rounds: int
    """As many as are taken if the caller does not say; 1 and no other where there are no rounds."""
    patterns: tuple[Pattern, ...] = ("unstructured",)
    larger: bool = False
    """Whether a dictionary may have more atoms than the space has dimensions."""
    gradients: bool = True
    """Whether outputs are weighted."""


SOLVERS: dict[str, Solver] = {
    "cospadi": Solver(cospadi, rounds=60, larger=True, gradients=False),
    "compot": Solver(compot, rounds=20, patterns=("unstructured", "2:4")),
    "rocket": Solver(rocket, rounds=1),
    "htp": Solver(htp, rounds=15, patterns=("unstructured", "2:4"), larger=True),
}


def solve_dictionary(
    W: Tensor,
    inputs: Moment | None = None,
    gradients: Moment | None = None,
    *,
    atoms: int,
    nonzeros: int,
    solver: str = "htp",
    rounds: int | None = None,
    pattern: Pattern = "unstructured",
    damp: float = 0.0,
    gradient_damp: float = 0.0,
    seed: int = 0,
) -> Dictionary:
    """Factor a weight into a dictionary and sparse coefficients under the metrics of its two sides.

    Minimises ``||L^T (W^T - D @ S) K||_F`` with ``L @ L.T == H`` and ``K @ K.T == diag(G)``, both
    damped.

    Parameters
    ----------
    W : Tensor, shape [d_out, d_in]
        Weight of a linear layer, ``y = x @ W.T``.
    inputs : Moment, optional
        Second moment ``H`` of the inputs. Left out, every input direction counts the same.
    gradients : Moment, optional
        Second moment ``G`` of the loss gradients at the output, of which the diagonal is read.
        Left out, every output counts the same; cospadi does not use it.
    atoms : int
        Size of the dictionary, in ``[1, d_out]``; compot and rocket stop at ``min(d_out, d_in)``.
    nonzeros : int
        Atoms that one output uses, in ``[1, atoms]``.
    solver : str
        One of `SOLVERS`.
    rounds : int, optional
        How often the solver updates codes and dictionary; left out, its own number.
    pattern : {"unstructured", "2:4"}
        ``"2:4"`` lets an output use at most two of every four consecutive atoms.
    damp, gradient_damp : float
        Fraction of ``mean(diag(H))``, ``mean(diag(G))`` added to the diagonal.
    seed : int
        Of the random choices; cospadi alone makes any.

    Returns
    -------
    Dictionary
        In float64, on the device of `W`.

    Raises
    ------
    ValueError
        If a size, the solver or the pattern does not fit, or a moment that has to be whole is not:
        that of the inputs where d_out >= d_in, and for cospadi.

    Notes
    -----
    Large problems are solved in float32, after scaling; energies are measured in float64.
    """
    _check(W, atoms, nonzeros, solver, rounds, pattern)
    chosen = SOLVERS[solver]
    notes = []
    if gradients is not None and not chosen.gradients:
        gradients = None
        notes.append(f"gradients are no part of {solver}; left out of the metric")
    space = _Space.of(W, inputs, gradients, damp, gradient_damp)
    Z = space.Z
    total = float(Z.square().sum())
    scale = (total / Z.numel()) ** 0.5 or 1.0
    dtype = torch.float64 if atoms * Z.shape[1] <= SMALL else torch.float32
    task = Task(
        (Z / scale).to(dtype),
        lengths=space.basis.norm(dim=0).to(dtype),
        columns=lambda which: space.columns(W, inputs, damp, which),
        atoms=atoms,
        nonzeros=nonzeros,
        rounds=rounds or chosen.rounds,
        pattern=pattern,
        seed=seed,
    )
    code = chosen.solve(task)
    D, S = code.D.double(), code.S.double() * scale
    error = float((Z - D @ S).square_().sum())
    return Dictionary(
        D=space.basis @ D,
        S=S / space.weights,
        mask=code.mask,
        energy=error,
        loss=error / total if total > 0 else 0.0,
        fallback="; ".join(filter(None, [*notes, space.fallback])) or None,
        errors=tuple(e * scale**2 for e in code.errors),
    )


def _check(
    W: Tensor, atoms: int, nonzeros: int, solver: str, rounds: int | None, pattern: Pattern
) -> None:
    d_out, d_in = W.shape
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    chosen = SOLVERS[solver]
    most = d_out if chosen.larger else min(d_out, d_in)
    if not 1 <= atoms <= most:
        raise ValueError(
            f"atoms must be in [1, {most}] with {solver} for a weight [{d_out}, {d_in}], "
            f"got {atoms}; take fewer atoms and more non-zeros"
        )
    if not 1 <= nonzeros <= atoms:
        raise ValueError(
            f"nonzeros must be in [1, {atoms}], the number of atoms, got {nonzeros}; "
            "take fewer non-zeros or more atoms"
        )
    if pattern not in chosen.patterns:
        can = ", ".join(name for name, s in SOLVERS.items() if pattern in s.patterns)
        raise ValueError(
            f"pattern must be one of {', '.join(chosen.patterns)} with {solver}, got {pattern!r}; "
            + (f"it takes one of {can}" if can else "no solver has it")
        )
    if pattern == "2:4" and (atoms % 4 or nonzeros != atoms // 2):
        raise ValueError(
            f"pattern 2:4 needs atoms divisible by 4 and half as many nonzeros, got {atoms} atoms "
            f"and {nonzeros} nonzeros; take {max(atoms // 4, 1) * 4} and {max(atoms // 4, 1) * 2}"
        )
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if rounds is not None and chosen.rounds == 1 and rounds != 1:
        raise ValueError(
            f"rounds must be 1 with {solver}, a single step, got {rounds}; leave it out"
        )


@dataclass(frozen=True)
class _Space:
    """The whitened weight in its own eigenbasis: ``basis @ Z == W^T * weights``.

    `basis` [d_in, dim] is orthonormal in the metric of the inputs, `Z` is [dim, d_out], `weights`
    [d_out] are the roots of ``diag(G)``. Directions that are rounding alone are zero in both.
    """

    basis: Tensor
    Z: Tensor
    weights: Tensor
    fallback: str | None

    @classmethod
    def of(
        cls,
        W: Tensor,
        inputs: Moment | None,
        gradients: Moment | None,
        damp: float,
        gradient_damp: float,
    ) -> "_Space":
        """Read the space off the spectrum: it is that of the best low-rank approximation."""
        weights = torch.ones(W.shape[0], dtype=torch.float64, device=W.device)
        outputs = gradients
        if gradients is not None and not gradients.empty:
            fisher = gradients.diagonal.double()
            fisher = fisher + gradient_damp * fisher.mean()
            fisher = fisher.clamp_min(FLOOR * fisher.max())
            weights = fisher.sqrt()
            outputs = Moment.weighted(fisher, W.T)
        found = spectrum(W, inputs, outputs, damp=damp)
        kept = found.energies > RANK_TOLERANCE * found.energies[0]
        size = torch.where(kept, found.energies, 1.0).sqrt() * kept  # [dim]
        rows = found.B.T * weights  # [dim, d_out]
        length = torch.where(kept, rows.norm(dim=1), 1.0)
        Z = rows * (size / length)[:, None]
        basis = found.A.T * (length * kept / torch.where(kept, size, 1.0))
        return cls(basis, Z, weights, found.fallback)

    def columns(self, W: Tensor, inputs: Moment | None, damp: float, which: Tensor) -> Tensor:
        """Project columns of ``W^T``, read as whitened vectors, onto the space: [dim, which]."""
        chosen = W[which].double().T  # [d_in, which]
        if inputs is None or inputs.empty:
            return self.basis.T @ chosen
        L, _ = whitening_factor(inputs.whole(), damp)
        return self.basis.T @ (L @ chosen)  # the basis is orthonormal once whitened: L^T basis
