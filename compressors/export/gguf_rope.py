"""Rotary frequencies in GGUF: keys of the metadata, or a table of factors."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.export.gguf_families import Family
from lrc.configs.errors import ExportError


@dataclass(frozen=True)
class Rope:
    """What a GGUF file says about rotary frequencies."""

    keys: dict[str, Any] = field(default_factory=dict)
    """Metadata without the prefix of the architecture."""
    factors: Tensor | None = None
    """Factors [head_dim / 2] that frequencies are divided by; None if there is no table."""


def rope(model: Any, family: Family) -> Rope:
    """Return the rotary frequencies of a skeleton.

    Raises
    ------
    ExportError
        If llama.cpp would compute others.
    """
    parameters = model.config.rope_parameters
    if not family.window:
        return _whole(model, parameters, family)
    found, local = parameters["full_attention"], parameters["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise _unsupported(local["rope_type"] + " of sliding_attention", family, "default")
    keys = {"rope.freq_base": float(found["rope_theta"])}
    keys["rope.freq_base_swa"] = float(local["rope_theta"])
    return Rope(keys | _linear(found, family))


def _whole(model: Any, parameters: dict[str, Any], family: Family) -> Rope:
    kind = parameters.get("rope_type", "default")
    keys = {"rope.freq_base": float(parameters["rope_theta"])}
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unsupported("partial_rotary_factor", family, "all rows of a head rotated")
    if not family.frequency_table or kind in ("default", "linear"):
        return Rope(keys | _linear(parameters, family))
    if kind == "llama3":
        inverse = next(m.inv_freq for m in model.modules() if hasattr(m, "inv_freq"))
        exponents = torch.arange(len(inverse), dtype=torch.float32) / len(inverse)
        return Rope(keys, parameters["rope_theta"] ** -exponents / inverse.float().cpu())
    same = parameters.get("short_factor") == parameters.get("long_factor")
    if kind == "longrope" and same and parameters.get("attention_factor") == 1:
        return Rope(keys, torch.tensor(parameters["long_factor"], dtype=torch.float32))
    raise _unsupported(kind, family, "default, linear, llama3, or longrope with one table")


def _linear(parameters: dict[str, Any], family: Family) -> dict[str, Any]:
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind == "linear":
        factor = float(parameters["factor"])
        return {"rope.scaling.type": "linear", "rope.scaling.factor": factor}
    raise _unsupported(kind, family, "default or linear")


def _unsupported(kind: str, family: Family, allowed: str) -> ExportError:
    hint = "; slice with `heads: false`" if kind == "longrope" else ""
    return ExportError(
        f"rope_parameters: {family.arch.name.lower()} models in GGUF must have {allowed}, got "
        f"{kind}{hint}"
    )
