"""Let two models in memory use one embedding and one output head."""

from itertools import chain
from typing import Any

import torch
from torch import nn


def share_embeddings(drafter: Any, parent: Any) -> list[str]:
    """Let a model use the embedding and the output head of another one where they are equal.

    Parameters
    ----------
    drafter, parent
        Models of transformers. Modules of `drafter` get the parameters of `parent`.

    Returns
    -------
    list of str
        Names of the parameters of `drafter` that are shared now. Those that differ in values,
        shape, dtype or device, and quantized ones, are not.
    """
    names = {id(module): name for name, module in drafter.named_modules()}
    shared = []
    for end in ("get_input_embeddings", "get_output_embeddings"):
        own, other = getattr(drafter, end)(), getattr(parent, end)()
        if not all(isinstance(each, nn.Embedding | nn.Linear) for each in (own, other)):
            continue
        if _equal(own.weight, other.weight):
            own.weight = other.weight
            shared.append(f"{names[id(own)]}.weight")
    return shared


def shared_bytes(one: nn.Module, other: nn.Module) -> int:
    """Return the bytes of the parameters and buffers that two models have in common."""
    first, second = (
        {each.data_ptr(): each.nbytes() for each in _storages(m)} for m in (one, other)
    )
    return sum(size for address, size in first.items() if address in second)


def _storages(model: nn.Module) -> list[torch.UntypedStorage]:
    tensors = chain(model.parameters(), model.buffers())
    return [tensor.untyped_storage() for tensor in tensors if tensor.numel()]


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and torch.equal(one, other)
