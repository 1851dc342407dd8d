"""The table of fast products: which implementation serves an operation on a device.

A module that implements a product has a list `ENTRIES`, and `MODULES` lists the modules in use.
Components call `select` once after loading. The first entry whose requirements are met is used; it
handles every number of rows up to its limit, and larger inputs take the plain product.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

MODULES = (
    "packed_bytes",
    "packed_tiles",
    "packed_bags",
    "masked_csr",
    "packed_linear",
    "pivoted",
    "masked",
)
"""Modules of this package whose entries are used, in order of preference."""


@dataclass(frozen=True)
class Need:
    """A product that a component computes, as it is known after loading."""

    operation: str
    """Name of the custom operator in the namespace ``lrc``, for example ``packed_linear``."""
    codec: int | str
    """Bits of the integers; ``float`` if nothing is quantized."""
    device: torch.device
    dtype: torch.dtype
    """Of inputs, scales and outputs."""
    shape: tuple[int, int]
    """``(d_out, d_in)``."""
    group_size: int | None = None
    """Columns that share a scale; None for the whole row, or if nothing is quantized."""
    symmetric: bool = True


def always(need: Need) -> None:
    """Accept every product."""


@dataclass(frozen=True)
class Layout:
    """A converted copy of the stored tensors, which takes their place while it is used."""

    pack: Callable[..., dict[str, Tensor]]
    """Converts codes [d_out, d_in], int8, scales, zero points or None, and bits."""
    unpack: Callable[..., Tensor]
    """Returns the codes for the converted tensors, bits and shape, or those of some rows."""


@dataclass(frozen=True)
class Places:
    """What an entry derives from the mask of a sparse matrix, alongside the stored tensors."""

    find: Callable[[Tensor, int], dict[str, Tensor]]
    """Returns tensors for a mask [d_out, bytes] and the number of columns."""


@dataclass(frozen=True)
class Entry:
    """One implementation of an operation."""

    name: str
    """What `lrc inspect` and `lrc bench` call it."""
    operation: str
    device: str
    """Device type."""
    codecs: Collection[int | str]
    run: Callable[..., Any]
    """The product; its arguments depend on the operation."""
    dtypes: Collection[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16)
    rows: int | None = None
    """Largest number of rows of the input; None if unlimited."""
    refuse: Callable[[Need], str | None] = always
    """Returns why the entry does not serve a product; None if it does."""
    layout: Layout | None = None
    """None if `run` reads the stored tensors as they are."""
    together: Callable[..., Any] | None = None
    """Multiplies one input by several matrices, given as a sequence of the other arguments of
    `run`; returns a list of products, or None if the matrices differ in what must be equal."""
    places: Places | None = None
    """None if the operation has no mask."""


def select(need: Need) -> Entry | str:
    """Return the first entry that serves a product, or the reason why there is none."""
    reasons = []
    for entry in _table(MODULES):
        if entry.operation != need.operation or entry.device != need.device.type:
            continue
        reason = _refusal(entry, need)
        if reason is None:
            return entry
        reasons.append(f"{entry.name}: {reason}")
    if not reasons:
        return f"{need.operation} has no fast path on {need.device.type}"
    return "; ".join(reasons)


@cache
def _table(modules: tuple[str, ...]) -> list[Entry]:
    # Imported here, because the modules import this one.
    found = (import_module(f"lrc.compressors.kernels.{name}") for name in modules)
    return [entry for module in found for entry in module.ENTRIES]


def _refusal(entry: Entry, need: Need) -> str | None:
    if need.codec not in entry.codecs:
        return f"codec {need.codec} is not supported"
    if need.dtype not in entry.dtypes:
        given, *allowed = (str(each).removeprefix("torch.") for each in (need.dtype, *entry.dtypes))
        return f"needs {' or '.join(allowed)}, and the weights are in {given}"
    return entry.refuse(need)
