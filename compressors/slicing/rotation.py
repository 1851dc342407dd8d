"""Another basis for the residual stream: its principal axes, and how a model is put into them.

A model whose norms have no weights (`fuse_norms_`) computes the same in every basis. In the
principal one the last coordinates carry least, and can be left out. Models are rotated here whole
and in memory, to hold against what `slicegpt` and `blocks` write one tensor at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers.residual_basis import UnitNorm
from lrc.compressors.slicing.families import Family
from lrc.compressors.slicing.fusing import set_weight_
from lrc.compressors.solvers.linalg import descending_eigh


def principal_axes(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the axes of a second moment by what they carry, and how much that is.

    Section 3 of [1]_, whose code adds a multiple of the identity first: that moves no axis.

    Parameters
    ----------
    moment : Tensor, shape [D, D]
        Sum over tokens of ``x x^T``, x being the residual stream as it enters a norm.

    Returns
    -------
    Q : Tensor, shape [D, D]
        Orthogonal, float64; axes are columns, the most important first. The largest entry of each
        is positive, so that the same moment always gives the same axes.
    energies : Tensor, shape [D]
        Descending.

    References
    ----------
    .. [1] S. Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and
       Columns", ICLR 2024. https://arxiv.org/abs/2401.15024
    """
    energies, Q = descending_eigh(moment.double())
    peaks = Q.gather(0, Q.abs().argmax(0, keepdim=True))  # [1, D]
    return Q * peaks.sign(), energies


class Shortcut(nn.Module):
    """Takes the input of a block over into the basis of its output.

    The residual branch of a block computes ``x @ S`` where the layer adds ``x`` itself. So that no
    layer has to be written again, the difference ``x @ (S - I)`` rides along with a writer's
    output: seen where the norm reads ``x``, added where the writer has put out. Layers before and
    after therefore need the same width; widths that change from layer to layer would need a
    forward of their own.
    """

    def __init__(self, S: Tensor) -> None:
        super().__init__()
        change = S - torch.eye(len(S), dtype=S.dtype, device=S.device)
        self.change = nn.Parameter(change, requires_grad=False)
        self._x: Tensor | None = None

    def see(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the input of a block's norm; a forward pre-hook."""
        self._x = args[0]

    def add(self, _: nn.Module, __: Any, y: Tensor) -> Tensor:
        """Add to the output of a writer what the residual branch lacks; a forward hook."""
        x, self._x = self._x, None
        assert x is not None, "a writer was called before the norm of its block"
        return y + x @ self.change


@torch.no_grad()
def rotate_(model: Any, family: Family, Q: Tensor) -> None:
    """Put the whole residual stream into one basis, in place.

    Section 3 of [1]_, theorem 1. With fewer columns than rows the stream becomes narrower, and
    the model another one.

    Parameters
    ----------
    model : PreTrainedModel
        After `fuse_norms_`.
    Q : Tensor, shape [D, k]
        Orthonormal columns.

    References
    ----------
    .. [1] S. Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and
       Columns", ICLR 2024. https://arxiv.org/abs/2401.15024
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
    """Put the residual stream into a basis of its own before every block and at the end, in place.

    Section 3 of [1]_: between the bases of a block's input and its output stands the shortcut
    ``S_l = Q_l^T Q_{l+1}`` on the residual branch, which see.

    Parameters
    ----------
    model : PreTrainedModel
        After `fuse_norms_`.
    rotations : sequence of Tensor, shape [D, D]
        Orthogonal; one for every block of ``family.stream(model)``, and one for the head.

    References
    ----------
    .. [1] S. Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and
       Columns", ICLR 2024. https://arxiv.org/abs/2401.15024
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
        # Writers of a parallel block are added up: one of them carries the shortcut.
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
