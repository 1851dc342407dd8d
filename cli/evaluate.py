"""`lrc eval`: measure checkpoints, Hub models or GGUF files."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lrc.compressors.checkpoint.reader import (
    check_files,
    load_checkpoint,
    load_tokenizer,
    read_config,
)
from lrc.compressors.corpus.documents import check_source
from lrc.compressors.evaluate.harness import check_tasks
from lrc.compressors.evaluate.scores import evaluate_model
from lrc.compressors.io.machine import Machine, OnStep
from lrc.compressors.models import source as models
from lrc.compressors.models.configuration import check_code
from lrc.configs.errors import DataError, ModelError, RecipeError
from lrc.configs.recipe import Evaluate, Model

OPTIONS = {
    "evaluate.perplexity.source": "--perplexity",
    "evaluate.perplexity.window": "--window",
    "evaluate.tasks.names": "--tasks",
    "evaluate.tasks.include_path": "--include-path",
    "model.path: ": "",
    "set model.trust_remote_code: true": "add --trust-remote-code",
}


def run(
    checkpoints: list[str],
    request: Evaluate,
    *,
    seed: int,
    device: str,
    on_step: OnStep,
    trusted: bool = False,
) -> dict[str, Any]:
    """Measure every checkpoint; return checkpoint -> scores."""

    def labelled(checkpoint: str, stage: str, done: int, total: int) -> None:
        on_step(f"{checkpoint}: {stage}", done, total)

    with options_in_errors():
        for spec in request.perplexity:
            check_source(spec.source, part="evaluation")
        check_tasks(request.tasks)
        for checkpoint in checkpoints:  # before one of them is measured for hours
            check_model(checkpoint, trusted=trusted)
        chosen = Machine(device=device).chosen
        scores = {}
        for checkpoint in checkpoints:
            model, tokenizer = load_model(checkpoint, chosen, trusted=trusted)
            step = partial(labelled, checkpoint)
            scores[checkpoint] = evaluate_model(model, tokenizer, request, seed=seed, on_step=step)
            del model
    return scores


@contextmanager
def options_in_errors() -> Iterator[None]:
    """Replace the keys of a recipe in error messages by the options of the command."""

    def translate(text: str) -> str:
        for key, option in OPTIONS.items():
            text = text.replace(key, option)
        return text

    try:
        yield
    except RecipeError as error:
        raise RecipeError(
            [
                replace(p, where=translate(p.where), message=translate(p.message))
                for p in error.problems
            ]
        ) from error
    except (ModelError, DataError) as error:
        raise type(error)(translate(str(error)), code=error.code) from error


def check_model(path: str, *, trusted: bool = False) -> None:
    """Refuse a folder, Hub id or GGUF file that cannot be loaded."""
    if Path(path).is_dir():
        check_code(read_config(Path(path)), Path(path), trusted=trusted)
        check_files(Path(path))
    else:
        models.locate(Model(path=path, trust_remote_code=trusted))


def load_model(path: str, device: str, *, trusted: bool = False) -> tuple[Any, Any]:
    """Load model and tokenizer: a folder as it is stored, a Hub id or GGUF file as in a recipe."""
    dtype = torch.float32 if device == "cpu" else None
    load = partial(load_checkpoint, dtype=dtype, device=device, trust_remote_code=trusted)
    folder = Path(path)
    if folder.is_dir():
        return load(folder), load_tokenizer(folder, trust_remote_code=trusted)
    found = models.locate(Model(path=path, trust_remote_code=trusted))
    tokenizer = models.load_tokenizer(found)
    if found.gguf is None:
        return load(found.folder), tokenizer
    with tempfile.TemporaryDirectory() as converted:
        models.convert_gguf(found, Path(converted))
        return load(Path(converted)), tokenizer
