"""`lrc eval`: measure checkpoints, Hub models or GGUF files."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from lrc.cli.option_names import options_in_errors, without_keys
from lrc.cli.streamed_eval import StreamedScores, stream
from lrc.cli.whole_models import Skeleton, WholeModel, file_bytes, load_skeleton
from lrc.compressors.checkpoint.reader import check_checkpoint
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
    list_missing,
    missing_sentences,
)
from lrc.compressors.evaluate.streaming_rule import ModelBytes, streams
from lrc.compressors.io.machine import Machine, free_memory
from lrc.compressors.models import source as models
from lrc.compressors.models.architecture import build
from lrc.compressors.models.configuration import check_code, refuse_adapter
from lrc.compressors.models.model_kinds import (
    ModelKind,
    kind_of,
    refuse_encoder,
    refuse_encoder_decoder,
)
from lrc.compressors.models.source_check import check_contents
from lrc.configs.errors import EvaluationIncomplete, ModelError, UsageError
from lrc.configs.recipe import Evaluate, Gate, Model


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
        check = partial(check_model, trusted=trusted, tasks=bool(request.tasks.names))
        # What takes longest comes last: the import of lm-eval seconds, a download minutes, and a
        # measurement hours.
        remote = {each for each in checkpoints if models.is_on_hub(each)}
        warnings = {each: check(each) for each in checkpoints if each not in remote}
        check_tasks(request.tasks)
        _check_gates(request.gates, request, checkpoints)
        warnings |= {each: check(each) for each in checkpoints if each in remote}
        skeletons = {}
        for checkpoint in checkpoints:
            found = warnings[checkpoint]
            for text in found:
                machine.on_warning(f"{checkpoint}: {text}")
            skeleton = load_skeleton(checkpoint, found, trusted=trusted)
            check_evaluation(skeleton.model, skeleton.tokenizer, request, seed=seed)
            skeletons[checkpoint] = skeleton
        first, *others = skeletons.values()
        comparable = [each.path for each in others if each.has_vocabulary_of(first)]
        for each in others:
            if request.compared_texts and each.path not in comparable:
                text = f"has another vocabulary than {first.path}; no KL divergence from it"
                machine.on_warning(f"{each.path}: {text}")
                each.warnings.append(text)
        streamed = _streamed(skeletons, comparable, request, machine, trusted=trusted)
        scores: dict[str, Any] = {}
        for checkpoint, skeleton in skeletons.items():
            step = partial(labelled, checkpoint)
            whole = WholeModel(skeleton, first, request, machine.chosen, seed, trusted, step)
            if streamed is not None:
                block = whole.add_tasks(streamed.models[checkpoint])
                pair = streamed.pairs.get(checkpoint)
            else:
                block, pair = whole.measure(compare=checkpoint in comparable)
            block |= {"warnings": skeleton.warnings, "kl": pair["kl"] if pair else {}}
            block["file_bytes"] = file_bytes(checkpoint)
            missing = block["missing"] | (pair["missing"] if pair else {})
            block["missing"] = {name: without_keys(why) for name, why in missing.items()}
            scores[checkpoint] = block
    return scores


def _streamed(
    skeletons: dict[str, Skeleton],
    comparable: list[str],
    request: Evaluate,
    machine: Machine,
    *,
    trusted: bool,
) -> StreamedScores | None:
    """Measure layer by layer all but tasks, if the option or the memory requires it."""
    translating = [
        name for name, each in skeletons.items() if kind_of(each.model.config).translates
    ]
    if translating:
        if request.streaming == "always":
            raise UsageError(
                f"--streaming: always is for decoder-only models, got {translating[0]}, an "
                "encoder-decoder model; leave it out"
            )
        return None
    first, *others = (each.bytes_on(machine.chosen) for each in skeletons.values())
    sizes = ModelBytes(first, max(others)) if others else ModelBytes(0, first)
    if not streams(request, sizes, free_memory(machine.chosen)):
        return None
    tokenizers = {name: each.tokenizer for name, each in skeletons.items()}
    with tempfile.TemporaryDirectory() as scratch:
        return stream(tokenizers, comparable, request, machine, Path(scratch), trusted=trusted)


def check_eval_gates(gates: list[Gate], blocks: dict[str, Any]) -> dict[str, list[GateResult]]:
    """Return the gates of every checkpoint but the first, or of the only one.

    If something could not be measured, none are returned: that is the error to report.
    """
    if list_missing(blocks):
        return {}
    first, *others = blocks
    dense = None if not others else blocks[first]
    with options_in_errors():
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


def _check_gates(gates: list[Gate], request: Evaluate, checkpoints: list[str]) -> None:
    """Refuse gates on what will not be measured."""
    check_gate_names(gates, request)
    compared = [g for g in gates if g.relative or g.metric.partition(".")[0] in PREDICTIONS]
    if compared and len(checkpoints) == 1:
        raise UsageError(
            f"--gate: {compared[0]} compares with the first checkpoint, and there is only one; "
            "give the dense model before it"
        )
    for path in checkpoints:
        if any(gate.metric == SIZE for gate in gates) and file_bytes(path) is None:
            raise UsageError(
                f"--gate: size is known of local files only, got the Hub id {path}; remove the "
                "gate, or give a folder"
            )


def raise_if_missing(blocks: dict[str, Any]) -> None:
    """Raise `EvaluationIncomplete` if something could not be measured."""
    if missing := list_missing(blocks):
        raise EvaluationIncomplete(missing_sentences(missing), blocks)


def check_model(path: str, *, trusted: bool = False, tasks: bool = False) -> list[str]:
    """Refuse a folder, Hub id or GGUF file that cannot be loaded as it is; return warnings.

    With `tasks`, models that lm-eval tasks cannot score are refused too.
    """
    folder = Path(path)
    if folder.is_dir():
        contents = check_checkpoint(folder)
        config = contents.config
        refuse_adapter(folder)
        check_code(config, folder, trusted=trusted)
        _refuse_kind(contents.kind, path, tasks=tasks)
        if config.get("quantization_config"):
            return []  # has other tensors than the model in its config
    found = models.locate(Model(path=path, dtype="bfloat16", trust_remote_code=trusted))
    _refuse_kind(kind_of(found.config), path, tasks=tasks)
    try:
        architecture = build(found)
    except ModelError:  # one that can be measured but not compressed
        return []
    _, _, warnings = check_contents(found, architecture)
    return [without_keys(text) for text in warnings]


def _refuse_kind(kind: ModelKind, path: str, *, tasks: bool) -> None:
    refuse_encoder(kind, path, "this command")
    if tasks:
        refuse_encoder_decoder(kind, path, "--tasks", "leave --tasks out, and give --perplexity")
