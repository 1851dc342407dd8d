"""Calibration text for users who have none: sampled from the model itself.

The idea is LLM-QAT's (arXiv:2305.17888): what a model generates is close to what it
was trained on. Every window starts with the BOS token, or a random token where there is none, and
continues by sampling from the model's own distribution.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.io.progress import OnStep

BATCH = 16


@torch.inference_mode()
def sample_windows(
    model: Any,
    *,
    samples: int,
    length: int,
    bos: int | None,
    generator: torch.Generator,
    on_step: OnStep,
) -> Tensor:
    """Sample windows [samples, length] of tokens (int64) at temperature 1.

    Parameters
    ----------
    model : PreTrainedModel
        The dense model, resident.
    bos : int or None
        First token of every window; None draws it uniformly from the vocabulary.
    generator : torch.Generator
        On the CPU, so that every device samples from the same stream of numbers.
    """
    rows = []
    for start in range(0, samples, BATCH):
        count = min(BATCH, samples - start)
        if bos is None:
            first = torch.randint(model.config.vocab_size, (count, 1), generator=generator)
        else:
            first = torch.full((count, 1), bos)
        rows.append(_continue(model, first, length, generator))
        on_step("sample", start + count, samples)
    return torch.cat(rows)


def _continue(model: Any, tokens: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Extend tokens [n, 1] to [n, length]."""
    # transformers 5.24 calls it `cache` and warns of the name that it had before.
    parameters = inspect.signature(type(model).forward).parameters
    key = "cache" if "cache" in parameters else "past_key_values"
    cache, last = None, tokens
    while tokens.shape[1] < length:
        out = model(last.to(model.device), use_cache=True, **{key: cache})
        cache = out.past_key_values
        p = out.logits[:, -1].float().softmax(-1).cpu()  # [n, vocabulary]
        last = torch.multinomial(p, 1, generator=generator)
        tokens = torch.cat([tokens, last], dim=1)
    return tokens
