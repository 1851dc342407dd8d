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
from lrc.compressors.layers.residual_basis import BIASES, NORMS
from lrc.compressors.layers.model_shapes import SHAPES, rebuild_, tables_of
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.bases import ROTATIONS, find_bases, read_basis, read_shortcut
from lrc.compressors.slicing.families import Family, find_family
from lrc.compressors.slicing.layout import skeleton
from lrc.compressors.slicing.roles import Roles, times
from lrc.compressors.slicing.slice_method import Sliced, Work


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
    kept = find_bases(work, family, k)
    final = rotated_config(work.architecture, work.architecture.model.config, planned)
    facts = {
        "width": k,
        "dense_width": work.architecture.model.config.hidden_size,
        "stream_energy_kept": kept,
        "head_untied": f"{family.head}.weight" in work.architecture.tied,
    }
    return Sliced(final, _tensors(work, family, final), facts)


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

    stored = small.state_dict(keep_vars=True)
    last = next(reversed(stored))
    for name, like in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "shortcut":
            made = read_shortcut(work, number[module])
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
                scaled = read_basis(work, number[norm])
                if f"{norm}.weight" in roles.dense:
                    scale = read(f"{norm}.weight").double() + family.weight_offset
                    scaled = scale[:, None] * scaled
                made = times(made, scaled)  # [d_out, k]
        elif name in roles.embeddings:
            made = times(read(name), _centred(read_basis(work, 0), family))  # [n, k]
        elif module in written:
            Q = _centred(read_basis(work, written[module]), family)
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
