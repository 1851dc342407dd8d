"""Norms without weights: what they scale and shift goes into the linears behind them.

Only then does the residual stream commute with a rotation: ``rms(x Q) == rms(x) Q`` for orthogonal
``Q``, which neither a scale a channel nor the subtraction of a mean allows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers.residual_basis import UnitNorm, norm_eps
from lrc.compressors.slicing.families import Family, Norm


@torch.no_grad()
def fuse_norms_(model: Any, family: Family) -> None:
    """Give a model norms without weights; it computes what it did.

    Section 3 of [1]_: ``LayerNorm(x) == rms(x M) diag(w) + b`` with the centring
    ``M = I - 11^T / D``. ``M`` goes into everything that writes to the stream (of LayerNorm models
    alone: an RMSNorm sees the mean), ``w`` and ``b`` into what reads it. The head gets a weight of
    its own, and a bias where the final norm had one. Calculated in float64.

    References
    ----------
    .. [1] S. Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and
       Columns", ICLR 2024. https://arxiv.org/abs/2401.15024
    """
    untie_(model)
    if family.layer_norm:
        for name in family.embeddings:
            set_weight_(model.get_submodule(name), "weight", _centred)
        for block in family.stream(model):
            for name in block.writers:
                writer = model.get_submodule(name)
                set_weight_(writer, "weight", lambda W: W - W.mean(0, keepdim=True))
                set_weight_(writer, "bias", _centred)
    for norm in family.norms(model):
        _fold_(model, norm, family.weight_offset)


def untie_(model: Any) -> None:
    """Let embedding and head be saved each: whatever changes one makes it a tensor of its own."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def set_weight_(module: nn.Module, name: str, change: Any) -> None:
    """Replace a parameter, if there is one, by what `change` makes of it in float64."""
    old = getattr(module, name)
    if old is not None:
        new = change(old.detach().double()).to(old.dtype).contiguous()
        setattr(module, name, nn.Parameter(new, requires_grad=False))


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)


def _fold_(model: Any, norm: Norm, offset: float) -> None:
    old = model.get_submodule(norm.name)
    weight, bias = getattr(old, "weight", None), getattr(old, "bias", None)
    readers = [model.get_submodule(name) for name in norm.readers]
    for reader in readers:
        if bias is not None:  # with the weight as it was, before the scale goes in
            shift = reader.weight.double() @ bias.double()  # [d_out]
            shift = shift if reader.bias is None else shift + reader.bias.double()
            reader.bias = nn.Parameter(shift.to(reader.weight.dtype), requires_grad=False)
        if weight is not None:
            scale = weight.detach().double() + offset  # [D]
            set_weight_(reader, "weight", lambda W, scale=scale: W * scale)
    width, eps = readers[0].in_features, norm_eps(old)
    assert eps is not None, f"{type(old).__name__} has no eps that is known"
    model.set_submodule(norm.name, UnitNorm(width, eps))
