"""Which linear layers a compressed layer can take the place of: those that are only called."""

import copy
import inspect
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lrc.compressors.layers import ComponentConfig, CompressedLinear, WeightConfig
from lrc.compressors.layers.compressed_linear import Int8Linear, compares_dtype
from lrc.compressors.layers.experts import split_modules
from lrc.compressors.models.architecture import Architecture

ROUTER = re.compile(r"(.*_)?(gate|router)")


def irreplaceable(architecture: Architecture) -> dict[str, str]:
    """Return the linears that do more than ``x @ W.T + bias``, or whose weights other code reads.

    By name, with a clause that says why. Fused kernels read weights, which only the source code
    tells: on the CPU they do not run.
    """
    found = {}
    routers = _routers(architecture)
    for linear in architecture.linears:
        module = architecture.model.get_submodule(linear.name)
        *parents, leaf = linear.name.split(".")
        if linear.name in routers:
            found[linear.name] = "selects or weights experts, and small errors change which"
        for depth in range(len(parents) + 1):
            owner: Any = type(architecture.model.get_submodule(".".join(parents[:depth])))
            if _reads(owner, leaf):
                found[linear.name] = f"is read by {owner.__name__}, not only called"
        if not is_linear(type(module)):
            found[linear.name] = f"is a {type(module).__name__}, which computes something else"
    # All experts are alike, and there can be thousands.
    others = [n.name for n in architecture.linears if n.name not in found and not n.expert]
    if not _loads(architecture.model, others):
        kinds: dict[str, list[str]] = {}
        for name in others:
            kinds.setdefault(name.rpartition(".")[2], []).append(name)
        for kind, names in kinds.items():
            if not _loads(architecture.model, names):
                found |= {
                    linear.name: "is read while the model is loaded"
                    for linear in architecture.linears
                    if linear.name in names
                    or (linear.name.rpartition(".")[2] == kind and linear.expert)
                }
    return found


def _routers(architecture: Architecture) -> set[str]:
    """Return the linears that choose among the experts of a layer, or scale what they return.

    They are in the same block as the experts, in a module called ``gate`` or ``router``, or one
    such as ``shared_expert_gate``.
    """
    blocks = {name.rpartition(".")[0] for name, _ in split_modules(architecture.model)}
    found = set()
    for linear in architecture.linears:
        parts = linear.name.split(".")
        for depth in range(1, len(parts)):
            if ".".join(parts[:depth]) in blocks and ROUTER.fullmatch(parts[depth]):
                found.add(linear.name)
    return found


def _loads(model: nn.Module, names: Iterable[str]) -> bool:
    """Return whether `from_pretrained` can build the model with these linears compressed.

    It calls the `_init_weights` of the class for every module, also of those that are stored.
    """
    shared = {
        id(expert): expert
        for _, experts in split_modules(model)
        for number, expert in experts.named_children()
        if number != "0"
    }
    trial: Any = copy.deepcopy(model, shared)
    for name in names:
        linear = trial.get_submodule(name)
        config = WeightConfig(
            tuple(linear.weight.shape), (ComponentConfig("low_rank", {"rank": 1}),)
        )
        parent, _, leaf = name.rpartition(".")
        int8 = compares_dtype(type(trial.get_submodule(parent)), leaf)
        kind = Int8Linear if int8 else CompressedLinear
        trial.set_submodule(name, kind.replacing(linear, config))
    for tensor in (*trial.parameters(), *trial.buffers()):
        tensor._is_hf_initialized = True
    for module in trial.modules():
        module._is_hf_initialized = False
    try:
        trial.initialize_weights()
    except Exception:  # modeling code may raise anything
        return False
    return True


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
def _reads(owner: Any, leaf: str) -> bool:
    code = _code(owner)
    if compares_dtype(owner, leaf):  # then `Int8Linear` can take its place
        code = re.sub(rf"isinstance\(self\.{leaf}\.weight, torch\.Tensor\)", "", code)
        code = re.sub(rf"\.{leaf}\.weight\.dtype\b", "", code)
    return re.search(rf"\.{leaf}\.(weight|bias)\b(?!\.device)", code) is not None


@lru_cache
def _code(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # defined where no file is
        return ""
