"""The hash of weights by their values, whatever the files they are stored in."""

import hashlib

import torch
from torch import Tensor


class WeightHash:
    """SHA-256 over tensors with their names, types and shapes, in the order of the calls."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor."""
        self._digest.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        self._digest.update(values.view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Return the hash in hexadecimal digits."""
        return self._digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
