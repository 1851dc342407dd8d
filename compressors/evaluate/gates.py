"""Gates: thresholds that the scores and the size of a compressed model must meet."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lrc.compressors.evaluate.harness import declared_metrics
from lrc.compressors.evaluate.score_text import four_digits
from lrc.compressors.evaluate.task_metrics import SIMILARITY, task_metrics
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Evaluate, Gate
from lrc.configs.size import apart_text, size_text, size_texts, size_words, unit_of

PREDICTIONS = {"kl": "forward", "agreement": "agreement"}
"""Kind of a metric that compares predictions of both models -> its key in the report."""
SIZE = "size"
WORDS = {"at_most": "at most", "at_least": "at least"}
NAMES = "perplexity.NAME, kl.NAME, agreement.NAME, tasks.NAME.METRIC or size"
Metrics = Mapping[str, Mapping[str, float | None]]
"""Name of a metric -> its value of the compressed and of the dense model, if it has one."""


@dataclass(frozen=True)
class GateResult:
    """A threshold and the value that was measured."""

    gate: str
    """As text."""
    value: float
    dense: float | None
    passed: bool
    sentence: str
    """Value and threshold."""


def check_gate_names(gates: Sequence[Gate], evaluate: Evaluate) -> None:
    """Refuse gates on metrics that will not be evaluated, before hours are spent.

    Members of task groups, and metrics computed in Python, are known only after the run;
    `check_gates` checks those.
    """
    problems = []
    for number, gate in enumerate(gates):
        where = f"evaluate.gates[{number}]"
        kind, _, name = gate.metric.partition(".")
        if kind == "perplexity":
            names = [f"perplexity.{spec.name}" for spec in evaluate.perplexity]
            if gate.metric not in names:
                problems.append(_unknown(where, gate.metric, names))
        elif kind in PREDICTIONS:
            problems += _prediction_problems(where, gate, kind, evaluate)
        elif kind == "tasks" and "." in name:
            problems += _task_problems(where, gate, evaluate)
        elif gate.metric != SIZE:
            problems.append(f"{where}.metric: must be {NAMES}, got '{gate.metric}'")
        if gate.relative and not evaluate.dense and kind not in (*PREDICTIONS, SIZE):
            problems.append(
                f"{where}.relative: compares with the dense model, but evaluate.dense is false;"
                " set it to true or drop relative"
            )
    if problems:
        raise RecipeError(problems)


def _prediction_problems(where: str, gate: Gate, kind: str, evaluate: Evaluate) -> list[str]:
    names = [f"{kind}.{spec.name}" for spec in evaluate.compared_texts]
    if evaluate.perplexity and not names:
        key, value = ("kl_tokens", "0") if evaluate.dense else ("dense", "false")
        return [
            f"{where}.metric: {gate.metric} compares the predictions of both models, but"
            f" evaluate.{key} is {value}; change it or remove the gate"
        ]
    if gate.metric not in names:
        return [_unknown(where, gate.metric, names)]
    if gate.relative:
        return [_already_compared(where, gate.metric)]
    return []


def _already_compared(where: str, metric: str) -> str:
    return f"{where}.relative: {metric} is a comparison with the dense model already; drop relative"


def _task_problems(where: str, gate: Gate, evaluate: Evaluate) -> list[str]:
    metric = gate.metric
    task, _, name = metric.removeprefix("tasks.").rpartition(".")
    if evaluate.task is not None:
        known = [f"tasks.{evaluate.task.name}.{each}" for each in task_metrics(evaluate)]
        if metric not in known:
            return [_unknown(where, metric, known)]
        return [_already_compared(where, metric)] if gate.relative and name == SIMILARITY else []
    declared = declared_metrics(evaluate.tasks, task)
    if declared is None or name.partition(",")[0] in declared:
        return []
    known = [
        f"tasks.{each}.{declared}"
        for each in evaluate.tasks.names
        for declared in declared_metrics(evaluate.tasks, each) or []
    ]
    return [_unknown(where, metric, known)]


def metrics_of(report: Mapping[str, Any]) -> Metrics:
    """Return everything that gates can be about of a report."""
    size = report["size"]["model"]["file_bytes"]
    return {**evaluation_metrics(report["evaluation"]), SIZE: size}


def evaluation_metrics(evaluation: Mapping[str, Any]) -> Metrics:
    """Return the metrics of an `evaluation` from `compare`."""
    return {
        **{f"perplexity.{name}": entry for name, entry in evaluation["perplexity"].items()},
        **{
            f"{kind}.{name}": {"compressed": entry[key], "dense": None}
            for kind, key in PREDICTIONS.items()
            for name, entry in evaluation.get("kl", {}).items()  # not of all versions
        },
        **{
            f"tasks.{task}.{metric}": entry
            for task, entries in evaluation["tasks"].items()
            for metric, entry in entries.items()
        },
    }


def check_gates(gates: Sequence[Gate], metrics: Metrics) -> list[GateResult]:
    """Compare metrics with every threshold of the gates.

    Raises
    ------
    RecipeError
        If a gate needs a metric or a dense score that was not measured.
    """
    problems: list[str] = []
    found: list[GateResult] = []
    for number, gate in enumerate(gates):
        entry = metrics.get(gate.metric)
        if entry is None:
            problems.append(_unknown(f"evaluate.gates[{number}]", gate.metric, metrics))
        elif gate.relative and entry["dense"] is None:
            problems.append(
                f"evaluate.gates[{number}].relative: the dense model was not scored on"
                f" {gate.metric}; set evaluate.dense: true or drop relative"
            )
        else:
            found += _compared(gate, entry)
    if problems:
        raise RecipeError(problems)
    return found


def _compared(gate: Gate, entry: Mapping[str, float | None]) -> Iterator[GateResult]:
    value, dense = entry["compressed"], entry["dense"]
    assert value is not None
    undefined = gate.relative and dense == 0
    if gate.relative and not undefined:
        assert dense is not None
        value = value / dense
    for key, words in WORDS.items():
        limit = getattr(gate, key)
        if limit is None:
            continue
        met = value <= limit if key == "at_most" else value >= limit  # not if it is NaN
        one = gate.model_copy(update=dict.fromkeys(WORDS) | {key: limit})
        got = _measured(gate, entry, limit)
        if undefined:
            sentence = f"{got}: a ratio to a dense score of 0 is not defined"
        else:
            ratio = f", compressed / dense {four_digits(value)}" if gate.relative else ""
            sentence = f"{got}{ratio}: must be {words} {gate.limit(limit)}"
        yield GateResult(str(one), value, dense, not undefined and met, sentence)


def _measured(gate: Gate, entry: Mapping[str, float | None], limit: float) -> str:
    """Return what was measured in words; sizes are in one unit, that of the limit if it has one."""
    value, dense = entry["compressed"], entry["dense"]
    assert value is not None
    both = [value] if dense is None else [value, dense]
    if gate.metric != SIZE:
        written = [four_digits(each) for each in both]
    elif gate.relative:
        written = size_texts(*both)
    else:
        unit = unit_of(size_words(limit))
        written = [apart_text(value, limit, unit), *(size_text(each, unit) for each in both[1:])]
    compared = "" if dense is None else f" (dense {written[1]})"
    return f"{gate.metric} is {written[0]}{compared}"


def _unknown(where: str, metric: str, known: Iterable[str]) -> str:
    known = list(known)
    close = get_close_matches(metric, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(known) or 'none'}"
    return f"{where}.metric: no evaluated metric is named '{metric}'; {hint}"
