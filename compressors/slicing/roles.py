"""What every stored parameter of a dense model is to its residual stream."""

import torch
from torch import Tensor

from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.families import Family

ROWS = 8192  # of a matrix that are in float64 at one time: an embedding is large


class Roles:
    """The parameters of a model by what they do with the stream; each by its full name."""

    def __init__(self, architecture: Architecture, family: Family) -> None:
        model = architecture.model
        self.dense: dict[str, Tensor] = model.state_dict(keep_vars=True)
        """Every parameter, tied ones under both names: slicing unties them."""
        self.untied = f"{family.head}.weight" in architecture.tied
        self.source = {name: architecture.tied.get(name, name) for name in self.dense}
        self.width: int = model.config.hidden_size
        norms = family.norms(model)
        self.norms = {f"{norm.name}.weight" for norm in norms}
        self.behind = {f"{name}.weight": norm for norm in norms for name in norm.readers}
        """Weight of a reader -> its norm."""
        self.embeddings = {f"{name}.weight" for name in family.embeddings}
        blocks = family.stream(model)
        self.writers = {
            f"{name}.{leaf}"
            for block in blocks
            for name in block.writers
            for leaf in ("weight", "bias")
        }

    def bytes(self, width: int) -> int:
        """Return what the tensors of a model of this width take: each is linear in it."""
        touched = {*self.norms, *self.behind, *self.embeddings, *self.writers}
        total = 0
        for name, tensor in self.dense.items():
            n = tensor.numel() // self.width * width if name in touched else tensor.numel()
            total += n * tensor.dtype.itemsize
        return total


def times(W: Tensor, Q: Tensor) -> Tensor:
    """Return ``W @ Q`` at the precision of `W`, calculated in float64, some rows at a time."""
    return torch.cat([(rows.double() @ Q).to(W.dtype) for rows in W.split(ROWS)])
