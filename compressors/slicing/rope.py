"""Rotary frequencies of narrower heads, in a form that stock transformers computes.

A narrower head keeps some rotary pairs with their frequencies. A config gives the frequencies by
one number, the base, but the ``longrope`` scaling adds a factor per frequency, for short and for
long texts. With both lists equal this is a table of frequencies.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

# Scalings with a fixed table; dynamic and longrope change it with the length of the text.
FIXED = ("default", "linear", "llama3", "yarn")


def frequencies(model: nn.Module, config: PreTrainedConfig) -> tuple[Tensor, float] | str:
    """Return the inverse frequencies [head_dim / 2] of a model and the factor of its cos and sin.

    If they cannot be determined or split, return a clause that gives the reason.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return "it has no rotary embedding"
    if not isinstance(parameters.get("rope_theta"), int | float):
        return "its layers do not share one rotary table"
    kind = parameters.get("rope_type", "default")
    if kind not in FIXED:
        return f"its rotary table ({kind}) changes with the length of the text"
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        return "it rotates only a part of each head"
    tables = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if len(tables) != 1:
        return f"it has {len(tables)} rotary tables"
    table: Any = tables[0]
    return table.inv_freq, float(getattr(table, "attention_scaling", 1.0))


def table_parameters(
    parameters: dict[str, Any],
    inverse: Tensor,
    pairs: Sequence[int],
    *,
    scale: float,
    max_positions: int,
) -> dict[str, Any]:
    """Return ``rope_parameters`` whose table contains the frequencies of the kept pairs.

    The base in `parameters` of the source is kept. `inverse` [head_dim / 2] are its frequencies
    under any fixed scaling, `scale` is the factor of its cos and sin (1 except for yarn). Texts
    longer than `max_positions` use the long factors, which are the same.
    """
    if len(pairs) == len(inverse):
        return dict(parameters)
    base, kept = float(parameters["rope_theta"]), inverse.detach().cpu().float()[list(pairs)]
    factors = _solve_factors(base, kept).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": parameters["rope_theta"],
        "factor": 1.0,
        "attention_factor": scale,
        "original_max_position_embeddings": max_positions,
        "short_factor": factors,
        "long_factor": factors,
    }


def _solve_factors(base: float, kept: Tensor) -> Tensor:
    """Solve ``kept_i = 1 / (factor_i * base^(2 i / dim))`` for the factors in float32."""
    exponents = torch.arange(0, 2 * len(kept), 2).float() / (2 * len(kept))  # as in transformers
    powers = base**exponents
    near = [1.0 / (kept * powers)]
    for toward in (0.0, torch.inf):  # a neighbouring float may round to a closer frequency
        near.append(torch.nextafter(near[0], torch.full_like(kept, toward)))
    choices = torch.stack(near)  # [3, n_pairs]
    errors = (1.0 / (choices * powers) - kept).abs()
    return choices.gather(0, errors.argmin(dim=0, keepdim=True))[0]
