"""Which linear layers a compressed layer can take the place of: those that are only called."""

import copy
import inspect
import re
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lrc.compressors.models.architecture import Architecture


def irreplaceable(architecture: Architecture) -> dict[str, str]:
    """Return the linears that do more than ``x @ W.T + bias``, or whose weights other code reads.

    By name, with a clause that says why. Fused kernels read weights, which only the source code
    tells: on the CPU they do not run.
    """
    found = {}
    for linear in architecture.linears:
        module = architecture.model.get_submodule(linear.name)
        *parents, leaf = linear.name.split(".")
        layer = architecture.layer_names[linear.layer]
        for depth in range(layer.count(".") + 1, len(parents) + 1):
            owner: Any = type(architecture.model.get_submodule(".".join(parents[:depth])))
            if re.search(rf"\.{leaf}\.(weight|bias)\b(?!\.device)", _code(owner)):
                found[linear.name] = f"is read by {owner.__name__}, not only called"
        if not is_linear(type(module)):
            found[linear.name] = f"is a {type(module).__name__}, which computes something else"
    return found


def is_linear(kind: type[nn.Module]) -> bool:
    """Return whether a subclass of `nn.Linear` computes the same as `nn.Linear`."""
    if kind.forward is nn.Linear.forward:
        return True
    x, like = torch.randn(2, 3, 6), nn.Linear(6, 5)
    module = kind.__new__(kind)
    vars(module).update(copy.copy(vars(like)))
    try:
        return torch.allclose(module(x), functional.linear(x, like.weight, like.bias))
    except Exception:  # it needs attributes that a linear layer does not have
        return False


@lru_cache
def _code(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # defined where no file is
        return ""
