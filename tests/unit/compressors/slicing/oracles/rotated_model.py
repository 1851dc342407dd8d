"""Fuse the norms of a whole model in memory and rotate its residual stream.

An independent implementation of section 3 of SliceGPT [1]_, to compare with the tensors that
`slicegpt` writes one at a time. A model whose norms have no weights (`fuse_norms_`) computes the
same in every orthogonal basis: ``rms(x Q) == rms(x) Q``.

References
----------
.. [1] S. Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
   ICLR 2024. https://arxiv.org/abs/2401.15024
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers.residual_basis import UnitNorm, norm_eps
from lrc.compressors.slicing.families import Family, Norm


@torch.no_grad()
def fuse_norms_(model: Any, family: Family) -> None:
    """Replace all norms by norms without weights; the model computes the same.

    ``LayerNorm(x) == rms(x M) diag(w) + b`` with the centring ``M = I - 11^T / D``. ``M`` is
    multiplied into the modules that write to the stream (for LayerNorm models only), ``w`` and
    ``b`` into the linears that read it. The head is untied, and gets a bias if the final norm had
    one. Computed in float64.
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
    """Save embedding and head as separate tensors."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def set_weight_(module: nn.Module, name: str, change: Any) -> None:
    """Replace a parameter, if there is one, by the result of `change` in float64."""
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
        if bias is not None:  # before the weight is scaled
            shift = reader.weight.double() @ bias.double()  # [d_out]
            shift = shift if reader.bias is None else shift + reader.bias.double()
            reader.bias = nn.Parameter(shift.to(reader.weight.dtype), requires_grad=False)
        if weight is not None:
            scale = weight.detach().double() + offset  # [D]
            set_weight_(reader, "weight", lambda W, scale=scale: W * scale)
    width, eps = readers[0].in_features, norm_eps(old)
    assert eps is not None, f"{type(old).__name__} has no known eps"
    model.set_submodule(norm.name, UnitNorm(width, eps))


class Shortcut(nn.Module):
    """Transform the input of a block to the basis of its output.

    The residual branch of a block computes ``x @ S``, but the layer adds ``x``. The difference
    ``x @ (S - I)`` is computed where the norm reads ``x`` and added to the output of a writer, so
    the layer's forward does not change. All layers need the same width.
    """

    def __init__(self, S: Tensor) -> None:
        super().__init__()
        change = S - torch.eye(len(S), dtype=S.dtype, device=S.device)
        self.change = nn.Parameter(change, requires_grad=False)
        self._x: Tensor | None = None

    def see(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the input of a block's norm: a forward pre-hook."""
        self._x = args[0]

    def add(self, _: nn.Module, __: Any, y: Tensor) -> Tensor:
        """Add the difference on the residual branch to the output of a writer: a forward hook."""
        x, self._x = self._x, None
        assert x is not None, "a writer was called before the norm of its block"
        return y + x @ self.change


@torch.no_grad()
def rotate_(model: Any, family: Family, Q: Tensor) -> None:
    """Transform the whole residual stream to one basis, in place (theorem 1 of the paper).

    With fewer columns than rows the stream becomes narrower.

    Parameters
    ----------
    model : PreTrainedModel
        After `fuse_norms_`.
    Q : Tensor, shape [D, k]
        Orthonormal columns.
    """
    _refuse_weights(model, family)
    blocks = family.stream(model)
    _rotate_embeddings_(model, family, Q)
    for norm in family.norms(model):
        _rotate_readers_(model, norm.readers, Q)
    for block in blocks:
        _rotate_writers_(model, block.writers, Q)


@torch.no_grad()
def rotate_blocks_(model: Any, family: Family, rotations: Sequence[Tensor]) -> None:
    """Transform the residual stream to a different basis before every block, in place.

    The residual branch of a block is multiplied by the shortcut ``S_l = Q_l^T Q_{l+1}``.

    Parameters
    ----------
    model : PreTrainedModel
        After `fuse_norms_`.
    rotations : sequence of Tensor, shape [D, D]
        Orthogonal; one for every block of ``family.stream(model)``, and one for the head.
    """
    _refuse_weights(model, family)
    blocks = family.stream(model)
    if len(rotations) != len(blocks) + 1:
        raise ValueError(f"needs {len(blocks) + 1} rotations, got {len(rotations)}")
    if len({tuple(Q.shape) for Q in rotations}) != 1:
        raise ValueError("rotations must all be of one shape: the shortcut keeps the width")
    _rotate_embeddings_(model, family, rotations[0])
    for block, before, after in zip(blocks, rotations, rotations[1:], strict=False):
        for norm in block.norms:
            _rotate_readers_(model, norm.readers, before)
        _rotate_writers_(model, block.writers, after)
        # The outputs of the writers of a parallel block are added: one carries the shortcut.
        norm, writer = (model.get_submodule(n) for n in (block.norms[0].name, block.writers[0]))
        shortcut = Shortcut((before.double().T @ after.double()).to(writer.weight.dtype))
        writer.shortcut = shortcut
        norm.register_forward_pre_hook(shortcut.see)
        writer.register_forward_hook(shortcut.add)
    _rotate_readers_(model, (family.head,), rotations[-1])


def _refuse_weights(model: Any, family: Family) -> None:
    weighted = [
        norm.name
        for norm in family.norms(model)
        if not isinstance(model.get_submodule(norm.name), UnitNorm)
    ]
    if weighted:
        raise ValueError(f"{weighted[0]} has weights, which do not commute with a rotation")


def _rotate_embeddings_(model: Any, family: Family, Q: Tensor) -> None:
    for name in family.embeddings:
        module = model.get_submodule(name)
        set_weight_(module, "weight", lambda W: W @ Q.double())  # [n, k]
        module.embedding_dim = Q.shape[1]


def _rotate_readers_(model: Any, names: Sequence[str], Q: Tensor) -> None:
    for name in names:
        module = model.get_submodule(name)
        set_weight_(module, "weight", lambda W: W @ Q.double())  # [d_out, k]
        module.in_features = Q.shape[1]


def _rotate_writers_(model: Any, names: Sequence[str], Q: Tensor) -> None:
    for name in names:
        module = model.get_submodule(name)
        set_weight_(module, "weight", lambda W: Q.double().T @ W)  # [k, d_in]
        set_weight_(module, "bias", lambda b: b @ Q.double())  # [k]
        module.out_features = Q.shape[1]
