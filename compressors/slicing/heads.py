"""Narrower attention heads: what values carry to the output, and which rotary pairs make scores.

A key-value head and the query heads that read it form a group. Values and outputs meet in no other
place, so that the pair has a joint optimum. Queries and keys meet behind the rotary embedding,
through which no matrix but a scaled rotation of one pair passes: pairs are only chosen. Pair ``i``
of a head of width h is its dimensions ``i`` and ``i + h/2``.
"""

import torch
from torch import Tensor

from lrc.compressors.solvers.linalg import descending_eigh, whitening_factor


def value_output(
    W_o: Tensor, C: Tensor, rank: int, *, damp: float
) -> tuple[Tensor, Tensor, float, str | None]:
    """Reduce the value of one key-value head to what the outputs of its group notice most.

    Minimises ``tr((W_o - V P) C (W_o - V P)^T)`` over P [rank, h] and V [d_out, rank].

    Parameters
    ----------
    W_o : Tensor, shape [d_out, h]
        What reads the value, stacked below each other: for every query head of the group its
        columns of the output projection [d, h].
    C : Tensor, shape [h, h]
        Second moment, per token, of the value with its bias, or of its averages under attention.
    rank : int
        New width of the head, in ``[1, h]``.
    damp : float
        Fraction of ``mean(diag(C))`` added to its diagonal; positive.

    Returns
    -------
    P : Tensor, shape [rank, h]
        Goes to the value: ``P W_v`` and ``P b_v``. In float64.
    V : Tensor, shape [d_out, rank]
        In place of `W_o`, in float64. Both carry half of each singular value.
    lost : float
        Share of the energy ``tr(W_o C W_o^T)`` that is gone.
    fallback : str or None
        What had to be done beyond the request; None if nothing.

    Raises
    ------
    ValueError
        If the rank is out of range.

    Notes
    -----
    With ``C = L L^T`` the optimum is the truncated SVD of ``W_o L`` (Eckart-Young). For
    ``C = W_v C_x W_v^T`` that of ``W_o W_v C_x^(1/2)``, the value-output module of [1]_: the same
    product, taken where it is h wide and not d.

    References
    ----------
    .. [1] C.-H. Lin et al., "MoDeGPT: Modular Decomposition for Large Language Model Compression",
       ICLR 2025. https://arxiv.org/abs/2408.09632
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
    # The right singular vectors of W_o L alone are needed: an eigenproblem of size h.
    M = W_o @ L  # [d_out, h]
    energies, vectors = descending_eigh(M.T @ M)
    top = vectors[:, :rank]  # [h, rank]
    gauge = energies[:rank].clamp_min(energies[0].clamp_min(1e-300) * 1e-12) ** 0.25
    P = gauge[:, None] * torch.linalg.solve_triangular(L.T, top, upper=True).T  # [rank, h]
    V = (M @ top) / gauge  # [d_out, rank]
    E = W_o - V @ P
    total = float(((W_o @ C) * W_o).sum())
    lost = float(((E @ C) * E).sum()) / total if total > 0 else 0.0
    return P, V, max(0.0, lost), fallback


def score_moments(
    q: Tensor, k: Tensor, at: Tensor, frequencies: Tensor, *, scaling: float
) -> Tensor:
    """Return how the parts that rotary pairs have in the scores vary together, by query head.

    Of each pair there are two parts, its own ``q k`` and that of the query turned by a right angle:
    a scale and a turn of a pair's queries, which pass the rotary embedding, mix the two.

    Parameters
    ----------
    q : Tensor, shape [n, length, n_heads, head_dim]
        Outputs of the query projection, not yet rotated.
    k : Tensor, shape [n, length, n_kv_heads, head_dim]
    at : Tensor, shape [n_queries]
        Positions whose queries are looked at.
    frequencies : Tensor, shape [head_dim / 2]
    scaling : float
        Of the scores.

    Returns
    -------
    Tensor, shape [n_heads, head_dim, head_dim]
        Sum over the queries of the covariance, under the query's own attention, of the parts: pair
        by pair the plain ones, then the turned ones. Float64.

    Notes
    -----
    Softmax forgets what all keys have in common, and what a change D of a query's scores does to
    its attention p is, to second order, a divergence of ``Var_p(D) / 2``. The norms of queries and
    keys that the CR rule of MoDeGPT multiplies count what is in common too. SmolLM2-135M with 24
    of 32 pairs has a perplexity of 246 with pairs chosen by those norms, of 67 with pairs chosen
    by this, and of 32 once queries are scaled and turned. Of a sliding window nothing is known
    here: all keys before a query count.
    """
    n, length, n_heads, head_dim = q.shape
    angles = torch.arange(length, device=q.device).float()[:, None] * frequencies  # [length, h/2]
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [length, 1, h/2]
    q_c, k_c = (torch.complex(*x.float().chunk(2, dim=-1)) * turn for x in (q, k))
    total = q.new_zeros(n_heads, head_dim, head_dim, dtype=torch.float64)
    later = torch.arange(length, device=q.device) > at[:, None]  # [n_queries, length]
    for row in range(n):
        for head in range(n_heads):
            keys = k_c[row, :, head * k.shape[2] // n_heads]  # [length, h/2]
            # conj(q) k = (q1 k1 + q2 k2) + i (q1 k2 - q2 k1)
            products = scaling * q_c[row, at, head].conj()[:, None] * keys  # [n_queries, length, .]
            parts = torch.cat([products.real, products.imag], dim=-1)  # [n_queries, length, h]
            scores = products.real.sum(dim=-1).masked_fill(later, -torch.inf)
            p = scores.softmax(dim=-1)[..., None]  # [n_queries, length, 1]
            centred = ((parts - (p * parts).sum(dim=1, keepdim=True)) * p.sqrt()).flatten(0, 1)
            total[head] += (centred.T @ centred).double()
    return total


def choose_pairs(M: Tensor, count: int, *, damp: float) -> tuple[Tensor, Tensor, float]:
    """Choose the rotary pairs that all heads keep, and how each head's queries make up for others.

    Backward elimination, one pair at a time, of the one without which the scores of all heads
    together lose least once the pairs that are left have been scaled and turned anew.

    Parameters
    ----------
    M : Tensor, shape [n_heads, head_dim, head_dim]
        `score_moments` of every query head of the model.
    count : int
        Pairs to keep, in ``[1, head_dim / 2]``.
    damp : float
        Fraction of ``mean(diag(M))`` of a head added to its diagonal; positive.

    Returns
    -------
    pairs : Tensor, shape [count]
        Ascending.
    turns : Tensor, shape [n_heads, count]
        Complex: what the queries of a kept pair, as ``q1 + i q2``, are multiplied by.
    lost : float
        Share of the variance of the scores that is gone.

    Raises
    ------
    ValueError
        If the number of pairs is out of range.
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
    whole = torch.einsum("h,nhg,g->", target, M, target).clamp_min(1e-300)
    pairs = torch.tensor(alive, device=M.device)
    # Parts c1 Re(conj(q) k) + c2 Im(conj(q) k) are Re(conj(w q) k) for w = c1 + i c2.
    turns = torch.complex(c[:, pairs], c[:, pairs + n_pairs])
    return pairs, turns, float(lost / whole)


