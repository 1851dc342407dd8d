from dataclasses import dataclass
from typing import Any, Literal

import torch

from lrc.compressors.layers.scheme import VALUES_GROUP
from lrc.compressors.quantize.rounded import Rounded

from lrc.compressors.quantize.gptq import gptq
from lrc.compressors.quantize.rtn import rtn
def r_(W,H,scheme,rounder,dtype): return gptq(W,H,scheme,dtype=dtype) if rounder=="gptq" else rtn(W,scheme,dtype=dtype,H=H)
@dataclass
class Pair:
    a: Any
    b: Any


def _two(W,B,A,H,scheme,rounder,dtype):
    qa=r_(A,H,scheme,rounder,dtype); Aq=qa.weight(); H=H.double()
    HA=H@Aq.T; G=Aq@HA; G=G+1e-6*G.diagonal().mean()*torch.eye(len(G),dtype=G.dtype,device=G.device)
    B2=torch.linalg.solve(G,(W.double()@HA).T).T
    return Pair(qa,r_(B2,G,scheme,rounder,dtype))
def round_pair(W,B,A,H,scheme,*,rounder,gauge="x",dtype,seed=0):
    Q,R=torch.linalg.qr(B); U,S,V=torch.linalg.svd(R@A,full_matrices=False)
    g=torch.Generator().manual_seed(0); O,_=torch.linalg.qr(torch.randn(len(S),len(S),generator=g,dtype=torch.float64)); O=O.to(W.device)
    return _two(W,Q@U@torch.diag(S**.5)@O.T,O@torch.diag(S**.5)@V,H,scheme,rounder,dtype)
def round_pivot(W,R,C,order,H,scheme,*,rounder,dtype):
    rows=torch.empty_like(W); rows[order]=W
    rest=torch.empty(len(W),W.shape[1],dtype=torch.float64,device=W.device)
    inv=torch.argsort(order); ordered=W.double()[inv]
    return _two(ordered[R.shape[0]:],C,R,H,scheme,rounder,dtype)
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
