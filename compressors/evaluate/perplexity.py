"""Perplexity per token, as the compression papers define it.

The text is tokenized once and cut into disjoint windows (`lrc.compressors.corpus`); the mean is
taken over every predicted token of all of them. lm-eval's `word_perplexity` is another quantity.
"""

import math
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from lrc.compressors.corpus.tokens import check_vocabulary
from lrc.compressors.corpus.windows import Windows
from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.evaluate.logits import LogitReader, model_logits
from lrc.compressors.models.model_kinds import ModelKind, kind_of
from lrc.configs.errors import ModelError, RecipeError

PROTOCOL = (
    "documents joined by a blank line, tokenized once, disjoint windows, "
    "exp of the mean negative log-likelihood of every predicted token"
)
HALVES = (
    "documents joined by a blank line, tokenized once, disjoint windows, the first half of each "
    "read by the encoder, exp of the mean negative log-likelihood of every token of the second half"
)
"""The protocol of encoder-decoder models."""
SHORTEST = 4
"""Tokens of the shortest window of which both halves have some."""
PIECE = 256  # positions whose logits exist at once; 256 x 262,144 in fp32 are 0.25 GiB
FALLBACK_LOGITS = 2**28  # if the decoder must run again for each piece: 1 GiB in fp32


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured."""

    perplexity: float
    nll_mean: float
    """Mean negative log-likelihood, nats a token."""
    stderr: float | None
    """Standard error of the perplexity, from the differences between windows: that of the mean,
    times the perplexity (first order). None for one window."""
    tokens: int
    """Predicted tokens: `windows * window` with BOS, `windows * (window - 1)` without; half of
    these with an encoder-decoder model."""
    window: int
    """Text tokens per window, without BOS."""
    windows: int
    bos: bool
    dtype: str
    """Precision of the model's weights; the softmax is taken in float32, the mean in float64."""


def perplexity(
    model: PreTrainedModel,
    windows: Windows | Tensor,
    *,
    on_window: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes = ALONE,
) -> PerplexityResult:
    """Measure the perplexity of a language model on windows [n, length], int64.

    An encoder-decoder model reads the first half of a window, and predicts the second.

    Logits are taken in pieces, so a vocabulary of 262,144 costs megabytes, not gigabytes. The model
    may be on any device or several; its mode (train or eval) is restored. Windows that are a plain
    tensor have no BOS token. `on_window` is called with (done, total) and may raise to stop. The
    `processes` divide the windows, and each has the model.

    Raises
    ------
    RecipeError
        If a window is longer than the model's context, or too short to predict anything.
    DataError
        If the model has no embedding for a token.
    ModelError
        If the likelihood of a window is not finite. No window is left out.
    """
    if isinstance(windows, Tensor):
        windows = Windows(windows, "", None, bos=False, text_tokens=windows.numel())
    check_fit(model, windows.tokens, bos=windows.bos)
    with model_logits(model, windows, processes) as reader:
        return perplexity_of(reader, windows, on_window=on_window)


def perplexity_of(
    reader: LogitReader,
    windows: Windows,
    *,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> PerplexityResult:
    """Measure the perplexity of a model from its logits on the windows; raises as `perplexity`."""
    count, length = windows.tokens.shape
    own, measured = reader.own(count), dict[int, float]()
    for done, number in enumerate(own, start=1):
        measured[number] = _window_nll(reader, number, windows.tokens[number])
        on_window(done, len(own))
    everywhere = ChainMap(*reader.processes.gather(measured))
    likelihoods = [everywhere[number] for number in range(count)]
    for number, nll in enumerate(likelihoods):
        if not math.isfinite(nll):
            raise ModelError(
                f"perplexity: the likelihood of window {number + 1} of {count} is {nll}: the"
                " model's logits are not finite; compress less, or evaluate in bfloat16"
                " or float32 where float16 overflows"
            )
    predicted = length - 1 - reader.first(length)
    mean = math.fsum(likelihoods) / (count * predicted)
    if mean > math.log(torch.finfo(torch.float64).max):
        raise ModelError(
            f"perplexity: the mean negative log-likelihood is {mean:.1f} nats a token, its"
            " exponential overflows; compress less"
        )
    return PerplexityResult(
        perplexity=math.exp(mean),
        nll_mean=mean,
        stderr=_error_of_mean(likelihoods, predicted) * math.exp(mean) if count > 1 else None,
        tokens=count * predicted,
        window=length - windows.bos,
        windows=count,
        bos=windows.bos,
        dtype=str(reader.dtype).removeprefix("torch."),
    )


def _error_of_mean(likelihoods: list[float], predicted: int) -> float:
    """Return the standard error of the mean per token over windows of as many tokens."""
    by_window = torch.tensor(likelihoods, dtype=torch.float64) / predicted
    return float(by_window.std()) / math.sqrt(len(likelihoods))


def check_window(config: Any, window: int, key: str = "evaluate.perplexity.window") -> None:
    """Refuse windows that are longer than the model's context; `key` is that of the recipe."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(context, int) and window > context:
        raise RecipeError(
            f"{key}: must be at most {context:,}, the model's context, got {window:,}; lower"
            f" {key.rpartition('.')[2]}"
        )


def check_halves(kind: ModelKind, window: int, key: str = "evaluate.perplexity.window") -> None:
    """Refuse windows whose halves are too short; `key` is that of the recipe."""
    if kind.translates and window < SHORTEST:
        raise RecipeError(
            f"{key}: must be at least {SHORTEST} for an encoder-decoder model, which reads the "
            f"first half and predicts the second, got {window}; raise it"
        )


def check_fit(model: PreTrainedModel, tokens: Tensor, *, bos: bool) -> None:
    """Refuse windows [n, length] that a model, possibly without weights, cannot process.

    If `bos`, they start with a BOS token.
    """
    length = tokens.shape[1]
    check_window(model.config, length - bos)
    check_halves(kind_of(model.config), length - bos)
    if length < 2:
        raise RecipeError(
            "evaluate.perplexity.window: must be at least 2 to predict a token, got 1; raise it"
        )
    context = _learned_positions(model)
    if context is not None and length > context:
        raise RecipeError(
            f"evaluate.perplexity.window: must be at most {context - 1:,}, the model has"
            f" learned {context:,} positions and every window starts with a BOS token, got"
            f" {length - bos:,}; lower window"
        )
    check_vocabulary(tokens, model.get_input_embeddings())


def _learned_positions(model: PreTrainedModel) -> int | None:
    """Return the size of a learned position embedding; None if there is none."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    if isinstance(context, int) and any(
        # OPT's table has two rows more
        isinstance(module, Embedding) and context <= module.num_embeddings <= context + 2
        for module in model.modules()
        if module is not words
    ):
        return context
    return None


def _window_nll(reader: LogitReader, number: int, ids: Tensor) -> float:
    """Sum the negative log-likelihood of tokens 1, 2, ... of a window given those before."""
    size = PIECE
    if reader.repeats:
        size = max(PIECE, FALLBACK_LOGITS // reader.vocabulary)
    total = 0.0
    for start, logits in reader.pieces(number, size):
        target = ids[start + 1 : start + 1 + len(logits)].to(logits.device)
        nll = cross_entropy(logits.float(), target, reduction="none")  # [k]
        total += float(nll.double().sum())
    return total
