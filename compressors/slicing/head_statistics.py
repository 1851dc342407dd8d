"""Second moments of the scores and values of attention heads in the dense model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.calibrate.layer_executor import watch_inputs, watch_outputs
from lrc.compressors.slicing.layout import Attention, Heads
from lrc.compressors.slicing.slice_context import LayerSweep, SliceContext
from lrc.configs.errors import ModelError

# Queries per window, evenly spaced. Each attends to all keys before it, so a few are enough.
QUERIES = 32


@dataclass(frozen=True)
class HeadStatistics:
    """Second moments of the heads of a dense model."""

    scores: Tensor
    """`score_moments` of the query heads of all layers, [n_layers * n_heads, head_dim, head_dim].
    """
    values: Tensor
    """Second moment per token of the attention outputs of the heads of a group, summed over the
    group: [n_layers, n_kv_heads, head_dim, head_dim]."""


@torch.no_grad()
def collect_head_statistics(context: SliceContext, heads: Heads) -> HeadStatistics:
    """Run the calibration windows through the dense model once.

    Raises
    ------
    ModelError
        If the attention of a layer is not finite.
    """
    architecture, sweep = context.architecture, LayerSweep.begin(context)
    scores, values = [], []
    for index, (name, attention) in enumerate(
        zip(architecture.layer_names, heads.attentions, strict=True)
    ):
        sums = _HeadSums(architecture.model.get_submodule(attention.module), attention, heads)
        with (
            sweep.stream.layer(index) as layer,
            watch_outputs(layer, name, [attention.q, attention.k], sums.keep_projection),
            watch_inputs(layer, name, [attention.o], sums.add_attended),
        ):
            sweep.advance(index, layer)
        if not bool(torch.isfinite(sums.scores).all() & torch.isfinite(sums.values).all()):
            raise ModelError(
                f"model: the attention of {name} is not finite on the calibration text; the "
                "weights before it are damaged or overflow: check the source model"
            )
        scores.append(sums.scores)
        values.append(sums.values / sweep.tokens.numel())
        context.on_step("head statistics", index + 1, len(heads.attentions))
    return HeadStatistics(torch.cat(scores), torch.stack(values))


class _HeadSums:
    """Sums over the tokens that pass through one attention module."""

    def __init__(self, module: Any, attention: Attention, heads: Heads) -> None:
        self._scaling, self._attention, self._heads = module.scaling, attention, heads
        self._projections: dict[str, Tensor] = {}
        self.scores: Tensor = torch.zeros(())
        self.values: Tensor = torch.zeros(())

    def keep_projection(self, name: str, _: Tensor, y: Tensor) -> None:
        """Keep queries or keys [n, length, n_heads * head_dim] until the attention has run."""
        self._projections[name] = y.unflatten(-1, (-1, self._heads.head_dim))

    def add_attended(self, _: str, x: Tensor) -> None:
        """Add the attention outputs [n, length, n_heads * head_dim] and the score moments."""
        heads = self._heads
        q, k = (self._projections.pop(name) for name in (self._attention.q, self._attention.k))
        length = q.shape[1]
        step = max(1, length // QUERIES)
        at = torch.arange(step - 1, length, step, device=q.device)
        table = heads.frequencies.to(q.device)
        # The factor of the table is part of queries and keys.
        moments = score_moments(q, k, at, table, scaling=self._scaling * heads.scale**2)
        self.scores = self.scores.to(moments) + moments
        groups = x.float().unflatten(-1, (heads.n_kv_heads, -1, heads.head_dim))
        groups = groups.movedim(-3, 0).reshape(heads.n_kv_heads, -1, heads.head_dim)
        attended = (groups.transpose(1, 2) @ groups).double()  # [n_kv_heads, head_dim, head_dim]
        self.values = self.values.to(attended) + attended


def score_moments(
    q: Tensor, k: Tensor, at: Tensor, frequencies: Tensor, *, scaling: float
) -> Tensor:
    """Return the covariance of the contributions of rotary pairs to the scores, by query head.

    Each pair contributes two parts: its own ``q k``, and ``q k`` with the query rotated by a right
    angle. Scaling and rotating the queries of a pair, which commutes with the rotary embedding,
    mixes the two.

    Parameters
    ----------
    q : Tensor, shape [n, length, n_heads, head_dim]
        Outputs of the query projection, before the rotary embedding.
    k : Tensor, shape [n, length, n_kv_heads, head_dim]
    at : Tensor, shape [n_queries]
        Positions of the queries to use.
    frequencies : Tensor, shape [head_dim / 2]
    scaling : float
        Factor of the scores.

    Returns
    -------
    Tensor, shape [n_heads, head_dim, head_dim]
        Sum over the queries of the covariance of the parts under the query's attention weights:
        first the plain part of every pair, then the rotated ones. Float64.

    Notes
    -----
    Softmax is invariant to a constant in all scores, and a change D of a query's scores changes its
    attention p, to second order, by a divergence of ``Var_p(D) / 2``. The norms of queries and keys
    that the CR rule of MoDeGPT multiplies include the constant. SmolLM2-135M with 24 of 32 pairs
    has perplexity 246 with pairs chosen by those norms, 67 with this choice, and 32 once queries
    are scaled and rotated. Sliding windows are ignored: all keys before a query count.
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
