"""How closely two models predict the same: KL divergence and top-1 agreement.

The logits of both exist for a few positions at a time.
"""

from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.compressors.corpus.windows import Windows
from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.evaluate.logits import LogitReader, model_logits
from lrc.compressors.evaluate.perplexity import check_fit
from lrc.compressors.io.finite import all_finite
from lrc.configs.errors import ModelError

PIECE_LOGITS = 2**24
"""Logits of each model that exist at once. In float32 64 MiB; seven tensors of this size exist
while two pieces are compared."""
RANGES = (1 / 64, 1 / 16, 1 / 4, 1)
"""Ends of the ranges of positions, as fractions of the window."""


@dataclass(frozen=True)
class Measures:
    """Means over positions."""

    forward: float
    """KL divergence of the compressed model from the dense one, ``KL(dense || compressed)``, nats
    per token."""
    reverse: float
    """``KL(compressed || dense)``, nats per token."""
    agreement: float
    """Fraction of positions with the same most likely token."""


@dataclass(frozen=True)
class RangeAgreement:
    """The measures for predictions from some numbers of tokens."""

    context: tuple[int, int]
    """Smallest and largest number of tokens that the predictions see, BOS included."""
    mean: Measures
    stderr: Measures | None


@dataclass(frozen=True)
class Agreement:
    """How closely two models predict the same, and how it was measured."""

    mean: Measures
    stderr: Measures | None
    """Standard errors of the means, from the differences between windows; None for one window."""
    positions: tuple[RangeAgreement, ...]
    """The same by position in the window."""
    tokens: int
    """Predicted tokens, as of the perplexity of the same windows."""
    window: int
    """Text tokens per window, without BOS."""
    windows: int
    bos: bool
    dtype: str
    """Precision of the dense model's weights; the measures are computed in float32 at least."""


def log_probabilities(logits: Tensor) -> Tensor:
    """Return log-probabilities [n, vocabulary] of logits, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ``sum p (log p - log q)`` [n] of log-probabilities [n, vocabulary], in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def compare_predictions(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    windows: Windows,
    *,
    on_window: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes = ALONE,
) -> Agreement:
    """Compare the predictions of two models at every position of windows that has a next token.

    The models must have the same vocabulary. Their mode (train or eval) is restored. `on_window`
    is called with (done, total) and may raise to stop. The `processes` divide the windows, and each
    has both models.

    Raises
    ------
    RecipeError, DataError
        If the windows do not fit one of the models, as in `perplexity`.
    ModelError
        If a divergence is not finite.
    """
    for model in (dense, compressed):
        check_fit(model, windows.tokens, bos=windows.bos)
    with (
        model_logits(dense, windows, processes) as expected,
        model_logits(compressed, windows, processes) as found,
    ):
        return agreement_of(expected, found, windows, on_window=on_window)


def agreement_of(
    dense: LogitReader,
    compressed: LogitReader,
    windows: Windows,
    *,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Agreement:
    """Compare predictions from the logits of two models; raises as `compare_predictions`."""
    count, length = windows.tokens.shape
    own, measured = dense.own(count), dict[int, Tensor]()
    for done, number in enumerate(own, start=1):
        pieces = [found for _, found in _compare_window(dense, compressed, number)]
        measured[number] = torch.cat(pieces, dim=1)  # [3, n_predicted]
        on_window(done, len(own))
    everywhere = ChainMap(*dense.processes.gather(measured))
    values = torch.stack([everywhere[number] for number in range(count)])
    for number in range(count):
        if not all_finite(values[number]):
            raise ModelError(
                f"the divergence on window {number + 1} of {count} is not finite, because the"
                " logits of a model are not; compress less, or evaluate in bfloat16 or float32"
                " where float16 overflows"
            )
    mean, stderr = _statistics(values)
    first = dense.first(length)
    predicted = length - 1 - first
    return Agreement(
        mean=mean,
        stderr=stderr,
        positions=tuple(
            RangeAgreement(
                (first + start + 1, first + stop), *_statistics(values[:, :, start:stop])
            )
            for start, stop in _ranges(predicted)
        ),
        tokens=count * predicted,
        window=length - windows.bos,
        windows=count,
        bos=windows.bos,
        dtype=str(dense.dtype).removeprefix("torch."),
    )


def _compare_window(
    dense: LogitReader, compressed: LogitReader, number: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield the first position of every piece, and the three measures [3, n] at its positions."""
    size = max(1, PIECE_LOGITS // dense.vocabulary)
    pieces = (reader.pieces(number, size) for reader in (dense, compressed))
    for (start, expected), (_, found) in zip(*pieces, strict=True):
        log_p = log_probabilities(expected)
        log_q = log_probabilities(found.to(expected.device))
        measures = (
            kl_divergence(log_p, log_q),
            kl_divergence(log_q, log_p),
            log_p.argmax(-1) == log_q.argmax(-1),
        )
        yield start, torch.stack([each.double() for each in measures]).cpu()


def _ranges(n_positions: int) -> list[tuple[int, int]]:
    """Cut positions into ranges that grow by the same factor; short windows have fewer."""
    ends = sorted({0, *(ceil(fraction * n_positions) for fraction in RANGES)})
    return list(pairwise(ends))


def _statistics(values: Tensor) -> tuple[Measures, Measures | None]:
    """Return means and standard errors of measures [n_windows, 3, n_positions].

    Positions of one window depend on each other, windows do not: the error is that of the mean of
    independent windows.
    """
    by_window = values.mean(-1)  # [n_windows, 3]
    mean = Measures(*by_window.mean(0).tolist())
    count = len(by_window)
    if count == 1:
        return mean, None
    return mean, Measures(*(by_window.std(0) / count**0.5).tolist())
