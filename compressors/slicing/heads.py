"""Narrow attention heads: low-rank values and outputs, and a choice of rotary pairs.

A key-value head and the query heads that read it form a group. Values and outputs are connected by
a linear map only, so that a truncated SVD is their joint optimum. Between queries and keys is the
rotary embedding, which only a scaled rotation of one pair commutes with, so pairs are selected.
Pair ``i`` of a head of width h consists of its dimensions ``i`` and ``i + h/2``.
"""

import torch
from torch import Tensor

from lrc.compressors.slicing.mlp import lost_energy
from lrc.compressors.solvers.linalg import descending_eigh, whitening_factor


def value_output(
    W_o: Tensor, C: Tensor, rank: int, *, damp: float
) -> tuple[Tensor, Tensor, float, str | None]:
    """Reduce the width of one value head, with the least error in the outputs of its group.

    Minimises ``tr((W_o - V P) C (W_o - V P)^T)`` over P [rank, h] and V [d_out, rank]. P multiplies
    the value projection (``P W_v`` and ``P b_v``), V replaces `W_o`. Both are float64, and each
    carries half of every singular value. Also returns the lost fraction of the energy
    ``tr(W_o C W_o^T)``, and the deviation from the requested computation, None if there was none.

    Parameters
    ----------
    W_o : Tensor, shape [d_out, h]
        The columns [d, h] of the output projection for each query head of the group, stacked
        vertically.
    C : Tensor, shape [h, h]
        Second moment per token of the value with its bias, or of its averages under attention.
    rank : int
        New width of the head, in ``[1, h]``.
    damp : float
        Fraction of ``mean(diag(C))`` added to its diagonal; positive.

    Notes
    -----
    With ``C = L L^T`` the optimum is the truncated SVD of ``W_o L`` (Eckart-Young). For
    ``C = W_v C_x W_v^T`` this is the SVD of ``W_o W_v C_x^(1/2)``, the value-output module of
    MoDeGPT, computed at width h instead of d.
    """
    h = W_o.shape[1]
    if not 1 <= rank <= h:
        raise ValueError(f"rank must be in [1, {h}], got {rank}")
    W_o, C = W_o.double(), C.double()
    if rank == h:
        return torch.eye(h, dtype=W_o.dtype, device=W_o.device), W_o.clone(), 0.0, None
    if not C.diagonal().any():
        C = torch.eye(h, dtype=C.dtype, device=C.device)
    L, fallback = whitening_factor(C, damp)
    # Only the right singular vectors of W_o L are needed: an eigenproblem of size h.
    M = W_o @ L  # [d_out, h]
    energies, vectors = descending_eigh(M.T @ M)
    top = vectors[:, :rank]  # [h, rank]
    balance = energies[:rank].clamp_min(energies[0].clamp_min(1e-300) * 1e-12) ** 0.25
    P = balance[:, None] * torch.linalg.solve_triangular(L.T, top, upper=True).T  # [rank, h]
    V = (M @ top) / balance  # [d_out, rank]
    return P, V, lost_energy(W_o, V @ P, C), fallback


