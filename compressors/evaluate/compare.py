"""One model's scores, and two models' scores side by side: plain JSON values."""

from typing import TYPE_CHECKING, Any

from lrc.compressors.corpus import evaluation_windows
from lrc.compressors.evaluate.harness import TaskResult, run_tasks
from lrc.compressors.evaluate.perplexity import PROTOCOL, check_fit, check_window, perplexity
from lrc.compressors.io.machine import OnStep
from lrc.configs.errors import DataError
from lrc.configs.recipe import Evaluate, Perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Block = dict[str, Any]

SHARED = ("tokens", "window", "windows", "bos", "protocol", "text_sha256")
"""What two perplexities must have in common to be compared."""


def evaluate_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    evaluate: Evaluate,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> Block:
    """Score one model.

    Parameters
    ----------
    model, tokenizer : PreTrainedModel, PreTrainedTokenizerBase
    evaluate : Evaluate
        Gates and `dense` play no part here.
    seed : int
        Of the tasks' few-shot examples and sampling; a perplexity has no chance in it.
    on_step : callable, optional
        Called with (label, done, total) between windows and batches; may raise to stop.

    Returns
    -------
    dict
        ``{"perplexity": {NAME: {...}}, "tasks": {TASK: {METRIC: {...}}}}``, JSON values only.
    """
    for spec in evaluate.perplexity:  # before any of them runs
        check_window(model.config, spec.window)
    return {
        "perplexity": {
            spec.name: perplexity_entry(model, tokenizer, spec, on_step)
            for spec in evaluate.perplexity
        },
        "tasks": {
            task: _task_entry(result)
            for task, result in run_tasks(
                model, tokenizer, evaluate.tasks, seed=seed, on_step=on_step
            ).items()
        },
    }


def check_texts(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", evaluate: Evaluate
) -> None:
    """Refuse texts that cannot be had, are too short or not the model's, before hours are spent.

    The model may be a skeleton without weights.

    Raises
    ------
    RecipeError, DataError
    """
    for spec in evaluate.perplexity:
        windows = evaluation_windows(spec, tokenizer)
        check_fit(model, windows.tokens, bos=windows.bos)


def perplexity_entry(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    spec: Perplexity,
    on_step: OnStep | None,
) -> Block:
    """Measure one perplexity, as `evaluate_model` returns it."""
    windows = evaluation_windows(spec, tokenizer)

    def on_window(done: int, total: int) -> None:
        if on_step is not None:
            on_step(f"perplexity {spec.name}", done, total)

    result = perplexity(model, windows, on_window=on_window)
    return {
        "perplexity": result.perplexity,
        "nll_mean": result.nll_mean,
        "tokens": result.tokens,
        "window": result.window,
        "windows": result.windows,
        "bos": result.bos,
        "dtype": result.dtype,
        "protocol": PROTOCOL,
        "text_sha256": windows.sha256,
    }


def _task_entry(result: TaskResult) -> Block:
    return {
        metric: {
            "value": score.value,
            "stderr": score.stderr,
            "higher_is_better": score.higher_is_better,
            "documents": result.documents,
            "version": result.version,
        }
        for metric, score in result.metrics.items()
    }


def compare(dense: Block | None, compressed: Block) -> Block:
    """Set the scores of two models side by side, in the shape of the report.

    Parameters
    ----------
    dense : dict or None
        Of `evaluate_model`; None if the dense model was not scored.
    compressed : dict
        Of `evaluate_model`, on the same texts and tasks.

    Returns
    -------
    dict
        ``perplexity.NAME.{dense, compressed, ratio, tokens, window, windows, bos, dtype, protocol,
        text_sha256}`` and ``tasks.NAME.METRIC.{dense, compressed, stderr, recovery,
        higher_is_better, documents, version}``. `ratio` is compressed / dense, `recovery` a
        percentage; both are None without a dense score.

    Raises
    ------
    DataError
        If the two were not scored on the same text, windows or documents.
    """
    if dense is None:
        dense = {"perplexity": {}, "tasks": {}}
    return {
        "perplexity": {
            name: _compare_perplexity(name, dense["perplexity"].get(name), entry)
            for name, entry in compressed["perplexity"].items()
        },
        "tasks": {
            task: {
                metric: _compare_metric(task, dense["tasks"].get(task, {}).get(metric), entry)
                for metric, entry in metrics.items()
            }
            for task, metrics in compressed["tasks"].items()
        },
    }


def recovery(dense: float, compressed: float, higher_is_better: bool | None) -> float | None:
    """Say which percentage of the dense model's score is kept.

    For errors and perplexities (lower is better) it is dense / compressed. None where a percentage
    means nothing: no direction, a dense score of zero or of another sign.

    >>> recovery(0.5, 0.45, True), recovery(20.0, 25.0, False)
    (90.0, 80.0)
    """
    if higher_is_better is None:
        return None
    part, whole = (compressed, dense) if higher_is_better else (dense, compressed)
    return 100 * (part / whole) if whole > 0 and part >= 0 else None


def _compare_perplexity(name: str, dense: Block | None, compressed: Block) -> Block:
    check_same(f"perplexity.{name}", dense, compressed)
    value = None if dense is None else dense["perplexity"]
    return {
        "dense": value,
        "compressed": compressed["perplexity"],
        "ratio": None if value is None else compressed["perplexity"] / value,
        **{key: compressed[key] for key in (*SHARED, "dtype")},
    }


def _compare_metric(task: str, dense: Block | None, compressed: Block) -> Block:
    check_same(f"tasks.{task}", dense, compressed, ("documents", "version"))
    value = None if dense is None else dense["value"]
    better = compressed["higher_is_better"]
    return {
        "dense": value,
        "compressed": compressed["value"],
        "stderr": {
            "dense": None if dense is None else dense["stderr"],
            "compressed": compressed["stderr"],
        },
        "recovery": None if value is None else recovery(value, compressed["value"], better),
        "higher_is_better": better,
        "documents": compressed["documents"],
        "version": compressed["version"],
    }


def check_same(
    where: str,
    other: Block | None,
    compressed: Block,
    keys: tuple[str, ...] = SHARED,
    *,
    what: str = "dense",
) -> None:
    """Refuse to compare scores on different data; `other` is None if there are none.

    Raises
    ------
    DataError
    """
    for key in keys if other is not None else ():
        if other is not None and other[key] != compressed[key]:
            raise DataError(
                f"evaluation.{where}: {what} and compressed were scored on different data"
                f" ({key}: {other[key]!r} and {compressed[key]!r}); score both again"
            )
