"""SliceGPT with a basis of its own for every block, in a checkpoint that lrc loads.

Each basis is turned, within what it spans, towards the one before it, which changes nothing that
the model computes. The shortcut ``S = Q_l^T Q_{l+1}`` of a residual branch is then symmetric, with
the cosines of the angles between the two spans for eigenvalues, and at most ``D - k`` of those are
below one: ``S = I - F F^T`` with F [k, D - k]. That is stored in place of the k x k matrix of the
paper, whose size undoes most of what slicing takes away.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lrc.compressors.checkpoint.format import block
from lrc.compressors.layers.shapes import SHAPES, rebuild_, tables_of
from lrc.compressors.layers.stream import BIASES, NORMS
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.families import Family, find_family
from lrc.compressors.slicing.layout import skeleton
from lrc.compressors.slicing.method import Sliced, Work
from lrc.compressors.slicing.moments import stream_moments
from lrc.compressors.slicing.roles import Roles, times
from lrc.compressors.slicing.rotation import principal_axes

ROTATIONS = "rotations"


def tables(architecture: Architecture, family: Family, k: int) -> dict[str, Any]:
    """Return the tables of a checkpoint whose stream is `k` wide everywhere."""
    model, D = architecture.model, int(architecture.model.config.hidden_size)
    blocks = family.stream(model)
    shapes: dict[str, list[int]] = {}
    norms: dict[str, dict[str, Any]] = {}
    biases = []
    for name in family.embeddings:
        shapes[name] = [model.get_submodule(name).num_embeddings, k]
    for norm in family.norms(model):
        norms[norm.name] = {}
        shifts = getattr(model.get_submodule(norm.name), "bias", None) is not None
        for name in norm.readers:
            reader = model.get_submodule(name)
            shapes[name] = [reader.out_features, k]
            if shifts and reader.bias is None:
                biases.append(name)
    for each in blocks:
        for name in each.writers:
            shapes[name] = [k, model.get_submodule(name).in_features]
        if k < D:  # writers of a parallel block are added up: one of them carries the shortcut
            shortcut = {"writer": each.writers[0], "rank": min(k, D - k)}
            norms[each.norms[0].name] = shortcut
    found = {SHAPES: shapes, BIASES: biases, NORMS: norms}
    return {key: table for key, table in found.items() if table}


def bytes_of(architecture: Architecture, family: Family, tables: Mapping[str, Any]) -> int:
    """Return what the tensors of a model with these tables take."""
    roles = Roles(architecture, family)
    shapes, norms = tables[SHAPES], tables[NORMS]
    k = int(shapes[family.embeddings[0]][1])
    total = 0
    for name, tensor in roles.dense.items():
        module, _, leaf = name.rpartition(".")
        n = tensor.numel()
        if module in norms:
            n = 0
        elif module in shapes:
            n = shapes[module][0] * (shapes[module][1] if leaf == "weight" else 1)
        total += n * tensor.itemsize
    item = roles.dense[f"{family.embeddings[0]}.weight"].itemsize
    new = sum(k * int(entry["rank"]) for entry in norms.values() if entry)
    new += sum(int(shapes[name][0]) for name in tables.get(BIASES, []))
    return total + item * new


def rotated_config(
    architecture: Architecture, config: PreTrainedConfig, found: Mapping[str, Any]
) -> PreTrainedConfig:
    """Return a config with these tables; the head gets a weight of its own."""
    smaller: PreTrainedConfig = deepcopy(config)
    smaller.tie_word_embeddings = False
    smaller.quantization_config = block({}, found)
    return smaller


def turned(before: Tensor, after: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Turn a basis within its span towards the one before it.

    Parameters
    ----------
    before, after : Tensor, shape [D, k], float64
        Orthonormal columns.
    rank : int
        At least ``min(k, D - k)``.

    Returns
    -------
    after : Tensor, shape [D, k]
    F : Tensor, shape [k, rank]
        ``before^T after == I - F F^T``.

    Notes
    -----
    With ``before^T after = U c V^T`` the polar factor ``V U^T`` makes it ``U c U^T`` (the solution
    of Procrustes' problem). The spans share ``2 k - D`` dimensions at least, where c is one.
    """
    U, c, Vh = torch.linalg.svd(before.T @ after)
    least = c.argsort()[:rank]
    F = U[:, least] * (1 - c[least]).clamp_min(0).sqrt()
    return after @ (Vh.T @ U.T), F