def choose_pairs(M: Tensor, count: int, *, damp: float) -> tuple[Tensor, Tensor, float]:
    """Choose the rotary pairs that all heads keep, and refit the queries of each head to them.

    Backward elimination: each step removes the pair whose removal costs least in the scores of all
    heads together, once the queries of the remaining pairs have been scaled and rotated again.
    Returns the pairs [count], the complex factors [n_heads, count] of their queries ``q1 + i q2``,
    and the fraction of the variance of the scores that is lost.

    Parameters
    ----------
    M : Tensor, shape [n_heads, head_dim, head_dim]
        `score_moments` of every query head of the model.
    count : int
        Number of pairs to keep, in ``[1, head_dim / 2]``.
    damp : float
        Fraction of ``mean(diag(M))`` of a head added to its diagonal; positive.
    """
    n_pairs = M.shape[1] // 2
    if not 1 <= count <= n_pairs:
        raise ValueError(f"count must be in [1, {n_pairs}], got {count}")
    M = M.double()
    Q = torch.stack([_inverse(one, damp) for one in M])
    target = torch.cat([M.new_ones(n_pairs), M.new_zeros(n_pairs)])
    c = target.expand(len(M), -1).clone()  # [n_heads, h]
    alive = list(range(n_pairs))
    while len(alive) > count:
        both = torch.tensor([[i, i + n_pairs] for i in alive], device=M.device)  # [n_alive, 2]
        blocks = Q[:, both[:, :, None], both[:, None, :]]  # [n_heads, n_alive, 2, 2]
        parts = c[:, both]  # [n_heads, n_alive, 2]
        costs = (parts * torch.linalg.solve(blocks, parts)).sum(dim=(0, 2))
        B = both[costs.argmin()]
        rows = torch.linalg.solve(Q[:, B][:, :, B], Q[:, B])  # [n_heads, 2, h]
        c = c - torch.einsum("nb,nbh->nh", c[:, B], rows)
        Q = Q - Q[:, :, B] @ rows
        c[:, B] = 0
        alive.remove(int(B[0]))
    rest = target - c
    lost = torch.einsum("nh,nhg,ng->", rest, M, rest)
    total = torch.einsum("h,nhg,g->", target, M, target).clamp_min(1e-300)
    pairs = torch.tensor(alive, device=M.device)
    # Parts c1 Re(conj(q) k) + c2 Im(conj(q) k) are Re(conj(w q) k) for w = c1 + i c2.
    turns = torch.complex(c[:, pairs], c[:, pairs + n_pairs])
    return pairs, turns, float(lost / total)


def _inverse(M: Tensor, damp: float) -> Tensor:
    """Invert a damped moment; return the identity for a head whose scores are all zero."""
    if not M.diagonal().any():
        return torch.eye(len(M), dtype=M.dtype, device=M.device)
    L, _ = whitening_factor(M, damp)
    result: Tensor = torch.cholesky_inverse(L)
    return result


def turn_queries(tensor: Tensor, pairs: Tensor, turns: Tensor, head_dim: int) -> Tensor:
    """Select pairs of every query head along the first axis, and scale and rotate each of them.

    From [n_heads * head_dim, ...] to [n_heads * 2 * n_kept, ...] in float64, with complex factors
    `turns` [n_heads, n_kept].
    """
    halves = tensor.double().view(len(turns), 2, head_dim // 2, -1)[:, :, pairs]
    turned = torch.complex(halves[:, 0], halves[:, 1]) * turns[:, :, None]  # [n_heads, n_kept, .]
    result = torch.stack([turned.real, turned.imag], dim=1)  # [n_heads, 2, n_kept, .]
    return result.reshape(-1, *tensor.shape[1:])


def pair_dimensions(pairs: Tensor, head_dim: int) -> Tensor:
    """Return the dimensions [2 * n_kept] of some pairs, in the order of a head."""
    return torch.cat([pairs, pairs + head_dim // 2])


def take(tensor: Tensor, dimensions: Tensor, head_dim: int) -> Tensor:
    """Select the same dimensions of every head along the first axis [n_heads * head_dim, ...]."""
    by_head = tensor.view(-1, head_dim, *tensor.shape[1:])
    return by_head[:, dimensions].flatten(0, 1)


def spread(tensor: Tensor, dimensions: Tensor, head_dim: int) -> Tensor:
    """Invert `take`, with zeros in the other dimensions of every head."""
    by_head = tensor.view(-1, len(dimensions), *tensor.shape[1:])
    result = by_head.new_zeros(len(by_head), head_dim, *tensor.shape[1:])
    result[:, dimensions] = by_head
    return result.flatten(0, 1)


def project(tensor: Tensor, P: Tensor) -> Tensor:
    """Apply ``P`` [n_heads, rank, h] to every head along the first axis [n_heads * h, ...]."""
    by_head = tensor.to(P).view(P.shape[0], P.shape[2], -1)
    return (P @ by_head).reshape(-1, *tensor.shape[1:])
