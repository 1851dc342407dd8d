"""Search the smallest `keep` that meets a target, for every combination of a sweep."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from lrc.compressors.evaluate.gates import check_gates, metrics_of
from lrc.compressors.sweep.bisection import EVALUATIONS, Found, Verdict, smallest_keep
from lrc.compressors.sweep.outcome import Outcome
from lrc.compressors.sweep.run_sweep import Sweep
from lrc.compressors.sweep.shared_work import SharedWork
from lrc.configs.axes import Combination, folder_name
from lrc.configs.errors import LrcError, RecipeError
from lrc.configs.recipe import Gate

INFEASIBLE = "infeasible-budget"


class NotMeasuredError(Exception):
    """A run failed, or lacks the metric of the target."""


def search(
    sweep: Sweep, shared: SharedWork, combinations: Sequence[Combination], gate: Gate
) -> None:
    """Run combinations with one `keep` after the other; the results are facts of the sweep.

    Parameters
    ----------
    combinations : sequence of Combination
        Without a value of `keep`.
    gate : Gate
        The target, with one bound.
    """
    found: list[dict[str, Any]] = []
    sweep.facts["target"] = {"gate": str(gate), "evaluations": EVALUATIONS, "found": found}
    for each in combinations:
        names: dict[float, str] = {}

        try:
            result = smallest_keep(partial(_try, sweep, shared, each, gate, names))
        except NotMeasuredError:  # its run has the reason
            result = Found(None, None)
        found.append(
            {
                "values": each.values,
                "run": None if result.keep is None else names[result.keep],
                "keep": result.keep,
                "not_met": result.not_met,
            }
        )
        sweep.write()


def with_keep(combination: Combination, keep: float) -> Combination:
    """Return a combination with a value of `keep`."""
    values = {**combination.values, "keep": f"{keep:g}"}
    overrides = (*combination.overrides, f"keep={keep:g}")
    return Combination(folder_name(values), values, overrides)


def _try(
    sweep: Sweep,
    shared: SharedWork,
    combination: Combination,
    gate: Gate,
    names: dict[float, str],
    keep: float,
) -> Verdict:
    run = with_keep(combination, keep)
    names[keep] = run.name
    sweep.run([run], shared)
    return _verdict(sweep.outcomes[run.name], gate)


def _verdict(outcome: Outcome, gate: Gate) -> Verdict:
    """Return whether a run meets the target; raise `NotMeasuredError` if that is not known."""
    if outcome.report is not None:
        try:
            results = check_gates([gate], metrics_of(outcome.report))
        except RecipeError as error:
            raise NotMeasuredError from error
        return "met" if all(each.passed for each in results) else "missed"
    if isinstance(outcome.error, LrcError) and outcome.error.code == INFEASIBLE:
        return "infeasible"
    raise NotMeasuredError
