"""The calibration windows of a run: drawn once, kept in the journal."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.calibrate.sampling import sample_windows
from lrc.compressors.corpus import calibration_windows, check_vocabulary, default_bos
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.progress import OnStep
from lrc.configs.recipe import Calibration

FILE = "windows.safetensors"


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
    """Return the windows [samples, length] that statistics are taken over.

    Parameters
    ----------
    embedding : Embedding
        Of the model: it must have a row for every token.
    dense : callable
        Loads the whole dense model; called for the source ``self`` only, which samples from it.
    """
    if not journal.has(FILE):
        generator = torch.Generator().manual_seed(seed)
        if calibration.source == "self":
            tokens = sample_windows(
                dense(),
                samples=calibration.samples,
                length=calibration.length,
                bos=default_bos(tokenizer),
                generator=generator,
                on_step=on_step,
            )
            facts = {"source": "self", "text_sha256": None, "text_tokens": tokens.numel()}
        else:
            windows = calibration_windows(calibration, tokenizer, generator=generator)
            tokens = windows.tokens
            facts = {
                "source": windows.source,
                "text_sha256": windows.sha256,
                "text_tokens": windows.text_tokens,
            }
        check_vocabulary(tokens, embedding)
        facts["bos"] = default_bos(tokenizer) is not None
        facts["tokens"] = tokens.numel()
        facts["tokens_sha256"] = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        journal.write_tensors(FILE, {"tokens": tokens}, {"facts": facts})
    return journal.read_tensor(FILE, "tokens")


def provenance(journal: Journal) -> dict[str, Any] | None:
    """Return where the windows come from, for the report; None if none were needed."""
    if not journal.has(FILE):
        return None
    facts: dict[str, Any] = journal.read_facts(FILE)["facts"]
    return facts
