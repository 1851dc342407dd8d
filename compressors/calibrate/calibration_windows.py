"""The calibration windows of a run: from a text or sampled from the model, kept in the journal."""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.corpus.tokens import check_vocabulary, default_bos
from lrc.compressors.corpus.windows import Windows, calibration_windows
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep
from lrc.configs.recipe import Calibration
from lrc.configs.sources import counts, described

FILE = "windows.safetensors"
SELF = "self"
"""The source that is sampled from the model."""
SAMPLED_TOGETHER = 16
LITTLE_VOCABULARY = 0.02
"""Fraction of the vocabulary below which there is a warning. 8,192 tokens of ``python-docs`` have
2.9 % of a vocabulary of 49,152, and 32,768 have 6.3 %."""


def take_windows(
    calibration: Calibration,
    tokenizer: Any,
    journal: Journal,
    *,
    seed: int,
    embedding: Any,
    dense: Callable[[], Any],
    on_step: OnStep,
) -> Tensor:
    """Return the windows [samples, length] that statistics are collected on.

    The model's `embedding` must have a row for every token. `dense` loads the whole model; it is
    called only for the source ``self``, which samples from it.
    """
    if not journal.has(FILE):
        generator = torch.Generator().manual_seed(seed)
        bos = default_bos(tokenizer)
        found = []
        for source, samples in counts(calibration.source, calibration.samples).items():
            if source == SELF:
                shape = samples, calibration.length
                sampled = sample_windows(
                    dense(), shape, bos=bos, generator=generator, on_step=on_step
                )
                found.append(Windows(sampled, SELF, None, bos is not None, sampled.numel()))
                continue
            part = calibration.of(source, samples)
            fraction = samples / calibration.samples
            found.append(
                calibration_windows(part, tokenizer, generator=generator, fraction=fraction)
            )
        tokens = torch.cat([windows.tokens for windows in found])
        if len(found) > 1:  # the first windows are then of all sources, too
            tokens = tokens[torch.randperm(len(tokens), generator=generator)]
        check_vocabulary(tokens, embedding)
        facts = {
            **_facts(found, described(calibration.source)),
            "bos": bos is not None,
            "tokens": tokens.numel(),
            "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "vocabulary": {
                "used": tokens.unique().numel(),
                "size": embedding.weight.shape[0],
            },
        }
        journal.write_tensors(FILE, {"tokens": tokens}, {"facts": facts})
    return journal.read_tensor(FILE, "tokens")


def _facts(found: list[Windows], source: str) -> dict[str, Any]:
    """Return the origin of windows; of several sources, also that of each."""
    texts = [
        {"source": each.source, "text_sha256": each.sha256, "text_tokens": each.text_tokens}
        for each in found
    ]
    if len(texts) == 1:
        return texts[0]
    n_tokens = sum(each.text_tokens for each in found)
    return {
        "source": source,
        "text_sha256": None,
        "text_tokens": n_tokens,
        "texts": [
            {**text, "tokens": each.tokens.numel()} for text, each in zip(texts, found, strict=True)
        ],
    }


def vocabulary_warning(facts: Mapping[str, Any] | None) -> str | None:
    """Return a warning if the windows contain little of the vocabulary; None if not, or unknown.

    Parameters
    ----------
    facts : mapping or None
        From `provenance`.
    """
    found = (facts or {}).get("vocabulary")  # journals of earlier versions have none
    if found is None or found["used"] >= LITTLE_VOCABULARY * found["size"]:
        return None
    return (
        f"calibration: the text has {found['used']:,} of the {found['size']:,} tokens of the "
        f"vocabulary ({found['used'] / found['size']:.1%}), and nothing is known about the others; "
        "use more or more varied text, such as several sources"
    )


def provenance(journal: Journal) -> dict[str, Any] | None:
    """Return the source of the windows, for the report; None if none were needed."""
    if not journal.has(FILE):
        return None
    facts: dict[str, Any] = journal.read_facts(FILE)["facts"]
    return facts


@torch.inference_mode()
def sample_windows(
    model: Any,
    shape: tuple[int, int],
    *,
    bos: int | None,
    generator: torch.Generator,
    on_step: OnStep,
) -> Tensor:
    """Sample windows of tokens (int64) of a shape [samples, length] at temperature 1.

    The idea of LLM-QAT (arXiv:2305.17888): generated text is close to the training data. The first
    token of every window is `bos`, or drawn uniformly from the vocabulary. The generator is on the
    CPU, so that every device samples from the same random numbers.
    """
    # transformers 5.24 calls it `cache` and warns about the name that it had before.
    parameters = inspect.signature(type(model).forward).parameters
    key = "cache" if "cache" in parameters else "past_key_values"
    (samples, length), windows = shape, []
    for start in range(0, samples, SAMPLED_TOGETHER):
        count = min(SAMPLED_TOGETHER, samples - start)
        if bos is None:
            tokens = torch.randint(model.config.vocab_size, (count, 1), generator=generator)
        else:
            tokens = torch.full((count, 1), bos)
        cache = None
        while tokens.shape[1] < length:
            out = model(tokens[:, -1:].to(model.device), use_cache=True, **{key: cache})
            cache = out.past_key_values
            p = out.logits[:, -1].float().softmax(-1).cpu()  # [count, vocabulary]
            last = torch.multinomial(p, 1, generator=generator)
            tokens = torch.cat([tokens, last], dim=1)
        windows.append(tokens)
        on_step("sample", start + count, samples)
    return torch.cat(windows)
