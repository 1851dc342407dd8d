"""The weights of a model in another basis of its residual stream, written one tensor at a time.

With norms fused into the linears that read them, a model computes the same in every orthogonal
basis: ``rms(x Q) == rms(x) Q``. Slicing keeps the first k columns of a basis.

With one basis per block, the residual branch of a block is multiplied by ``S = Q_l^T Q_{l+1}``. As
`align_basis` makes S symmetric, at most ``D - k`` of its eigenvalues differ from one, and
``S = I - F F^T`` is stored as F [k, D - k] instead of the paper's k x k matrix, whose size cancels
most of the savings.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.layers.model_shapes import SHAPES, rebuild_
from lrc.compressors.layers.residual_basis import BIASES, NORMS
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.families import Family
from lrc.compressors.slicing.layout import skeleton
from lrc.compressors.slicing.stream_bases import StreamBases

ROWS = 8192  # of a matrix that are converted to float64 at a time: embeddings are large


class StreamParameters:
    """The parameters of a dense model by their role for the residual stream, by full names."""

    def __init__(self, architecture: Architecture, family: Family) -> None:
        model = self.model = architecture.model
        self.family, self.width = family, int(model.config.hidden_size)
        self.dense: dict[str, Tensor] = model.state_dict(keep_vars=True)
        """Every parameter. Tied ones appear under both names, because slicing unties them."""
        self.source = {name: architecture.tied.get(name, name) for name in self.dense}
        """Name of the stored tensor of each parameter."""
        self.unties_head = f"{family.head}.weight" in architecture.tied
        blocks = self.blocks = family.stream(model)
        self.norm_of = {name: n.name for n in family.norms(model) for name in n.readers}
        """Norm of each linear that reads the stream."""
        self.basis_of_norm = {norm.name: n for n, b in enumerate(blocks) for norm in b.norms}
        self.basis_of_norm[family.final_norm] = len(blocks)
        self.basis_of_writer = {name: n + 1 for n, b in enumerate(blocks) for name in b.writers}
        """Index of the basis of what each norm reads, and of what each writer writes."""
        readers = [*self.norm_of, *self.basis_of_norm, *family.embeddings]
        self._scaled = {f"{name}.weight" for name in [*readers, *self.basis_of_writer]}
        self._scaled |= {f"{name}.bias" for name in self.basis_of_writer}

    def needs_bias(self, reader: str) -> bool:
        """Return whether fusing its norm gives a linear a bias that it does not have."""
        return f"{self.norm_of[reader]}.bias" in self.dense and f"{reader}.bias" not in self.dense

    def shortcut_rank(self, k: int) -> int:
        """Return the rank of the shortcut of a block at width `k`; 0 at full width."""
        return min(k, self.width - k)

    def bytes(self, k: int, *, per_block: bool) -> int:
        """Return the size of the tensors at width `k`, with one basis or with one per block."""
        total = 0
        for name, tensor in self.dense.items():
            n = tensor.numel() // self.width * k if name in self._scaled else tensor.numel()
            if per_block and name.rpartition(".")[0] in self.basis_of_norm:
                n = 0
            total += n * tensor.itemsize
        if not per_block:
            return total
        added = len(self.blocks) * k * self.shortcut_rank(k)
        for reader in filter(self.needs_bias, self.norm_of):
            added += self.model.get_submodule(reader).out_features
        return total + added * self.dense[f"{self.family.embeddings[0]}.weight"].itemsize

    def tables(self, k: int) -> dict[str, Any]:
        """Return the tables of a checkpoint of width `k` with a basis per block."""
        of = self.model.get_submodule
        shapes = {name: [of(name).num_embeddings, k] for name in self.family.embeddings}
        shapes |= {name: [of(name).out_features, k] for name in self.norm_of}
        shapes |= {name: [k, of(name).in_features] for name in self.basis_of_writer}
        norms: dict[str, dict[str, Any]] = {name: {} for name in self.basis_of_norm}
        rank = self.shortcut_rank(k)
        for each in self.blocks if rank else []:
            # The outputs of the writers of a parallel block are added: one carries the shortcut.
            norms[each.norms[0].name] = {"writer": each.writers[0], "rank": rank}
        tables = {SHAPES: shapes, BIASES: [*filter(self.needs_bias, self.norm_of)], NORMS: norms}
        return {key: table for key, table in tables.items() if table}


@torch.no_grad()
def rotated_tensors(
    context: CalibrationContext,
    family: Family,
    config: PreTrainedConfig,
    bases: StreamBases,
    *,
    stream_scale: float,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the sliced model of a config, in the order of its parameters.

    The stream is multiplied by `stream_scale`, and the linears that read it divide by the factor.
    """
    roles = StreamParameters(context.architecture, family)
    small = skeleton(context.architecture, config)
    rebuild_(small)
    new_dtype = roles.dense[f"{family.embeddings[0]}.weight"].dtype

    def read(name: str) -> Tensor:
        return context.reader.read(roles.source[name], device=context.device)

    def fused(name: str) -> Tensor:
        reader, _, leaf = name.rpartition(".")
        norm = roles.norm_of[reader]
        if leaf == "bias":
            shift = read(f"{reader}.weight").double() @ read(f"{norm}.bias").double()  # [d_out]
            return read(name).double() + shift if name in roles.dense else shift
        Q = bases.basis(roles.basis_of_norm[norm])
        if f"{norm}.weight" in roles.dense:
            Q = (read(f"{norm}.weight").double() + family.weight_offset)[:, None] * Q
        return _matmul(read(name), Q / stream_scale)  # [d_out, k]

    def written(index: int) -> Tensor:
        """Return a basis for the writers; it subtracts the mean where the norms would."""
        Q = bases.basis(index)
        return (Q - Q.mean(0, keepdim=True) if family.layer_norm else Q) * stream_scale

    stored = small.state_dict(keep_vars=True)
    last = next(reversed(stored))
    for name, like in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "shortcut":
            assert bases.shortcut is not None
            made = bases.shortcut(roles.basis_of_norm[module])
        elif module in roles.basis_of_norm:  # its weight is fused into the linears that read it
            made = torch.ones(like.shape)
        elif module in roles.norm_of and (
            leaf == "weight" or f"{roles.norm_of[module]}.bias" in roles.dense
        ):
            made = fused(name)
        elif module in family.embeddings:
            made = _matmul(read(name), written(0))  # [n, k]
        elif module in roles.basis_of_writer:
            W = read(name)
            columns = W[:, None] if W.ndim == 1 else W  # [D, d_in]; a bias is one column
            made = _matmul(columns.T, written(roles.basis_of_writer[module])).T  # [k, d_in]
            made = made.reshape(-1, *W.shape[1:])
        else:
            made = read(name)
        if name == last:
            bases.release()
        dtype = roles.dense[name].dtype if name in roles.dense else new_dtype
        yield name, made.to(dtype).cpu().contiguous()


def _matmul(W: Tensor, Q: Tensor) -> Tensor:
    """Return ``W @ Q`` at the precision of `W`, computed in float64 by blocks of rows."""
    return torch.cat([(rows.double() @ Q).to(W.dtype) for rows in W.split(ROWS)])
