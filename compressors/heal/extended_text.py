"""Training text that the dense model writes, where a text is shorter than the training.

Distillation learns a text by heart: trained three times on 385,000 tokens, SmolLM2-135M at 0.6 of
its size has a divergence of 0.25 nats per token there and of 0.42 on other text. Any text of the
same kind serves for it, as its targets are the predictions of the dense model. Text that this model
writes itself is as good as real text or better [1]_; it is of the kind of a text that it continues.

References
----------
.. [1] M. Williams et al., "Self-calibration for Language Model Quantization and Pruning", 2024.
   https://arxiv.org/abs/2410.17170
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lrc.compressors.heal.held_out import TrainingText, everywhere
from lrc.compressors.heal.text_request import TextRequest
from lrc.compressors.heal.trained_files import text_folder
from lrc.compressors.io.journal import Journal

START = 64
"""Tokens of the text that are continued, at most half a window."""


def extended(
    text: TrainingText,
    request: TextRequest,
    journal: Journal,
    *,
    bos: int | None,
    continue_: Callable[[Tensor, int], Tensor],
) -> TrainingText:
    """Return a text with as many training windows as a stage wants, of which none is repeated.

    Parameters
    ----------
    text : TrainingText
        Of the request.
    bos : int or None
        First token of every window.
    continue_ : callable
        Returns windows [n, length] that begin with given tokens [n, m].
    """
    count, length = request.wanted - len(text.training), request.length
    if count <= 0:
        return text
    piece = f"{text_folder(request.stage)}/{request.number}-written.safetensors"
    if not journal.has(piece):
        starts = random_pieces(text.training, count, seed=request.seed, bos=bos)
        journal.write_tensors(piece, {"written": continue_(starts, length)}, {})
    written = journal.read_tensor(piece, "written")
    training = torch.cat([text.training, written])
    facts = {"training_tokens": training.numel(), "written_tokens": written.numel()}
    counted = text.training_counted
    if counted is not None:  # text of the model counts whole
        counted = torch.cat([counted, everywhere(written, None)])
    return replace(text, training=training, training_counted=counted, facts={**text.facts, **facts})


def random_pieces(windows: Tensor, count: int, *, seed: int, bos: int | None) -> Tensor:
    """Return pieces [count, n] from random places of windows [n_windows, length], after BOS."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    length = windows.shape[1]
    size = min(START, length // 2)
    rows = torch.randint(len(windows), (count, 1), generator=generator)
    first = 0 if bos is None else 1
    places = torch.randint(first, length - size + 1, (count, 1), generator=generator)
    pieces = windows[rows, places + torch.arange(size)]
    return pieces if bos is None else torch.cat([torch.full((count, 1), bos), pieces], dim=1)
