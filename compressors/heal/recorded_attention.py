"""Attention that needs no mask in a recording either.

Causal attention over whole windows needs no mask, and the fastest kernels, as well as those that
add gradients in a fixed order without taking several times as long, do not accept one. While a CUDA
graph is recorded, transformers cannot read the values that show that a mask is superfluous, and
makes one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lrc.compressors.solvers.cuda_graphs import is_recording

NAME = "sdpa"
"""The implementation that is replaced, under its own name: some models ask for that."""


@contextmanager
def recorded_without_masks() -> Iterator[None]:
    """Let recordings in the context omit the masks that the same call has omitted before."""
    AttentionInterface.register(NAME, _attention)
    try:
        yield
    finally:
        AttentionInterface.register(NAME, sdpa_attention_forward)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention as transformers does, see `sdpa_attention_forward`."""
    lengths = query.shape[2], key.shape[2]
    if is_recording():
        if getattr(module, "unmasked_lengths", None) == lengths:
            attention_mask = None
    else:
        module.unmasked_lengths = lengths if attention_mask is None else None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
