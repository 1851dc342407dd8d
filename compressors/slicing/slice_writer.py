"""Take channels out of one layer after another, each as those before it, already sliced, feed it.

A channel that is gone is one that reads zero: the dense model with zeros computes what the smaller
one will. So the calibration text passes through it, beside the dense model, up to where the next
linear is refitted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.calibrate.sequential_calibration import SequentialCalibration
from lrc.compressors.slicing.heads import (
    pair_dimensions,
    project,
    spread,
    take,
    turn_queries,
    value_output,
)
from lrc.compressors.slicing.layout import Attention, Heads, Mlp
from lrc.compressors.slicing.mlp import narrow
from lrc.compressors.slicing.slice_method import Work
from lrc.compressors.solvers.error_compensation import refit_target

# Of a refit's target: the share of the dense model's own inputs, and of what the layers before have
# lost. SmolLM2-135M with 1016 of 1536 channels, on 8,192 tokens: perplexity 43.7; 43.6 without
# either, 43.4 on the dense model's inputs. All of both halves the error on the text itself, and
# gives 48.1. On 16,384 tokens 39.4, and 40.1 on the dense model's inputs.
MIX = 0.5
RESIDUAL = 0.5

Two = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear."""


@dataclass(frozen=True)
class NarrowHeads:
    """What is known of narrower heads before the first layer is sliced."""

    heads: Heads
    pairs: Tensor
    """Kept rotary pairs, ascending; a head keeps as many dimensions of its value."""
    turns: Tensor
    """Of the queries, [n_layers, n_heads, n_pairs], complex."""
    values: Tensor
    """`Survey.values`."""
    gain: float
    """By what queries grow where the smaller model scales scores in another way."""


