"""How many tokens a decoder layer is applied to at a time."""

from lrc.compressors.models.architecture import Architecture
from lrc.configs.size import GIB

# Enough tokens a batch to keep matrix products efficient, few enough to keep attention small.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
MIN_BATCHES = 8
"""If there are so many windows: several processes divide whole batches, of any number of processes
the same ones."""
BACKWARD_BYTES = 5 * GIB
"""What a backward pass through a layer may keep on a GPU. This and not the free memory decides, so
that a recipe computes the same on all cards."""
BACKWARD_STATES = 12
"""Tensors of the width of the stream that a backward pass keeps, besides two per linear."""
ATTENTION = 5
"""Matrices of attention weights of a backward pass on a GPU, which has no fused attention."""


def batch_tokens(architecture: Architecture, device_type: str, n_windows: int, length: int) -> int:
    """Return the tokens in a batch of windows [n_windows, length], at most; at least one window."""
    most = min(BATCH_TOKENS[device_type], max(1, n_windows // MIN_BATCHES) * length)
    if device_type == "cuda":
        most = min(
            most, BACKWARD_BYTES // max(backward_bytes(architecture, device_type, length), 1)
        )
    return max(most, length)


def backward_bytes(architecture: Architecture, device_type: str, length: int) -> int:
    """Return what a backward pass through a layer keeps for a token, in float32.

    Parameters
    ----------
    architecture : Architecture
        Of experts, only those that a token uses are counted.
    length : int
        Tokens of a window.
    """
    config = architecture.model.config.get_text_config()
    width = int(getattr(config, "hidden_size", 0) or 0)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    outputs = [0.0] * len(architecture.layer_names)
    for linear in architecture.linears:
        outputs[linear.layer] += linear.d_out * _used(architecture, linear.name)
    attention = ATTENTION * heads * length if device_type == "cuda" else 0
    return int(4 * (BACKWARD_STATES * width + 2 * max(outputs, default=0) + attention)) or 1


def _used(architecture: Architecture, name: str) -> float:
    """Return the fraction of tokens that a linear is applied to."""
    for module, (number, selected) in architecture.experts.items():
        if name.startswith(f"{module}."):
            return selected / number
    return 1.0
