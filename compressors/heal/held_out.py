"""The text of a stage: windows to train on, and windows that are never trained on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.corpus.documents import SOURCES, read_documents
from lrc.compressors.corpus.excerpts import TextHash
from lrc.compressors.corpus.tokens import check_vocabulary, default_bos
from lrc.compressors.corpus.windows import calibration_text, with_bos
from lrc.compressors.heal.trained_files import text_file
from lrc.compressors.io.journal import Journal
from lrc.configs.errors import DataError, RecipeError
from lrc.configs.heal import Block, HealBase
from lrc.configs.recipe import Calibration, Perplexity

REPEATED = 2.0
"""Repetitions of a text from which on a warning is due; more than two or three overfit."""
TOKENS_PER_SECOND = {"cpu": 3_000, "cuda": 30_000}
"""How much text to read where time is limited: more than is trained on. An H200 trains a model of
135M parameters on about 30,000 tokens a second."""
SELF = "self"


@dataclass(frozen=True)
class TrainingText:
    """Disjoint windows of a text."""

    training: Tensor
    """[n_windows, length], int64."""
    held_out: Tensor
    """[n_held_out, length]; evenly spaced in the text."""
    facts: dict[str, Any]
    """Source, hash and number of tokens."""


@dataclass(frozen=True)
class TextRequest:
    """What text a stage needs."""

    where: str
    """Key path of the stage."""
    options: HealBase
    calibration: Calibration
    """That of the recipe."""
    stage: int
    seed: int
    device: str
    """Type of the device, such as ``cpu``."""

    @property
    def source(self) -> str:
        """Name or path of the text."""
        return self.options.source or self.calibration.source

    @property
    def key(self) -> str:
        """Key path of the source."""
        return "calibration.source" if self.options.source is None else f"{self.where}.source"

    @property
    def length(self) -> int:
        """Tokens per window, with BOS."""
        return self.options.length or self.calibration.length

    @property
    def wanted(self) -> int:
        """Number of different windows to train on, at most if time is limited."""
        options = self.options
        steps = options.number_of_steps(self.length)
        if steps is None:
            windows = math.ceil(options.seconds * TOKENS_PER_SECOND[self.device] / self.length)
        else:
            windows = steps * options.batch
        return min(windows, options.samples) if isinstance(options, Block) else windows

    @property
    def n_held_out(self) -> int:
        """Number of windows that are held out."""
        return max(1, self.options.held_out // self.length)


def check_evaluation_texts(request: TextRequest, texts: Sequence[Perplexity]) -> None:
    """Refuse to train on a text that the recipe measures perplexity on.

    The texts as a whole are compared, by their hash. Of a named source, training and evaluation use
    different parts.

    Raises
    ------
    RecipeError
    """
    files = [spec for spec in texts if spec.source not in SOURCES]
    if request.source in (*SOURCES, SELF) or not files:
        return
    calibration = request.calibration
    own = TextHash()
    for _ in own.reading(
        read_documents(
            request.source,
            part="calibration",
            field=calibration.field,
            chat=calibration.chat_template,
            key=request.key,
        )
    ):
        pass
    for spec in files:
        other = TextHash()
        for _ in other.reading(read_documents(spec.source, part="evaluation", field=spec.field)):
            pass
        if other.hexdigest() == own.hexdigest():
            raise RecipeError(
                f"{request.key}: must not be a text that the recipe is evaluated on, got "
                f"{request.source}, which is evaluate.perplexity {spec.name}; give another text"
            )


def training_text(
    request: TextRequest,
    tokenizer: Any,
    embedding: Any,
    journal: Journal,
    windows: Callable[[], Tensor],
) -> TrainingText:
    """Return the windows of a stage, which are read once per run.

    `windows` returns the calibration windows; those of the source ``self`` are used as they are.

    Raises
    ------
    DataError, RecipeError
        As `read_documents`, or if the text is too short.
    """
    piece = text_file(request.stage)
    if not journal.has(piece):
        if request.source == SELF:
            found, sha256, n_tokens = windows(), None, windows().numel()
        else:
            found, sha256, n_tokens = _read(request, tokenizer)
        check_vocabulary(found, embedding)
        training, held_out = split(found, request)
        facts = {
            "source": request.source,
            "text_sha256": sha256,
            "text_tokens": n_tokens,
            "training_tokens": training.numel(),
            "held_out_tokens": held_out.numel(),
        }
        tensors = {"training": training, "held_out": held_out}
        journal.write_tensors(piece, tensors, {"facts": facts})
    read = journal.read_tensors(piece, {"training": "training", "held_out": "held_out"})
    return TrainingText(read["training"], read["held_out"], journal.read_facts(piece)["facts"])


def _read(request: TextRequest, tokenizer: Any) -> tuple[Tensor, str, int]:
    """Return all disjoint windows of the text, its hash, and its number of tokens."""
    bos = default_bos(tokenizer)
    update = {
        "source": request.source,
        "samples": request.wanted + request.n_held_out,
        "length": request.length,
    }
    calibration = request.calibration.model_copy(update=update)
    text = calibration_text(calibration, tokenizer, key=request.key)
    width = request.length - (bos is not None)
    count = text.ids.numel() // max(1, width)
    windows = text.ids[: count * width].view(count, width)
    n_tokens = text.ids.numel()
    return windows if bos is None else with_bos(windows, bos), text.sha256, n_tokens


def split(windows: Tensor, request: TextRequest) -> tuple[Tensor, Tensor]:
    """Divide windows [n, length] into those to train on and those held out, evenly spaced.

    Of more than are wanted, random ones are used.

    Raises
    ------
    DataError
        If too few are left to train on.
    """
    n_windows, n_held_out = len(windows), request.n_held_out
    if n_windows <= n_held_out:
        most = (n_windows - 1) * request.length
        short = f"lower {request.where}.length or give more text under 'source'"
        raise DataError(
            f"{request.where}.held_out: must be less than the text, {n_windows} windows of "
            f"{request.length:,} tokens, got {request.options.held_out:,} tokens; "
            + (f"lower it to at most {most:,}, or give more text under 'source'" if most else short)
        )
    held_out = torch.arange(n_held_out) * n_windows // n_held_out
    others = torch.ones(n_windows, dtype=torch.bool)
    others[held_out] = False
    training = others.nonzero().flatten()
    if len(training) > request.wanted > 0:
        generator = torch.Generator().manual_seed(request.seed)
        chosen = torch.randperm(len(training), generator=generator)[: request.wanted]
        training = training[chosen.sort().values]
    return windows[training], windows[held_out]


def repetition_warning(
    request: TextRequest, text: TrainingText, steps: int | None = None
) -> str | None:
    """Return a warning if a text is repeated more than is good, or has fewer windows than wanted.

    If time is limited, this is known after the training, from the number of `steps`.
    """
    wanted = request.wanted
    if request.options.number_of_steps(request.length) is None and not isinstance(
        request.options, Block
    ):
        wanted = (steps or 0) * request.options.batch
    repeats = wanted / len(text.training)
    if repeats <= REPEATED:
        return None
    return (
        f"{request.where}: the text {request.source} has {text.training.numel():,} tokens to train "
        f"on and is repeated {repeats:.1f} times, which may overfit; give more text under "
        "'source', or lower the budget"
    )
