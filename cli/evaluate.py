"""`lrc eval`: measure checkpoints, Hub models or GGUF files."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from lrc.compressors.checkpoint.reader import check_checkpoint, load_checkpoint, load_tokenizer
from lrc.compressors.corpus.documents import check_source
from lrc.compressors.evaluate.harness import check_tasks
from lrc.compressors.evaluate.scores import (
    check_evaluation,
    evaluate_model,
    list_missing,
    missing_sentences,
)
from lrc.compressors.evaluate.side_by_side import evaluate_pair, refuse_pair, unmeasured_pair
from lrc.compressors.io.machine import Machine
from lrc.compressors.models import source as models
from lrc.compressors.models.architecture import build
from lrc.compressors.models.configuration import check_code, refuse_adapter
from lrc.compressors.models.source_check import check_contents
from lrc.configs.errors import DataError, EvaluationIncomplete, ModelError, RecipeError
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
    machine: Machine,
    *,
    seed: int,
    trusted: bool = False,
) -> dict[str, Any]:
    """Measure every checkpoint; return checkpoint -> scores, and the warnings about it.

    The predictions of all but the first are compared with those of the first, if both have the same
    tokens.
    """

    def labelled(checkpoint: str, stage: str, done: int, total: int) -> None:
        machine.on_step(f"{checkpoint}: {stage}", done, total)

    with options_in_errors(), machine.current():
        for spec in request.perplexity:
            check_source(spec.source, part="evaluation")
        check_tasks(request.tasks)
        # Before one of them is measured for hours.
        warnings = {
            checkpoint: check_model(checkpoint, trusted=trusted) for checkpoint in checkpoints
        }
        for checkpoint, texts in warnings.items():
            for text in texts:
                machine.on_warning(f"{checkpoint}: {text}")
            check_evaluation(*load_skeleton(checkpoint, trusted=trusted), request, seed=seed)
        scores: dict[str, Any] = {}
        for checkpoint in checkpoints:
            model, tokenizer = load_model(checkpoint, machine.chosen, trusted=trusted)
            step = partial(labelled, checkpoint)
            found = evaluate_model(model, tokenizer, request, seed=seed, on_step=step)
            found |= {"warnings": warnings[checkpoint], "kl": {}}
            if scores and request.compared_texts:
                first = _First(checkpoints[0], machine.chosen, trusted)
                if first.has_vocabulary_of(model, tokenizer):
                    pair = evaluate_pair(
                        partial(first.beside, model),
                        tokenizer,
                        request,
                        unmeasured_pair(request),
                        on_step=step,
                    )
                    found["kl"] = pair["kl"]
                    found["missing"] |= pair["missing"]
                else:
                    text = f"has another vocabulary than {checkpoints[0]}; no KL divergence from it"
                    machine.on_warning(f"{checkpoint}: {text}")
                    found["warnings"].append(text)
            scores[checkpoint] = found
            del model
    return scores


@dataclass(frozen=True)
class _First:
    """The checkpoint with which the others are compared."""

    path: str
    device: str
    trusted: bool

    def has_vocabulary_of(self, model: Any, tokenizer: Any) -> bool:
        """Return whether its tokens are those of another checkpoint, which is in memory."""
        skeleton, own = load_skeleton(self.path, trusted=self.trusted)
        sizes = {each.config.get_text_config().vocab_size for each in (skeleton, model)}
        return len(sizes) == 1 and bool(own.get_vocab() == tokenizer.get_vocab())

    def beside(self, model: Any) -> tuple[Any, Any]:
        """Load it, and return it with another checkpoint."""
        skeleton, _ = load_skeleton(self.path, trusted=self.trusted)
        # On a CPU, models run in float32.
        refuse_pair(4 * sum(p.numel() for p in skeleton.parameters()), self.device)
        return load_model(self.path, self.device, trusted=self.trusted)[0], model


def raise_if_missing(blocks: dict[str, Any]) -> None:
    """Raise `EvaluationIncomplete` if something could not be measured."""
    if missing := list_missing(blocks):
        raise EvaluationIncomplete(missing_sentences(missing), blocks)


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


def check_model(path: str, *, trusted: bool = False) -> list[str]:
    """Refuse a folder, Hub id or GGUF file that cannot be loaded as it is; return warnings."""
    folder = Path(path)
    if folder.is_dir():
        config = check_checkpoint(folder).config
        refuse_adapter(folder)
        check_code(config, folder, trusted=trusted)
        if config.get("quantization_config"):
            return []  # has other tensors than the model in its config
    found = models.locate(Model(path=path, dtype="bfloat16", trust_remote_code=trusted))
    try:
        architecture = build(found)
    except ModelError:  # one that can be measured but not compressed
        return []
    _, _, warnings = check_contents(found, architecture)
    return [text.removeprefix("model.path: ") for text in warnings]


def load_skeleton(path: str, *, trusted: bool = False) -> tuple[Any, Any]:
    """Return the tokenizer and, in its original shapes, the model of `load_model` on meta."""
    folder = Path(path)
    if folder.is_dir():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    else:
        found = models.locate(Model(path=path, trust_remote_code=trusted))
        config, tokenizer = found.config, models.load_tokenizer(found)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    return model, tokenizer


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
