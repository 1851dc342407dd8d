"""The section about gates: every threshold of the recipe, with the value that was measured."""

from collections.abc import Iterator
from dataclasses import dataclass

from lrc.compressors.evaluate.gates import SIZE, GateResult, check_gates, metrics_of
from lrc.compressors.evaluate.score_text import four_digits
from lrc.compressors.page.drawing import Page
from lrc.compressors.page.parts import Part, Table
from lrc.compressors.page.saved_runs import SavedRun
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Gate
from lrc.configs.size import size_text

HEAD = ("gate", "value", "dense", "result")


@dataclass(frozen=True)
class GateRow:
    """A threshold, and how the result compares with it."""

    gate: str
    """Metric, comparison and limit."""
    value: str
    dense: str
    """Value of the dense model; empty if there is none."""
    passed: bool | None
    """None if the metric was not measured."""

    @property
    def result(self) -> str:
        """The outcome in words."""
        return {True: "passed", False: "missed", None: "not measured"}[self.passed]

    @property
    def cells(self) -> list[str]:
        """Texts for the columns of `HEAD`."""
        return [self.gate, self.value, self.dense, self.result]


def gate_rows(run: SavedRun) -> list[GateRow]:
    """Return a row for every bound of the gates of a run, in the order of the recipe."""
    return [*_rows(run)]


def passed_text(rows: list[GateRow]) -> str:
    """Return how many gates have passed, in words."""
    passed = sum(row.passed is True for row in rows)
    return f"all {passed} passed" if passed == len(rows) else f"{passed} of {len(rows)} passed"


def gates(run: SavedRun, page: Page) -> list[Part]:
    """Return the thresholds of the recipe with what was measured."""
    rows = gate_rows(run)
    if not rows:
        return []
    caption = (
        f"Thresholds of the recipe: {passed_text(rows)}; x: relative to the dense model. The "
        "command ends with exit code 4 if one is missed."
    )
    return [Table(caption, HEAD, [row.cells for row in rows])]


def _rows(run: SavedRun) -> Iterator[GateRow]:
    given_gates = run.report["recipe"]["evaluate"].get("gates", [])
    metrics = metrics_of(run.report) if given_gates else {}
    for given in given_gates:
        gate = Gate.model_validate(given)
        try:
            found = check_gates([gate], metrics)
        except RecipeError:  # a score that is missing, which the section of warnings explains
            yield GateRow(str(gate), "", "", None)
            continue
        for each in found:
            dense = "" if each.dense is None else _in_unit(gate.metric, each.dense)
            yield GateRow(each.gate, _value(gate, each), dense, each.passed)


def _value(gate: Gate, result: GateResult) -> str:
    if gate.relative and result.dense:
        return f"{four_digits(result.value)}x"
    return _in_unit(gate.metric, result.value)


def _in_unit(metric: str, value: float) -> str:
    if metric == SIZE:
        return size_text(value)
    return four_digits(value)
