from dataclasses import dataclass
from typing import Any, Literal

import torch

from lrc.compressors.layers.scheme import VALUES_GROUP
from lrc.compressors.quantize.rounded import Rounded

Rounder = Literal["gptq", "rtn"]


def rtn(W, scheme, *, dtype, H=None):
    rows, cols = W.shape
    g = scheme.groups(cols)
    G = W.double().view(rows, g, -1)
    s = (G.abs().amax(-1) / scheme.highest).clamp_min(1e-8).to(dtype)
    zero = None
    if not scheme.symmetric:
        zero = torch.zeros(rows, g, dtype=torch.int8)
    c = (
        (G / s.double()[:, :, None])
        .round()
        .clamp(scheme.lowest, scheme.highest)
        .to(torch.int8)
        .view(rows, cols)
    )
    return Rounded(c, s, zero, scheme)


def round_weight(W, H, scheme, *, rounder, dtype, damp=0.01, order=True):
    return rtn(W, scheme, dtype=dtype)


@dataclass
class Pair:
    a: Any
    b: Any


def round_pair(W, B, A, H, scheme, *, rounder, gauge="x", dtype, seed=0):
    return Pair(rtn(A, scheme, dtype=dtype), rtn(B, scheme, dtype=dtype))


def round_pivot(W, R, C, order, H, scheme, *, rounder, dtype):
    return Pair(rtn(R, scheme, dtype=dtype), rtn(C, scheme, dtype=dtype))


def round_values(v, scheme, *, dtype):
    g = scheme.group_size or VALUES_GROUP
    n = v.numel()
    p = -(-n // g) * g
    x = torch.zeros(p, dtype=torch.float64)
    x[:n] = v.double()
    x = x.view(-1, g)
    s = (x.abs().amax(-1) / scheme.highest).clamp_min(1e-8).to(dtype)
    return (x / s.double()[:, None]).round().clamp(scheme.lowest, scheme.highest).to(
        torch.int8
    ).flatten()[:n], s


def round_sparse(W, W_hat, mask, H, scheme, *, dtype):
    return round_values(W_hat[mask], scheme, dtype=dtype)


def branch(E, H, rank, kind):
    U, S, V = torch.linalg.svd(E.double(), full_matrices=False)
    return U[:, :rank] * S[:rank], V[:rank]
