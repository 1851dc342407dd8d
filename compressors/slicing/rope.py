"""Rotary frequencies of narrower heads, said so that stock transformers computes them.

A narrower head keeps some of the rotary pairs, and each pair its frequency. A config has one number
for the frequencies of a head, the base; but the scaling called ``longrope`` also has a factor for
each frequency, for short texts and for long ones. With both the same it is a table.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

# Those whose table is made once: dynamic and longrope change it with the length of the text.
FIXED = ("default", "linear", "llama3", "yarn")


def frequencies(model: nn.Module, config: PreTrainedConfig) -> tuple[Tensor, float] | str:
    """Return the inverse frequencies [head_dim / 2] of a model and the scale of its cos and sin.

    Or the reason, a clause, why they cannot be told or not be taken apart.
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
    """Return the ``rope_parameters`` of a config whose table is that of some pairs.

    Parameters
    ----------
    parameters : dict
        Those of the source; the base is taken over.
    inverse : Tensor, shape [head_dim / 2]
        Inverse frequencies of the source, of any fixed scaling.
    pairs : sequence of int
        The kept ones, ascending; all of them leave the parameters as they are.
    scale : float
        Of cos and sin in the source (1 but for yarn).
    max_positions : int
        Of the config. Longer texts take the long factors, which are the same.
    """
    if len(pairs) == len(inverse):
        return dict(parameters)
    base, kept = float(parameters["rope_theta"]), inverse.detach().cpu().float()[list(pairs)]
    factors = _factors(base, kept).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": parameters["rope_theta"],
        "factor": 1.0,
        "attention_factor": scale,
        "original_max_position_embeddings": max_positions,
        "short_factor": factors,
        "long_factor": factors,
    }


def _factors(base: float, kept: Tensor) -> Tensor:
    """Solve ``kept_i = 1 / (factor_i * base^(2 i / dim))`` for the factors, as float32 rounds."""
    shape = torch.arange(0, 2 * len(kept), 2).float() / (2 * len(kept))  # as transformers does
    powers = base**shape
    near = [1.0 / (kept * powers)]
    for toward in (0.0, torch.inf):  # a neighbour may round better
        near.append(torch.nextafter(near[0], torch.full_like(kept, toward)))
    choices = torch.stack(near)  # [3, n_pairs]
    errors = (1.0 / (choices * powers) - kept).abs()
    return choices.gather(0, errors.argmin(dim=0, keepdim=True))[0]
