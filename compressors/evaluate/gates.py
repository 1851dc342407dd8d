"""Quality gates: thresholds that the scores of a compressed model must meet."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from lrc.compressors.evaluate.harness import declared_metrics
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Evaluate, Gate

PREDICTIONS = {"kl": "forward", "agreement": "agreement"}
"""Kind of a metric that compares predictions of both models -> its key in the report."""


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
            problems += _task_problems(where, gate.metric, evaluate)
        else:
            problems.append(
                f"{where}.metric: must be perplexity.NAME, kl.NAME, agreement.NAME or"
                f" tasks.NAME.METRIC, got '{gate.metric}'"
            )
        if gate.relative and not evaluate.dense and kind not in PREDICTIONS:
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
        return [
            f"{where}.relative: {gate.metric} is a comparison with the dense model already; drop"
            " relative"
        ]
    return []


def _task_problems(where: str, metric: str, evaluate: Evaluate) -> list[str]:
    task, _, name = metric.removeprefix("tasks.").rpartition(".")
    declared = declared_metrics(evaluate.tasks, task)
    if declared is None or name.partition(",")[0] in declared:
        return []
    known = [
        f"tasks.{each}.{declared}"
        for each in evaluate.tasks.names
        for declared in declared_metrics(evaluate.tasks, each) or []
    ]
    return [_unknown(where, metric, known)]


def check_gates(gates: Sequence[Gate], evaluation: dict[str, Any]) -> list[str]:
    """Return a sentence for every threshold that an `evaluation` from `compare` misses.

    Raises a `RecipeError` if a gate needs a metric or a dense score that was not measured.
    """
    metrics = {
        **{f"perplexity.{name}": entry for name, entry in evaluation["perplexity"].items()},
        **{
            f"{kind}.{name}": {"compressed": entry[key], "dense": None}
            for kind, key in PREDICTIONS.items()
            for name, entry in evaluation["kl"].items()
        },
        **{
            f"tasks.{task}.{metric}": entry
            for task, entries in evaluation["tasks"].items()
            for metric, entry in entries.items()
        },
    }
    problems: list[str] = []
    missed: list[str] = []
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
            missed += _missed(gate, entry)
    if problems:
        raise RecipeError(problems)
    return missed


def _missed(gate: Gate, entry: dict[str, Any]) -> list[str]:
    value, dense = entry["compressed"], entry["dense"]
    got = f"{gate.metric} is {value:.4g}" + ("" if dense is None else f" (dense {dense:.4g})")
    if gate.relative:
        if dense == 0:
            return [f"{got}: a ratio to a dense score of 0 is not defined"]
        value = value / dense
        got = f"{got}, compressed / dense {value:.4g}"
    sentences = []
    # Written so that NaN misses every threshold.
    if gate.at_most is not None and not value <= gate.at_most:
        sentences.append(f"{got}: must be at most {gate.at_most:g}")
    if gate.at_least is not None and not value >= gate.at_least:
        sentences.append(f"{got}: must be at least {gate.at_least:g}")
    return sentences


def _unknown(where: str, metric: str, known: Iterable[str]) -> str:
    known = list(known)
    close = get_close_matches(metric, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(known) or 'none'}"
    return f"{where}.metric: no evaluated metric is named '{metric}'; {hint}"