class Carver:
    """Makes the tensors of the smaller model.

    Parameters
    ----------
    work : Work
    tokens : Tensor, shape [n_windows, length]
    mlps : list of Mlp
        One a layer.
    widths : list of int
        Of the smaller model's MLPs, one a layer.
    narrow_heads : NarrowHeads or None
        None leaves attention as it is.
    damp : float
    facts : list
        Gets the facts of each layer when it is sliced.
    """

    def __init__(
        self,
        work: Work,
        tokens: Tensor,
        mlps: list[Mlp],
        widths: list[int],
        narrow_heads: NarrowHeads | None,
        *,
        damp: float,
        facts: list[dict[str, Any]],
    ) -> None:
        self._work, self._tokens, self._damp, self._facts = work, tokens, damp, facts
        self._mlps, self._widths, self._narrow_heads = mlps, widths, narrow_heads
        self._parameters = work.architecture.stored_parameters()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every stored parameter, slicing a layer when its first one is due."""
        work, names = self._work, self._work.architecture.layer_names
        self._prefix = SequentialCalibration(
            work.architecture,
            work.reader,
            self._tokens,
            work.journal,
            device=work.device,
            memory_limit_gib=work.memory_limit_gib,
        )
        sliced: dict[str, Tensor] = {}
        done = 0
        for name in self._parameters:
            if done < len(names) and name.startswith(f"{names[done]}."):
                sliced = self._layer(done)
                done += 1
                work.on_step("slice", done, len(names))
            yield name, sliced.pop(name) if name in sliced else work.reader.read(name)

    @torch.no_grad()
    def _layer(self, index: int) -> dict[str, Tensor]:
        facts: dict[str, Any] = {"layer": index}
        result: dict[str, Tensor] = {}
        if self._narrow_heads is not None:
            attention = self._narrow_heads.heads.attentions[index]
            self._queries_and_keys(index, attention, self._narrow_heads, result)
            self._values_and_output(index, attention, self._narrow_heads, result, facts)
        self._mlp(index, self._mlps[index], result, facts)
        self._prefix.advance(index)
        self._facts.append(facts)
        return {name: tensor.to("cpu") for name, tensor in result.items()}

    def _mlp(self, layer: int, mlp: Mlp, result: dict[str, Tensor], facts: dict[str, Any]) -> None:
        W, _ = self._read(mlp.output)
        target, H = self._refitted(layer, mlp.output, W, W, facts)
        narrowed = narrow(target, H, self._widths[layer], damp=self._damp)
        facts["lost_mlp"] = narrowed.lost
        if narrowed.fallback:
            facts["fallback_mlp"] = narrowed.fallback
        small = narrowed.W.to(W.dtype)
        wide = torch.zeros_like(W)
        wide[:, narrowed.kept] = small
        self._prefix.replace(mlp.output, wide)
        result[f"{mlp.output}.weight"] = small
        for name in mlp.inputs:
            _put(result, name, [t if t is None else t[narrowed.kept] for t in self._read(name)])

    def _queries_and_keys(
        self, layer: int, attention: Attention, known: NarrowHeads, result: dict[str, Tensor]
    ) -> None:
        h, pairs, turns = known.heads.head_dim, known.pairs, known.turns[layer]
        dimensions = pair_dimensions(pairs, h)
        q_parts = self._read(attention.q)
        turned = [t if t is None else turn_queries(t, pairs, turns, h) for t in q_parts]
        rounded = [t if t is None else (known.gain * t).to(q_parts[0].dtype) for t in turned]
        _put(result, attention.q, rounded)
        _put(
            result,
            attention.k,
            [t if t is None else take(t, dimensions, h) for t in self._read(attention.k)],
        )
        # Pairs that are gone have queries of zero.
        weight, bias = (
            t if t is None else spread(t.double() / known.gain, dimensions, h) for t in rounded
        )
        assert weight is not None
        self._prefix.replace(attention.q, weight, bias)

    def _values_and_output(
        self,
        layer: int,
        attention: Attention,
        known: NarrowHeads,
        result: dict[str, Tensor],
        facts: dict[str, Any],
    ) -> None:
        heads, rank = known.heads, 2 * len(known.pairs)
        h, group = heads.head_dim, heads.n_heads // heads.n_kv_heads
        W_o, _ = self._read(attention.o)
        first = torch.arange(rank, device=W_o.device)
        readers = W_o.unflatten(1, (heads.n_kv_heads, group, h))  # [d, n_kv_heads, group, h]
        projections, outputs, lost = [], [], 0.0
        for index in range(heads.n_kv_heads):
            stacked = readers[:, index].transpose(0, 1).flatten(0, 1)  # [group * d, h]
            P, V, share, fallback = value_output(
                stacked, known.values[layer, index], rank, damp=self._damp
            )
            projections.append(P)
            outputs += [block.T for block in V.chunk(group)]  # [rank, d]
            lost += share / heads.n_kv_heads
            if fallback:
                facts["fallback_values"] = fallback
        facts["lost_values"] = lost
        P_all = torch.stack(projections)  # [n_kv_heads, rank, h]
        small = [t if t is None else project(t, P_all).to(t) for t in self._read(attention.v)]
        _put(result, attention.v, small)
        weight, bias = (t if t is None else spread(t, first, h) for t in small)
        assert weight is not None
        self._prefix.replace(attention.v, weight, bias)

        V_all = spread(torch.cat(outputs), first, h).T  # [d, n_heads * h]
        target, _ = self._refitted(layer, attention.o, W_o, V_all, facts)
        kept = take(target.T, first, h).to(W_o.dtype)  # [n_heads * rank, d]
        result[f"{attention.o}.weight"] = kept.T.contiguous()
        self._prefix.replace(attention.o, spread(kept, first, h).T)

    def _refitted(
        self, layer: int, linear: str, W: Tensor, V: Tensor, facts: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Refit V so that it gives here what W does in the dense model, plus what is lacking.

        Returns
        -------
        target : Tensor, shape [d_out, d_in]
            In float64.
        H : Tensor, shape [d_in, d_in]
            Second moment of the inputs here, per token.
        """
        found, n_tokens = self._prefix.measure(layer, [linear], deficit=True), self._tokens.numel()
        H, cross = found.H.double() / n_tokens, found.cross.double() / n_tokens
        # The target is (1 - MIX) V x' + MIX W x + RESIDUAL (R - R'): W has never seen x', whose
        # channels V has made, where the two differ.
        lacking = MIX * (W.double() - V.double()) @ cross
        if linear in found.deficit:
            lacking += RESIDUAL * found.deficit[linear].double() / n_tokens
        target, fallback = refit_target(
            V, H, cross, mix=MIX, damp=self._damp, deficit=lacking, residual=1.0
        )
        if fallback:
            facts[f"fallback_{linear.rpartition('.')[2]}"] = fallback
        return target, H

    def _read(self, linear: str) -> Two:
        reader, bias, device = self._work.reader, f"{linear}.bias", self._work.device
        weight = reader.read(f"{linear}.weight", device=device)
        return weight, reader.read(bias, device=device) if bias in self._parameters else None


def _put(result: dict[str, Tensor], linear: str, parts: Sequence[Tensor | None]) -> None:
    for leaf, tensor in zip(("weight", "bias"), parts, strict=True):
        if tensor is not None:
            result[f"{linear}.{leaf}"] = tensor.contiguous()
