"""The text of a stage: windows to train on, and windows that are never trained on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lrc.compressors.calibrate.calibration_windows import SELF
from lrc.compressors.corpus.tokens import check_vocabulary, default_bos
from lrc.compressors.corpus.windows import calibration_text, with_bos
from lrc.compressors.heal.text_request import TextRequest
from lrc.compressors.heal.trained_files import text_folder
from lrc.compressors.io.journal import Journal
from lrc.configs.errors import DataError
from lrc.configs.heal import LogitFit
from lrc.configs.sources import described

REPEATED = 2.0
"""Repetitions of a text from which on a warning is due; more than two or three overfit."""


@dataclass(frozen=True)
class TrainingText:
    """Disjoint windows of a text."""

    training: Tensor
    """[n_windows, length], int64."""
    held_out: Tensor
    """[n_held_out, length]; evenly spaced in the text."""
    facts: dict[str, Any]
    """Source, hash and number of tokens."""
    training_counted: Tensor | None = None
    """[n_windows, length], bool: the positions that predict a token that counts in the loss; all if
    None."""
    held_out_counted: Tensor | None = None
    """[n_held_out, length]."""

    def weights(self, rows: Tensor) -> Tensor:
        """Return the weights [n, length] of positions of training windows, whose sum is one.

        They are all zero if none of the positions counts.
        """
        if self.training_counted is None:
            shape = len(rows), self.training.shape[1]
            return torch.full(shape, 1 / (shape[0] * shape[1]))
        counted = self.training_counted[rows].float()
        return counted / counted.sum().clamp_min(1)


def training_text(
    request: TextRequest,
    tokenizer: Any,
    embedding: Any,
    journal: Journal,
    sample: Callable[[int, int], Tensor],
) -> TrainingText:
    """Return the windows of one source of a stage, which are read once per run.

    `sample` returns windows of the source ``self`` by their number and length.

    Raises
    ------
    DataError, RecipeError
        As `read_documents`, or if the text is too short.
    """
    piece = f"{text_folder(request.stage)}/{request.number}.safetensors"
    names = ["training", "held_out"]
    if request.source != SELF and request.calibration.loss == "answers":
        names += ["training_counted", "held_out_counted"]
    if not journal.has(piece):
        if request.source == SELF:
            found, counted, sha256 = sample(request.available, request.length), None, None
            n_tokens = found.numel()
        else:
            found, counted, sha256, n_tokens = _read(request, tokenizer)
        training, held_out = split(found, request)
        check_vocabulary(found, embedding)
        facts: dict[str, Any] = {
            "source": request.source,
            "text_sha256": sha256,
            "text_tokens": n_tokens,
            "training_tokens": training.numel(),
            "held_out_tokens": held_out.numel(),
        }
        tensors = [training, held_out]
        if counted is not None:
            masks = split(counted, request)
            _check_counted(*masks, request)
            tensors += masks
            facts["loss_tokens"] = int(masks[0].sum())
        journal.write_tensors(piece, dict(zip(names, tensors, strict=True)), {"facts": facts})
    read = journal.read_tensors(piece, {name: name for name in names})
    return TrainingText(**read, facts=journal.read_facts(piece)["facts"])


def _check_counted(training: Tensor, held_out: Tensor, request: TextRequest) -> None:
    """Refuse a text without answers to train on or to measure."""
    for name, counted in {"training": training, "held-out": held_out}.items():
        if counted.numel() and not bool(counted.any()):
            raise DataError(
                f"{request.where}: calibration.loss: answers needs an assistant's message in the "
                f"{name} windows of {request.source}, got none in {len(counted)}; give other or "
                "more conversations, change 'held_out', or set loss: all"
            )


def mixed(requests: Sequence[TextRequest], texts: Sequence[TrainingText]) -> TrainingText:
    """Return the text of a stage from those of its sources.

    Windows of a source that has too few are repeated, so that fractions are as requested. Held-out
    windows of all sources are spread evenly: a method may use only the first of them.
    """
    if len(texts) == 1:
        return texts[0]
    rows = [
        torch.arange(request.wanted) % len(text.training)
        for request, text in zip(requests, texts, strict=True)
    ]
    training = [text.training[each] for text, each in zip(texts, rows, strict=True)]
    places = [torch.arange(len(text.held_out)).add(0.5) / len(text.held_out) for text in texts]
    order = torch.cat(places).argsort(stable=True)
    held_out = torch.cat([text.held_out for text in texts])[order]
    keys = ("text_tokens", "training_tokens", "held_out_tokens")
    facts = {
        "source": described({request.source: request.fraction for request in requests}),
        "text_sha256": None,
        **{key: sum(text.facts[key] for text in texts) for key in keys},
        "texts": [text.facts for text in texts],
    }
    counted: tuple[Tensor, ...] = ()
    if any(text.training_counted is not None for text in texts):
        masks = [
            (
                everywhere(text.training, text.training_counted)[each],
                everywhere(text.held_out, text.held_out_counted),
            )
            for text, each in zip(texts, rows, strict=True)
        ]
        trained, measured = (torch.cat(each) for each in zip(*masks, strict=True))
        counted = trained, measured[order]
    return TrainingText(torch.cat(training), held_out, facts, *counted)


def everywhere(windows: Tensor, counted: Tensor | None) -> Tensor:
    """Return which positions of windows [n, length] count; all of them if that is None."""
    return torch.ones_like(windows, dtype=torch.bool) if counted is None else counted


def _read(request: TextRequest, tokenizer: Any) -> tuple[Tensor, Tensor | None, str, int]:
    """Return the disjoint windows of a text, the positions that count, its hash and its length."""
    bos = default_bos(tokenizer)
    calibration = request.calibration.of(request.source, request.available)
    calibration = calibration.model_copy(update={"length": request.length})
    text = calibration_text(calibration, tokenizer, key=request.key)
    width = request.length - (bos is not None)
    count = text.ids.numel() // max(1, width)
    windows = text.ids[: count * width].view(count, width)
    counted = text.counted
    if counted is not None:
        counted = counted[: count * width].view(count, width)
        # A position counts if the token after it does; with BOS all tokens are after a position.
        counted = counted[:, 1:] if bos is None else counted
        counted = pad(counted, (0, 1), value=False)
    windows = windows if bos is None else with_bos(windows, bos)
    return windows, counted, text.sha256, text.ids.numel()


def split(windows: Tensor, request: TextRequest) -> tuple[Tensor, Tensor]:
    """Divide windows [n, length] into those to train on and those held out, evenly spaced.

    Of more than are wanted, random ones are used.

    Raises
    ------
    DataError
        If too few are left to train on.
    """
    check_held_out(len(windows), request)
    n_windows, n_held_out = len(windows), request.n_held_out
    held_out = torch.arange(n_held_out) * n_windows // n_held_out
    others = torch.ones(n_windows, dtype=torch.bool)
    others[held_out] = False
    training = others.nonzero().flatten()
    if len(training) > request.wanted > 0:
        generator = torch.Generator().manual_seed(request.seed)
        chosen = torch.randperm(len(training), generator=generator)[: request.wanted]
        training = training[chosen.sort().values]
    return windows[training], windows[held_out]


def check_held_out(n_windows: int, request: TextRequest) -> None:
    """Refuse a text whose windows are all held out.

    Raises
    ------
    DataError
    """
    if n_windows > request.n_held_out:
        return
    most = int((n_windows - 1) * request.length / request.fraction)
    what = "calibration.samples" if request.source == SELF else "'source'"
    more = f"{'raise' if request.source == SELF else 'give more text under'} {what}"
    short = f"lower {request.where}.length or {more}"
    raise DataError(
        f"{request.where}.held_out: must be less than the text, {n_windows} windows of "
        f"{request.length:,} tokens of {request.source}, got {request.options.held_out:,} tokens; "
        + (f"lower it to at most {most:,}, or {more}" if most > 0 else short)
    )


def repetition_warning(
    request: TextRequest, text: TrainingText, steps: int | None = None
) -> str | None:
    """Return a warning if a text is repeated more than is good.

    The number of `steps` is that which was made; if it is not known yet, there is no warning.
    """
    options = request.options
    can_extend = isinstance(options, LogitFit) and options.minutes is None
    if steps is None or (isinstance(options, LogitFit) and options.extend):
        return None
    repeats = request.used(steps) / (text.facts["training_tokens"] / request.length)
    if repeats <= REPEATED:
        return None
    more = "raise calibration.samples" if request.source == SELF else "give more text"
    return (
        f"{request.where}: the text {request.source} has {text.facts['training_tokens']:,} tokens "
        f"to train on and is repeated {repeats:.1f} times, which may overfit; {more}, "
        + ("set extend: true, " if can_extend else "")
        + "or lower the budget"
    )
