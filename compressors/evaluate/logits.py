"""The logits of a language model on windows, a few positions at a time.

Logits take far more memory than hidden states: at 2,048 positions and a vocabulary of 262,144 they
are 2 GiB in float32.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.compressors.corpus.pairs import IGNORED, source_tokens, split_windows
from lrc.compressors.corpus.windows import Windows
from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.models.model_kinds import kind_of

PROBE = 16  # positions on which the head is compared with the model


class LogitReader(Protocol):
    """Computes the logits of one model on given windows, a few positions at a time."""

    vocabulary: int
    dtype: torch.dtype
    """Precision of the weights."""
    repeats: bool
    """Whether the decoder runs again for every piece of a window."""
    processes: Processes
    """Processes that divide the windows."""

    def own(self, count: int) -> Sequence[int]:
        """Return the numbers of those of the first `count` windows that this process reads."""

    def first(self, length: int) -> int:
        """Return the first position of a window at which the next token is predicted."""

    def pieces(self, number: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the logits at all positions of a window from the first that is predicted on.

        There are none at the last position.

        Yields
        ------
        start : int
            The first position of the piece.
        logits : Tensor, shape [n, vocabulary]
            With n at most `size`.
        """


class _ModelLogits:
    """The logits of a model that is in memory as a whole, on windows [n_windows, length]."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, processes: Processes) -> None:
        self.processes = processes
        self._model, self._tokens, self._device = model, tokens, input_device(model)
        self.repeats = not head_gives_logits(model, tokens[0].to(self._device))
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.dtype = model.dtype

    def own(self, count: int) -> Sequence[int]:
        return self.processes.turn(count)

    def first(self, length: int) -> int:
        return 0

    def pieces(self, number: int, size: int) -> Iterator[tuple[int, Tensor]]:
        ids = self._tokens[number].to(self._device)
        return logit_pieces(self._model, ids, head_only=not self.repeats, size=size)


class _HalfLogits:
    """The logits of an encoder-decoder model, for the second halves of windows.

    The first halves are the source texts, see `split_windows`.
    """

    repeats = False

    def __init__(self, model: PreTrainedModel, windows: Windows, processes: Processes) -> None:
        self.processes = processes
        self._model, self._device = model, input_device(model)
        self._pairs = split_windows(windows.tokens, model, bos=windows.bos)
        self._half = source_tokens(windows.tokens.shape[1])
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.dtype = model.dtype

    def own(self, count: int) -> Sequence[int]:
        return self.processes.turn(count)

    def first(self, length: int) -> int:
        return self._half - 1

    def pieces(self, number: int, size: int) -> Iterator[tuple[int, Tensor]]:
        pair = self._pairs[number : number + 1]
        outputs = cast(Any, self._model)(**pair.inputs(self._device), use_cache=False)
        logits = outputs.logits[0, pair.labels[0] != IGNORED]
        for start in range(0, len(logits), size):
            yield self._half - 1 + start, logits[start : start + size]


@contextmanager
def model_logits(
    model: PreTrainedModel, windows: Windows, processes: Processes = ALONE
) -> Iterator[LogitReader]:
    """Yield the reader of a model on windows, without gradients.

    The mode of the model (train or eval) is restored.
    """
    training = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            if kind_of(model.config).translates:
                yield _HalfLogits(model, windows, processes)
            else:
                yield _ModelLogits(model, windows.tokens, processes)
    finally:
        model.train(training)


def input_device(model: PreTrainedModel) -> torch.device:
    """Return the device of token ids: the embedding's, or where accelerate will move it."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    if place is not None:
        return torch.device(place)
    return next(embedding.parameters()).device


def head_gives_logits(model: PreTrainedModel, ids: Tensor) -> bool:
    """Return whether decoder plus output embedding equal the model, on the first tokens of `ids`.

    A model may cap or scale its logits after the head (Gemma 2, Granite, Cohere). The comparison
    is exact, as both sides are the same operations; a mismatch costs time, not correctness. `ids`
    is a window [length].
    """
    decoder, head = model.base_model, _head(model)
    if head is None or decoder is model:
        return False
    ids = ids[None, :PROBE]  # [1, n]
    hidden = getattr(decoder(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None:  # a wrapper such as PEFT's, whose base model includes the head
        return False
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.equal(head(hidden).float().cpu(), logits.float().cpu())


def logit_pieces(
    model: PreTrainedModel, ids: Tensor, *, head_only: bool, size: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield the logits at all positions of a window but the last, `size` positions at a time.

    Parameters
    ----------
    model : PreTrainedModel
    ids : Tensor, shape [length]
        Tokens of the window, on the device of the embedding.
    head_only : bool
        Whether the output embedding gives the logits, see `head_gives_logits`. The decoder is then
        run once, otherwise the whole model once for every piece; once in all, with all logits in
        memory, if it cannot select positions.
    size : int

    Yields
    ------
    start : int
        The first position of the piece.
    logits : Tensor, shape [n, vocabulary]
        With n at most `size`.
    """
    n_positions = len(ids) - 1
    if head_only:
        hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
        head = _head(model)
        for start in range(0, n_positions, size):
            yield start, head(hidden[start : start + size])
        return
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        for start in range(0, n_positions, size):
            yield start, logits[start : start + size]
        return
    for start in range(0, n_positions, size):
        keep = torch.arange(start, min(start + size, n_positions), device=ids.device)
        yield start, model(input_ids=ids[None], logits_to_keep=keep, use_cache=False).logits[0]


def _head(model: PreTrainedModel) -> Any:
    return cast(Any, model).get_output_embeddings()  # not annotated in transformers
