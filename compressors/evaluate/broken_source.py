"""Find a dense model that predicts no better than chance: damaged, or read in a wrong way."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from lrc.compressors.corpus.windows import evaluation_windows
from lrc.compressors.evaluate.perplexity import perplexity
from lrc.compressors.models.weights import not_finite
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Perplexity

NEAR_UNIFORM = 0.5
"""Of the vocabulary size, which is the perplexity of a model that guesses. Trained models stay far
below on any text in a language: a byte-level model of 256 tokens has about 3."""
MEMORY = 0.5  # of the free memory: a model that takes less is loaded for a check


def check_source_model(
    load: Callable[[], Any], tokenizer: PreTrainedTokenizerBase, spec: Perplexity
) -> list[str]:
    """Measure the dense model on the first window of a text; return warnings.

    Raises
    ------
    ModelError
        If its weights or logits are not finite.
    """
    first = evaluation_windows(spec.model_copy(update={"windows": 1}), tokenizer)
    model = load()
    try:
        found = perplexity(model, replace(first, tokens=first.tokens[:1])).perplexity
    except ModelError as error:
        for name, weight in model.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise not_finite(name, weight.dtype) from error
        raise ModelError(
            f"the source model is broken: on the first window of {spec.name}, {error}; check the"
            " files of the model, and model.dtype: float16 overflows where bfloat16 does not",
            code="broken-source",
            where="model.path",
        ) from error
    return near_uniform({spec.name: found}, model.config.get_text_config().vocab_size)


def near_uniform(dense: dict[str, float | None], vocabulary: int) -> list[str]:
    """Return a warning for every text on which the dense model is not better than chance."""
    return [
        f"near-uniform-model: the source model has perplexity {value:,.0f} on {name}, and one that"
        f" guesses among its {vocabulary:,} tokens {vocabulary:,}; its files may be damaged or its"
        " tokenizer another's: comparisons with it mean nothing"
        for name, value in dense.items()
        if value is not None and not value < NEAR_UNIFORM * vocabulary
    ]


def is_quick(n_bytes: int, device: str) -> bool:
    """Return whether a model of this size is loaded without strain."""
    kind = torch.device(device)
    free = torch.cuda.mem_get_info(kind)[0] if kind.type == "cuda" else free_memory()
    return n_bytes <= MEMORY * free


def free_memory() -> int:
    """Return the available memory of the machine, bytes."""
    return int(psutil.virtual_memory().available)
