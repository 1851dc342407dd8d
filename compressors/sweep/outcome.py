"""The results of the runs of a sweep as JSON, and which of them are Pareto optimal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrc.compressors.benchmark.results import PHASES
from lrc.configs.axes import Combination
from lrc.configs.errors import LrcError

SIMILAR = 1.005
"""Ratio of two sizes that count as equal, as in the comparison with baselines."""
SCHEMA_VERSION = 1
SCHEMA = {
    "schema_version": "1; raised when a key changes its meaning or is removed",
    "recipe": "path of the recipe",
    "runs[].{name,values,overrides}": "folder of the run; values that vary; all overrides",
    "runs[].status": "`finished`, or the code of the error",
    "runs[].problems": "what failed, or which gates were missed",
    "runs[].{bytes,dense_bytes}": "weight files of the run and of the dense model; null if none",
    "runs[].kept": "stored bits over dense bits of the targeted matrices",
    "runs[].metrics.NAME.{value,dense,stderr}": "a measurement, under the name that gates use",
    "runs[].metrics.NAME.higher_is_better": "direction of the metric",
    "runs[].seconds": "wall time by stage, without what runs share",
    "pareto.NAME": "runs of which no other is as small and better, or smaller and as good",
    "target": "search for the smallest `keep`, see below; null without --target",
    "target.{gate,evaluations}": "the threshold; runs that the search may take per combination",
    "target.found[].{values,run,keep}": "smallest run that meets it; null if none does",
    "target.found[].not_met": "largest fraction that is known to miss it; null if none is known",
}


@dataclass
class Outcome:
    """A combination, and how its run ended."""

    combination: Combination
    folder: Path
    report: dict[str, Any] | None = None
    error: Exception | None = None

    def fail(self, error: Exception) -> None:
        """Record why the run failed or is not accepted."""
        self.error = error

    @property
    def status(self) -> str:
        """``finished``, or the code of the error."""
        if self.error is None:
            return "finished" if self.report is not None else "waiting"
        return self.error.code if isinstance(self.error, LrcError) else "failed"

    @property
    def problems(self) -> list[str]:
        """One sentence for everything that is wrong."""
        if self.error is None:
            return []
        if isinstance(self.error, LrcError):
            return [str(each) for each in self.error.problems]
        return [f"{type(self.error).__name__}: {' '.join(str(self.error).split())[:500]}"]

    def to_json(self) -> dict[str, Any]:
        """Return the record of ``sweep.json``."""
        combination, report = self.combination, self.report
        record: dict[str, Any] = {
            "name": combination.name,
            "values": combination.values,
            "overrides": list(combination.overrides),
            "status": self.status,
            "problems": self.problems,
        }
        if report is None:
            empty = dict.fromkeys(("bytes", "dense_bytes", "kept"))
            return record | empty | {"metrics": {}, "seconds": {}}
        files = report["size"]["model"]["file_bytes"]
        return record | {
            "bytes": files["compressed"],
            "dense_bytes": files["dense"],
            "kept": report["size"]["targeted"]["kept"],
            "metrics": dict(_metrics(report)),
            "seconds": report["timing"]["seconds"],
        }


def sweep_json(recipe: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the content of ``sweep.json``, as `SCHEMA` documents it."""
    runs = [each.to_json() for each in outcomes]
    names = dict.fromkeys(name for run in runs for name in run["metrics"])
    return {
        "schema_version": SCHEMA_VERSION,
        "recipe": str(recipe),
        "runs": runs,
        "pareto": {name: pareto(runs, name) for name in names},
        "target": None,
    }


def pareto(runs: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """Return the names of the runs that are optimal in size and one metric, smallest first.

    Runs without the metric are left out. Sizes within `SIMILAR` of each other count as equal: the
    headers of files and the steps of ranks differ. Of equal runs all are returned.
    """
    points = []
    for run in runs:
        if (found := run["metrics"].get(metric)) is not None:
            loss = -found["value"] if found["higher_is_better"] else found["value"]
            points.append((run["bytes"], loss, run["name"]))
    return [
        name
        for size, loss, name in sorted(points)
        if not any(
            (least < loss and other <= size * SIMILAR) or (least == loss and other * SIMILAR < size)
            for other, least, _ in points
        )
    ]


def _metrics(report: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the metrics of a report: names of gates, and speeds."""
    evaluation = report["evaluation"]
    for name, entry in evaluation["kl"].items():
        error = (entry["stderr"] or {}).get("forward")
        yield f"kl.{name}", _metric(entry["forward"], None, error, higher=False)
    for name, entry in evaluation["perplexity"].items():
        error = entry["stderr"]["compressed"]
        yield (
            f"perplexity.{name}",
            _metric(entry["compressed"], entry["dense"], error, higher=False),
        )
    for name, entry in evaluation["kl"].items():
        error = (entry["stderr"] or {}).get("agreement")
        yield f"agreement.{name}", _metric(entry["agreement"], None, error, higher=True)
    for task, metrics in evaluation["tasks"].items():
        for name, entry in metrics.items():
            if entry["higher_is_better"] is not None and entry["compressed"] is not None:
                error, better = entry["stderr"]["compressed"], entry["higher_is_better"]
                value = _metric(entry["compressed"], entry["dense"], error, higher=better)
                yield f"tasks.{task}.{name}", value
    if report["speed"] is not None:
        yield from _speeds(report["speed"])


def _speeds(speed: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the speeds that `lrc bench --report` has measured, in tokens per second."""
    found: dict[str, dict[str, float]] = {}
    for each in speed["results"]:
        if each["repeated"] or each["failed"] is not None:
            continue
        model = "dense" if each["model"] == speed["against"] else "compressed"
        place = f"{each['mode']}, batch {each['batch']}, prompt {each['prompt']}"
        for phase in PHASES:
            found.setdefault(f"{phase} tokens/s, {place}", {})[model] = each[phase]["median"]
    for name, models in found.items():
        if "compressed" in models:
            yield name, _metric(models["compressed"], models.get("dense"), None, higher=True)


def _metric(
    value: float, dense: float | None, stderr: float | None, *, higher: bool
) -> dict[str, Any]:
    return {"value": value, "dense": dense, "stderr": stderr, "higher_is_better": higher}