@torch.no_grad()
def carve_blocks(work: Work, config: PreTrainedConfig) -> Sliced:
    """Slice the model of `work` to a planned config with tables.

    Raises
    ------
    ModelError
        If the residual stream is not finite.
    """
    family = find_family(work.architecture.model)
    planned = tables_of(config)
    k = planned[SHAPES][family.embeddings[0]][1]
    kept = _find_bases(work, family, k)
    final = rotated_config(work.architecture, work.architecture.model.config, planned)
    facts = {
        "width": k,
        "dense_width": work.architecture.model.config.hidden_size,
        "stream_energy_kept": kept,
        "head_untied": f"{family.head}.weight" in work.architecture.tied,
    }
    return Sliced(final, _tensors(work, family, final), facts)


def _find_bases(work: Work, family: Family, k: int) -> list[float]:
    """Write a basis [D, k] and a shortcut a block to the journal; return the energies they keep."""
    readers = [block.norms[0].name for block in family.stream(work.architecture.model)]
    order = {name: number for number, name in enumerate([*readers, family.final_norm])}
    before: Tensor | None = None
    kept = []
    for norm, moment in stream_moments(work, family):
        if norm not in order:  # the second of a parallel block reads what the first does
            continue
        Q, _ = principal_axes(moment.to(work.device))
        Q = Q[:, :k]
        found: dict[str, Tensor] = {}
        if before is not None:
            Q, found["F"] = turned(before, Q, min(k, len(Q) - k))
        share = (Q * (moment.to(Q) @ Q)).sum() / moment.diagonal().sum()
        kept.append(float(share))
        work.journal.write_tensors(_basis_file(order[norm]), {"Q": Q.cpu(), **_on_cpu(found)})
        before = Q
    return kept


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _basis_file(number: int) -> str:
    return f"{ROTATIONS}/{number:04d}.safetensors"


def _tensors(work: Work, family: Family, config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the sliced model in the order of its parameters."""
    model, roles = work.architecture.model, Roles(work.architecture, family)
    small = skeleton(work.architecture, config)
    rebuild_(small)
    blocks = family.stream(model)
    number = {norm.name: n for n, each in enumerate(blocks) for norm in each.norms}
    number[family.final_norm] = len(blocks)
    written = {name: n + 1 for n, each in enumerate(blocks) for name in each.writers}

    like_new = roles.dense[f"{family.embeddings[0]}.weight"]

    def read(name: str) -> Tensor:
        return work.reader.read(roles.source[name], device=work.device)

    def basis(of: int, key: str = "Q") -> Tensor:
        return work.journal.read_tensor(_basis_file(of), key).to(work.device)

    stored = small.state_dict(keep_vars=True)
    last = next(reversed(stored))
    for name, like in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "shortcut":
            made = basis(number[module] + 1, "F")
        elif f"{module}.weight" in roles.behind:
            norm = roles.behind[f"{module}.weight"].name
            made = read(name) if name in roles.dense else like.new_zeros(like.shape, device="cpu")
            made = made.to(work.device)
            if leaf == "bias" and f"{norm}.bias" in roles.dense:
                made = (
                    made.double()
                    + read(f"{module}.weight").double() @ read(f"{norm}.bias").double()
                )
            elif leaf == "weight":
                scaled = basis(number[norm])
                if f"{norm}.weight" in roles.dense:
                    scale = read(f"{norm}.weight").double() + family.weight_offset
                    scaled = scale[:, None] * scaled
                made = times(made, scaled)  # [d_out, k]
        elif name in roles.embeddings:
            made = times(read(name), _centred(basis(0), family))  # [n, k]
        elif module in written:
            Q = _centred(basis(written[module]), family)
            W = read(name)
            columns = W[:, None] if W.ndim == 1 else W  # [D, d_in], a bias as the one column it is
            made = times(columns.T, Q).T.reshape(-1, *W.shape[1:])  # [k, d_in]
        else:
            made = read(name)
        if name == last:
            work.journal.forget(ROTATIONS)
        yield name, made.to(roles.dense.get(name, like_new).dtype).cpu().contiguous()


def _centred(Q: Tensor, family: Family) -> Tensor:
    """Return what takes the mean off before it turns, where the norms would have."""
    return Q - Q.mean(0, keepdim=True) if family.layer_norm else Q
