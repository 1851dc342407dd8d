"""Rotary tables that are not chosen anew in every forward pass.

transformers decides by the largest position of every forward pass whether a rotary embedding of
type ``longrope`` uses its table for short or that for long texts, and whether that of type
``dynamic`` has to be recomputed. Where this is control flow (of ``dynamic``, and of ``longrope`` in
transformers 5.17), the host waits for the device, so that the pass can be neither recorded as a
CUDA graph nor traced as one graph. Types whose tables cannot change are therefore replaced by
``default``, for which nothing is decided. `slicing/rope.py` writes ``longrope`` with two equal
tables.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

FIXED = "default"


class ConstantTables:
    """The rotary embeddings of a model whose tables are the same for all texts up to a length.

    Parameters
    ----------
    model
        A model of transformers that has read a text of at most that length, after which the tables
        are those of short texts.
    longest : int
        Length in tokens.
    """

    def __init__(self, model: nn.Module, longest: int) -> None:
        self._types: list[tuple[Any, Any]] = []
        for module in model.modules():
            kinds = getattr(module, "rope_type", None)
            if isinstance(kinds, dict):  # by the type of layer
                found: Any = {k: _constant(module, kind, longest, k) for k, kind in kinds.items()}
            else:
                found = _constant(module, kinds, longest)
            if found != kinds:
                self._types.append((module, found))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Use the tables as they are inside the context."""
        before = [module.rope_type for module, _ in self._types]
        try:
            for module, kinds in self._types:
                module.rope_type = kinds
            yield
        finally:
            for (module, _), kinds in zip(self._types, before, strict=True):
                module.rope_type = kinds


def _constant(module: Any, kind: Any, longest: int, layers: str | None = None) -> Any:
    """Return `FIXED` if no text up to a length changes a table, otherwise `kind`."""
    prefix = "" if layers is None else f"{layers}_"
    table, short = (getattr(module, f"{prefix}{name}inv_freq", None) for name in ("", "original_"))
    if not (table is not None and short is not None and torch.equal(table, short.to(table.device))):
        return kind
    if kind == "longrope":
        parameters = module.config.rope_parameters
        parameters = parameters if layers is None else parameters[layers]
        limit = parameters.get("original_max_position_embeddings", 0)
        same = parameters["short_factor"] == parameters["long_factor"]
        return FIXED if same or longest <= limit else kind
    if isinstance(kind, str) and "dynamic" in kind:
        limit = module.original_max_seq_len
        reached = getattr(module, f"{prefix}max_seq_len_cached", module.max_seq_len_cached)
        return FIXED if longest <= limit == reached else kind
    return kind
