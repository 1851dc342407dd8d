"""What a peer is given and what it returns, and the counting of stored bits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A model and the tokens to calibrate it on."""

    model: Any
    """A causal language model of transformers, on the CPU."""
    tokenizer: Any
    windows: Tensor
    """Tokens [samples, length], int64, on the CPU."""
    device: str

    def batches(self, size: int) -> DataLoader[dict[str, Tensor]]:
        """Return the windows as batches ``{"input_ids", "attention_mask"}``."""
        rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in self.windows]
        return DataLoader(rows, batch_size=size)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed model, multiplied out."""

    version: str
    """Of the program: a release or a commit."""
    weights: dict[str, Tensor]
    """Dense values by parameter name."""
    bits: dict[str, int]
    """Stored bits by parameter name, for every matrix of the decoder layers."""


def layer_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of the decoder layers by the names of their weights."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }


def layer_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of linears and norms of the decoder layers, on the CPU."""
    kept = ("_proj.weight", "norm.weight")
    return {
        name: value.detach().cpu()
        for name, value in model.state_dict().items()
        if ".layers." in name and name.endswith(kept)
    }


def parse_scheme(scheme: str) -> tuple[int, int]:
    """Return bits and group size of, for example, ``int4-g64``."""
    bits, group = scheme.removeprefix("int").split("-g")
    return int(bits), int(group)


def integer_bits(W: Tensor, scheme: str, *, symmetric: bool) -> int:
    """Count the bits of a matrix of integers: a scale of 16 bits and, if asymmetric, a zero point.

    Raises
    ------
    ValueError
        If a group has more than ``2 ** bits`` different values.
    """
    bits, group = parse_scheme(scheme)
    rows, columns = W.shape
    groups = W.reshape(rows, columns // group, group).float().sort(dim=-1).values
    different = 1 + (groups.diff(dim=-1) != 0).sum(dim=-1)
    if int(different.max()) > 2**bits:
        raise ValueError(f"a group has {int(different.max())} values: more than {bits} bits")
    return W.numel() * bits + groups[..., 0].numel() * (16 if symmetric else 16 + bits)


def sparse_bits(W: Tensor) -> int:
    """Count the bits of an unstructured sparse matrix: a mask and the nonzero values in 16 bits."""
    return W.numel() + 16 * int(W.count_nonzero())
