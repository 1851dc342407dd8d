"""Scores of one model, and the comparison of two models' scores, as JSON values."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrc.compressors.corpus.windows import Windows, evaluation_windows
from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.evaluate.harness import check_requests, run_tasks
from lrc.compressors.evaluate.perplexity import (
    HALVES,
    PROTOCOL,
    PerplexityResult,
    check_fit,
    check_window,
    perplexity,
)
from lrc.compressors.evaluate.task_metrics import ACCURACY, PERPLEXITY, task_metrics
from lrc.compressors.evaluate.task_scores import (
    accuracy_metric,
    evaluation_pairs,
    evaluation_sentences,
    perplexity_metric,
)
from lrc.compressors.io.machine import OnStep, no_progress
from lrc.compressors.models.model_kinds import kind_of
from lrc.configs.errors import DataError, LrcError, ProcessLost, RecipeError, Stopped
from lrc.configs.recipe import Evaluate, Perplexity

Scores = dict[str, Any]

SHARED = ("tokens", "window", "windows", "bos", "protocol", "text_sha256", "dtype")
"""Keys in which two perplexities must agree to be comparable."""


def unmeasured(evaluate: Evaluate) -> Scores:
    """Return the scores of a model of which nothing has been measured."""
    wanted = [f"perplexity.{spec.name}" for spec in evaluate.perplexity]
    wanted += [f"tasks.{name}" for name in evaluate.tasks.names]
    if evaluate.task is not None:
        own = [name for name in task_metrics(evaluate) if name in (ACCURACY, PERPLEXITY)]
        wanted += [f"tasks.{evaluate.task.name}.{name}" for name in own]
    return {"perplexity": {}, "tasks": {}, "missing": dict.fromkeys(wanted, "not measured yet")}


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluate: Evaluate,
    *,
    seed: int,
    on_step: OnStep = no_progress,
    scores: Scores | None = None,
    processes: Processes = ALONE,
) -> Scores:
    """Score one model on the texts and tasks of `evaluate`, or on those that `scores` lack.

    A text or task that fails costs no other. Returns JSON values only: ``{"perplexity": {NAME:
    {...}}, "tasks": {TASK: {METRIC: {...}}}, "missing": {"perplexity.NAME" or "tasks.TASK":
    REASON}}``. `seed` is for the tasks' few-shot examples and sampling. The `processes` divide the
    windows of texts; the first one runs the tasks.

    Raises
    ------
    RecipeError
        If a window or a task is impossible with this model.
    """
    for spec in evaluate.perplexity:  # before the first is measured
        check_window(model.config, spec.window)
    scores = deepcopy(scores) or unmeasured(evaluate)
    missing = scores["missing"]
    for spec in evaluate.perplexity:
        entry = partial(perplexity_entry, model, tokenizer, spec, on_step, processes)
        found = attempt(missing, f"perplexity.{spec.name}", entry, LrcError)
        scores["perplexity"] |= {spec.name: found} if found else {}
    for name in dict.fromkeys(evaluate.tasks.names if processes.first else []):
        one = evaluate.tasks.model_copy(update={"names": [name]})
        run = partial(run_tasks, model, tokenizer, one, seed=seed, on_step=on_step)
        # A task is a program of others: it may raise anything.
        scores["tasks"] |= attempt(missing, f"tasks.{name}", run, Exception)
    if evaluate.task is not None:
        name, metric, measure = evaluate.task.name, ACCURACY, accuracy_metric
        if evaluate.task.target is not None:
            metric, measure = PERPLEXITY, perplexity_metric
        entry = partial(measure, model, tokenizer, evaluate.task, on_step)
        found = attempt(missing, f"tasks.{name}.{metric}", entry, LrcError)
        scores["tasks"] |= {name: {metric: found}} if found else {}
    return scores


def attempt(
    missing: dict[str, str], key: str, measure: Callable[[], Scores], errors: type[Exception]
) -> Scores:
    """Measure what is missing; return nothing and note the reason in `missing` if that fails.

    Only `errors` are noted, and not those that would recur, such as a lack of memory.
    """
    if key not in missing:
        return {}
    try:
        found = measure()
    except (Stopped, ProcessLost, RecipeError, MemoryError, torch.OutOfMemoryError):
        raise
    except errors as error:
        kind = "" if isinstance(error, LrcError) else f"{type(error).__name__}: "
        missing[key] = kind + " ".join(str(error).split())[:500]
        return {}
    del missing[key]
    return found


def check_evaluation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluate: Evaluate,
    *,
    seed: int,
) -> None:
    """Refuse unavailable, too short or unsuitable texts and tasks before hours are spent.

    The model may be a skeleton without weights.
    """
    for spec in evaluate.perplexity:
        windows = evaluation_windows(spec, tokenizer)
        check_fit(model, windows.tokens, bos=windows.bos)
    if evaluate.task is not None:
        read = evaluation_sentences if evaluate.task.target is None else evaluation_pairs
        read(model, tokenizer, evaluate.task)
    check_requests(model, tokenizer, evaluate.tasks, seed=seed)


def perplexity_entry(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: Perplexity,
    on_step: OnStep,
    processes: Processes = ALONE,
) -> Scores:
    """Measure one perplexity, as `evaluate_model` returns it."""
    windows = evaluation_windows(spec, tokenizer)
    on_window = partial(on_step, f"perplexity {spec.name}")
    found = perplexity(model, windows, on_window=on_window, processes=processes)
    protocol = HALVES if kind_of(model.config).translates else PROTOCOL
    return perplexity_scores(found, windows, protocol)


def perplexity_scores(
    result: PerplexityResult, windows: Windows, protocol: str = PROTOCOL
) -> Scores:
    """Return a perplexity on windows as JSON values."""
    return asdict(result) | {"protocol": protocol, "text_sha256": windows.sha256}


def compare(dense: Scores | None, compressed: Scores, pair: Scores | None = None) -> Scores:
    """Compare the scores of two models from `evaluate_model`, in the shape of the report.

    `pair` are their scores from `evaluate_pair`.
    `ratio` is compressed / dense, `recovery` a percentage; both are None without a dense score.
    Raises `DataError` if the two were not scored on the same text, windows or documents, or not in
    the same precision.
    """
    dense = dense or {"perplexity": {}, "tasks": {}}
    pair = pair or {"kl": {}, "generations": {}, "similarity": {}}
    numbered = sorted(pair["generations"].items(), key=lambda item: int(item[0]))
    return {
        "perplexity": {
            name: _compare_perplexity(name, dense["perplexity"].get(name), entry)
            for name, entry in compressed["perplexity"].items()
        },
        "tasks": {
            task: {
                metric: _compare_metric(task, dense["tasks"].get(task, {}).get(metric), entry)
                for source in (compressed["tasks"], pair["similarity"])
                for metric, entry in source.get(task, {}).items()
            }
            for task in {**compressed["tasks"], **pair["similarity"]}
        },
        "kl": pair["kl"],
        "generations": [entry for _, entry in numbered],
    }


def list_missing(models: Mapping[str, Scores]) -> list[dict[str, str]]:
    """List what could not be measured of each model, in the shape of the report."""
    return [
        {"model": model, "metric": metric, "reason": reason}
        for model, scores in models.items()
        for metric, reason in scores["missing"].items()
    ]


def missing_sentences(missing: Iterable[Mapping[str, str]]) -> list[str]:
    """Return an error for each item of `list_missing`."""
    return [
        f"evaluation.{each['metric']} of the {each['model']} model: {each['reason']}; all else was"
        " measured, and the same command tries it again"
        for each in missing
    ]


def recovery(dense: float, compressed: float, higher_is_better: bool | None) -> float | None:
    """Return the percentage of the dense model's score that is kept.

    For errors and perplexities (lower is better) it is dense / compressed. None where a percentage
    is meaningless: no direction, a dense score of zero, or scores of different signs.

    >>> recovery(0.5, 0.45, True), recovery(20.0, 25.0, False)
    (90.0, 80.0)
    """
    if higher_is_better is None:
        return None
    part, whole = (compressed, dense) if higher_is_better else (dense, compressed)
    return 100 * (part / whole) if whole > 0 and part >= 0 else None


def _compare_perplexity(name: str, dense: Scores | None, compressed: Scores) -> Scores:
    check_same(f"perplexity.{name}", dense, compressed)
    value = dense and dense["perplexity"]
    return {
        "dense": value,
        "compressed": compressed["perplexity"],
        "ratio": value and compressed["perplexity"] / value,
        "stderr": {"dense": dense and dense["stderr"], "compressed": compressed["stderr"]},
        **{key: compressed[key] for key in SHARED},
    }


def _compare_metric(task: str, dense: Scores | None, compressed: Scores) -> Scores:
    check_same(f"tasks.{task}", dense, compressed, ("documents", "version"))
    value, stderr = (None, None) if dense is None else (dense["value"], dense["stderr"])
    better = compressed["higher_is_better"]
    return {
        "dense": value,
        "compressed": compressed["value"],
        "stderr": {"dense": stderr, "compressed": compressed["stderr"]},
        "recovery": None if value is None else recovery(value, compressed["value"], better),
        **{key: compressed[key] for key in ("higher_is_better", "documents", "version")},
    }


def check_same(
    where: str,
    other: Scores | None,
    compressed: Scores,
    keys: tuple[str, ...] = SHARED,
    *,
    what: str = "dense",
) -> None:
    """Raise `DataError` if two scores are not comparable; `other` may be None."""
    for key in keys:
        if other and other[key] != compressed[key]:
            raise DataError(
                f"evaluation.{where}: {what} and compressed were scored on different data or in"
                f" different precision ({key}: {other[key]!r} and {compressed[key]!r}); score both"
                " again"
            )
