"""The calibration pairs of an encoder-decoder model: examples of a task or halves of windows."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.calibrate.calibration_windows import FILE
from lrc.compressors.corpus.examples import drawn_examples, task_identity
from lrc.compressors.corpus.pairs import Pairs, split_windows, tokenize_pairs
from lrc.compressors.corpus.tokens import check_vocabulary, default_bos
from lrc.compressors.io.journal import Journal
from lrc.configs.recipe import Calibration

STORED = ("sources", "source_mask", "inputs_of_decoder", "labels", "target_mask")
"""Parts of `Pairs`, by their names in the journal."""


def take_pairs(
    calibration: Calibration,
    tokenizer: Any,
    journal: Journal,
    *,
    seed: int,
    model: Any,
    windows: Callable[[], Tensor],
) -> Pairs:
    """Return the pairs that statistics of an encoder-decoder model are collected on.

    Parameters
    ----------
    model : PreTrainedModel
        Possibly a skeleton; its embedding must have a row for every token.
    windows : callable
        Returns windows [samples, length] of a text, which are used if there is no task.
    """
    task = calibration.task
    if task is None:
        return split_windows(windows(), model, bos=default_bos(tokenizer) is not None)
    if not journal.has(FILE):
        examples = drawn_examples(task, calibration.samples, seed=seed)
        found = tokenize_pairs(examples.texts, tokenizer, model, length=task.length)
        embedding = model.get_input_embeddings()
        check_vocabulary(found.tokens, embedding)
        n_tokens = int(found.source_mask.sum() + found.target_mask.sum())
        read = torch.cat([found.sources[found.source_mask], found.labels[found.target_mask]])
        facts = {
            "source": task.data,
            "text_sha256": task_identity(task).rpartition(" ")[2],
            "text_tokens": n_tokens,
            "bos": False,
            "tokens": n_tokens,
            "tokens_sha256": hashlib.sha256(found.tokens.numpy().tobytes()).hexdigest(),
            "vocabulary": {
                "used": read.unique().numel(),
                "size": embedding.weight.shape[0],
            },
        }
        journal.write_tensors(FILE, vars(found), {"facts": facts})
    return Pairs(**journal.read_tensors(FILE, {name: name for name in STORED}))
