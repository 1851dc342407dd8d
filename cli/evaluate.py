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
from lrc.compressors.evaluate.gates import (
    PREDICTIONS,
    SIZE,
    GateResult,
    Metrics,
    check_gate_names,
    check_gates,
)
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
from lrc.compressors.models.model_kinds import kind_of, refuse_encoder
from lrc.compressors.models.source_check import check_contents
from lrc.configs.errors import DataError, EvaluationIncomplete, ModelError, RecipeError
from lrc.configs.recipe import Evaluate, Gate, Model

OPTIONS = {
    "evaluate.perplexity.source": "--perplexity",
    "evaluate.perplexity.window": "--window",
    "evaluate.tasks.names": "--tasks",
    "evaluate.tasks.include_path": "--include-path",
    "evaluate.gates": "--gate",
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
        _check_gates(request.gates, request, checkpoints)
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
            found["file_bytes"] = file_bytes(checkpoint)
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


def check_eval_gates(gates: list[Gate], blocks: dict[str, Any]) -> dict[str, list[GateResult]]:
    """Return the gates of every checkpoint but the first, or of the only one.

    If something could not be measured, none are returned: that is the error to report.
    """
    if list_missing(blocks):
        return {}
    first, *others = blocks
    dense = None if not others else blocks[first]
    return {
        name: check_gates(gates, _metrics(name, blocks[name], dense) if gates else {})
        for name in others or [first]
    }


def _metrics(name: str, block: dict[str, Any], dense: dict[str, Any] | None) -> Metrics:
    """Return the metrics of a checkpoint, and those of the first under the name ``dense``."""
    found = _values(block)
    known = {} if dense is None else _values(dense)
    metrics = {key: {"compressed": value, "dense": known.get(key)} for key, value in found.items()}
    for kind, key in PREDICTIONS.items():
        for text, entry in block["kl"].items():
            metrics[f"{kind}.{text}"] = {"compressed": entry[key], "dense": None}
    return metrics


def _values(block: dict[str, Any]) -> dict[str, float | None]:
    return {
        **{f"perplexity.{text}": each["perplexity"] for text, each in block["perplexity"].items()},
        **{
            f"tasks.{task}.{metric}": each["value"]
            for task, metrics in block["tasks"].items()
            for metric, each in metrics.items()
        },
        **({} if block["file_bytes"] is None else {SIZE: block["file_bytes"]}),
    }


def file_bytes(path: str) -> int | None:
    """Return the size of the weight files of a folder or a GGUF file; None of a Hub id."""
    place = Path(path).expanduser()
    files = [place] if place.is_file() else place.glob("*.safetensors")
    return sum(each.stat().st_size for each in files) if place.exists() else None


def _check_gates(gates: list[Gate], request: Evaluate, checkpoints: list[str]) -> None:
    """Refuse gates on what will not be measured."""
    check_gate_names(gates, request)
    compared = [g for g in gates if g.relative or g.metric.partition(".")[0] in PREDICTIONS]
    if compared and len(checkpoints) == 1:
        raise RecipeError(
            f"--gate: {compared[0]} compares with the first checkpoint, and there is only one; "
            "give the dense model before it"
        )
    for path in checkpoints:
        if any(gate.metric == SIZE for gate in gates) and file_bytes(path) is None:
            raise RecipeError(
                f"--gate: size is known of local files only, got the Hub id {path}; remove the "
                "gate, or give a folder"
            )


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
        contents = check_checkpoint(folder)
        config = contents.config
        refuse_adapter(folder)
        check_code(config, folder, trusted=trusted)
        refuse_encoder(contents.kind, path, "this command")
        if config.get("quantization_config"):
            return []  # has other tensors than the model in its config
    found = models.locate(Model(path=path, dtype="bfloat16", trust_remote_code=trusted))
    refuse_encoder(kind_of(found.config), path, "this command")
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
