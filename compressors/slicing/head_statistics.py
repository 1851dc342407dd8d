"""A first way up through the dense model: what its attention heads compute on the text."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.calibrate.layer_executor import apply, watch_inputs, watch_outputs
from lrc.compressors.slicing.heads import score_moments
from lrc.compressors.slicing.layer_sweep import Ascent
from lrc.compressors.slicing.layout import Attention, Heads
from lrc.compressors.slicing.slice_method import Work
from lrc.configs.errors import ModelError

# Of a window, evenly spread: each looks at all keys before it, so that few say much.
QUERIES = 32


@dataclass(frozen=True)
class Survey:
    """Moments of the heads of a dense model."""

    scores: Tensor
    """`score_moments` of the query heads of all layers, [n_layers * n_heads, head_dim, head_dim].
    """
    values: Tensor
    """Second moment per token of what the heads of a group attend to, summed over the group:
    [n_layers, n_kv_heads, head_dim, head_dim]."""


@torch.no_grad()
def survey(work: Work, heads: Heads, tokens: Tensor) -> Survey:
    """Send the windows [n_windows, length] through the dense model once.

    Raises
    ------
    ModelError
        If what a layer computes is not finite.
    """
    architecture, device = work.architecture, work.device
    up, scores, values = Ascent.begin(work, tokens), [], []
    hidden = up.states
    for index, (name, attention) in enumerate(
        zip(architecture.layer_names, heads.attentions, strict=True)
    ):
        sums = _Sums(architecture.model.get_submodule(attention.module), attention, heads)
        projections = [attention.q, attention.k]
        with (
            up.stream.layer(index) as layer,
            watch_outputs(layer, name, projections, sums.see_projection),
            watch_inputs(layer, name, [attention.o], sums.see_attended),
        ):
            for rows in up.rows():
                hidden[rows] = apply(layer, up.calls[index], hidden[rows].to(device))
        if not bool(torch.isfinite(sums.scores).all() & torch.isfinite(sums.values).all()):
            raise ModelError(
                f"model: the attention of {name} is not finite on the calibration text; the "
                "weights before it are damaged or overflow: check the source model"
            )
        scores.append(sums.scores)
        values.append(sums.values / tokens.numel())
        work.on_step("survey", index + 1, len(heads.attentions))
    return Survey(torch.cat(scores), torch.stack(values))


class _Sums:
    """Sums over the tokens that pass one attention."""

    def __init__(self, module: Any, attention: Attention, heads: Heads) -> None:
        self._scaling, self._attention, self._heads = module.scaling, attention, heads
        self._seen: dict[str, Tensor] = {}
        self.scores: Tensor = torch.zeros(())
        self.values: Tensor = torch.zeros(())

    def see_projection(self, name: str, _: Tensor, y: Tensor) -> None:
        """Keep queries or keys [n, length, n_heads * head_dim] until the attention is through."""
        self._seen[name] = y.unflatten(-1, (-1, self._heads.head_dim))

    def see_attended(self, _: str, x: Tensor) -> None:
        """Add what the heads have read [n, length, n_heads * head_dim], and how."""
        heads = self._heads
        q, k = self._seen.pop(self._attention.q), self._seen.pop(self._attention.k)
        length = q.shape[1]
        step = max(1, length // QUERIES)
        at = torch.arange(step - 1, length, step, device=q.device)
        table = heads.frequencies.to(q.device)
        # Cos and sin of both sides carry the scale of the table.
        moments = score_moments(q, k, at, table, scaling=self._scaling * heads.scale**2)
        self.scores = self.scores.to(moments) + moments
        groups = x.float().unflatten(-1, (heads.n_kv_heads, -1, heads.head_dim))
        groups = groups.movedim(-3, 0).reshape(heads.n_kv_heads, -1, heads.head_dim)
        attended = (groups.transpose(1, 2) @ groups).double()  # [n_kv_heads, head_dim, head_dim]
        self.values = self.values.to(attended) + attended
