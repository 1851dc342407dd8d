"""Detect a dense model that hardly predicts better than chance.

Its files are damaged, or were read incorrectly.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lrc.compressors.corpus.windows import evaluation_windows
from lrc.compressors.evaluate.perplexity import perplexity
from lrc.compressors.io.finite import all_finite
from lrc.compressors.io.machine import free_memory
from lrc.compressors.models.weights import not_finite
from lrc.configs.errors import ModelError
from lrc.configs.recipe import Perplexity
from lrc.configs.size import GIB

NEAR_UNIFORM = 0.5
"""Fraction of the vocabulary size, the perplexity of random guessing, from which a model is
reported. Trained models stay far below on any text in a language: a byte-level model of 256 tokens
has about 3."""
MEMORY = 0.5
"""Largest fraction of the free memory that the dense model may take to be checked in advance."""
LARGEST = 4 * GIB
"""Larger models take too long to load for a check; the evaluation finds out."""


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
            if not all_finite(weight):
                raise not_finite(name, weight.dtype) from error
        raise ModelError(
            f"the source model is broken: on the first window of {spec.name}, {error}; check the"
            " files of the model, and model.dtype: float16 overflows where bfloat16 does not",
            code="broken-source",
            where="model.path",
        ) from error
    return near_uniform({spec.name: found}, model.config.get_text_config().vocab_size)


def near_uniform(dense: dict[str, float | None], vocabulary: int) -> list[str]:
    """Return a warning for every text on which the dense model is hardly better than chance.

    Its perplexity is then at least `NEAR_UNIFORM` times the vocabulary size.
    """
    return [
        f"near-uniform-model: the source model has perplexity {value:,.0f} on {name}; random"
        f" guessing among its {vocabulary:,} tokens gives {vocabulary:,}. Comparisons with it are"
        " meaningless: check that its files are undamaged and that the tokenizer belongs to the"
        " model"
        for name, value in dense.items()
        if value is not None and not value < NEAR_UNIFORM * vocabulary
    ]


def is_quick(n_bytes: int, device: str) -> bool:
    """Return whether a model of so many bytes is loaded quickly, and into little of the memory."""
    return n_bytes <= min(LARGEST, MEMORY * free_memory(device))