def _inverse(M: Tensor, damp: float) -> Tensor:
    """Invert a damped moment; that of a head without scores as if it had some of each."""
    if not M.diagonal().any():
        return torch.eye(len(M), dtype=M.dtype, device=M.device)
    L, _ = whitening_factor(M, damp)
    result: Tensor = torch.cholesky_inverse(L)
    return result


def turn_queries(tensor: Tensor, pairs: Tensor, turns: Tensor, head_dim: int) -> Tensor:
    """Take some pairs of every query head along the first axis, each scaled and turned.

    Parameters
    ----------
    tensor : Tensor, shape [n_heads * head_dim, ...]
    turns : Tensor, shape [n_heads, n_kept]
        Complex.

    Returns
    -------
    Tensor, shape [n_heads * 2 * n_kept, ...]
        In float64.
    """
    halves = tensor.double().view(len(turns), 2, head_dim // 2, -1)[:, :, pairs]
    turned = torch.complex(halves[:, 0], halves[:, 1]) * turns[:, :, None]  # [n_heads, n_kept, .]
    result = torch.stack([turned.real, turned.imag], dim=1)  # [n_heads, 2, n_kept, .]
    return result.reshape(-1, *tensor.shape[1:])


def pair_dimensions(pairs: Tensor, head_dim: int) -> Tensor:
    """Return the dimensions of a head [2 * n_kept] that some pairs are, in the order of a head."""
    return torch.cat([pairs, pairs + head_dim // 2])


def take(tensor: Tensor, dimensions: Tensor, head_dim: int) -> Tensor:
    """Take the same dimensions of every head along the first axis [n_heads * head_dim, ...]."""
    by_head = tensor.view(-1, head_dim, *tensor.shape[1:])
    return by_head[:, dimensions].flatten(0, 1)


def spread(tensor: Tensor, dimensions: Tensor, head_dim: int) -> Tensor:
    """Undo `take`, with zeros in the other dimensions of every head."""
    by_head = tensor.view(-1, len(dimensions), *tensor.shape[1:])
    result = by_head.new_zeros(len(by_head), head_dim, *tensor.shape[1:])
    result[:, dimensions] = by_head
    return result.flatten(0, 1)


def project(tensor: Tensor, P: Tensor) -> Tensor:
    """Apply ``P`` [n_heads, rank, h] to every head along the first axis [n_heads * h, ...]."""
    by_head = tensor.to(P).view(P.shape[0], P.shape[2], -1)
    return (P @ by_head).reshape(-1, *tensor.shape[1:])
