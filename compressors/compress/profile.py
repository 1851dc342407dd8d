"""Measure the effect of each compressed weight alone, to compare it with the prediction."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from lrc.compressors.calibrate.activation_cache import cache_files
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.statistics import statistics_files
from lrc.compressors.compress.layer_effects import LayerEffects
from lrc.compressors.compress.task_solver import TaskSolver
from lrc.compressors.io.journal import Journal
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.tasks import LayerTask, Weight
from lrc.compressors.solvers.moments import Statistics
from lrc.configs.errors import OutputError


@dataclass(frozen=True)
class Profile:
    """Effect of each compressed weight alone on the predictions of the dense model.

    Nats, mean over the `tokens` predicted in `windows` calibration windows, by the name of a task;
    weights that share a factor count as one.
    """

    windows: int
    tokens: int
    dense: float | None
    """Loss of the dense model; None if nothing is compressed."""
    divergences: dict[str, float]
    """KL divergence of the changed model from the dense one."""
    increases: dict[str, float]
    """Increase of the loss of the next token."""

    def compared(self, predicted: Mapping[str, float | None]) -> tuple[list[float], list[float]]:
        """Return predicted and measured divergences of the tasks that have both."""
        pairs = [(predicted.get(name), real) for name, real in self.divergences.items()]
        both = [(value, real) for value, real in pairs if value is not None]
        return [value for value, _ in both], [real for _, real in both]

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return JSON values with sums and rank correlations between prediction and measurement."""
        nats = {name: result.predicted_nats for name, result in plan.results.items()}
        losses = {name: result.relative_error for name, result in plan.results.items()}
        return asdict(self) | {
            "divergence": sum(self.divergences.values()),
            "increase": sum(self.increases.values()),
            "spearman": {
                "predicted_nats": rank_correlation(*self.compared(nats)),
                "relative_error": rank_correlation(*self.compared(losses)),
            },
        }


def rank_correlation(x: list[float], y: list[float]) -> float | None:
    """Return Spearman's correlation; None if it is undefined, as for constant values."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    from scipy.stats import spearmanr  # takes a while, and few commands need it

    found = float(spearmanr(x, y).statistic)
    return found if isfinite(found) else None


def profile_plan(
    plan: Plan,
    reader: WeightReader,
    statistics: Callable[[Weight], Statistics],
    context: CalibrationContext,
) -> Profile:
    """Measure the dense model with one compressed task at a time.

    Each layer is one file of the journal. Nothing is compensated: all other weights are dense. One
    decoder layer is in memory; see `LayerEffects`.

    Parameters
    ----------
    plan : Plan
        Without pending tasks.
    statistics : callable
        Returns the calibration statistics of a weight, on the device of `context`.
    context : CalibrationContext
        Of the model that is compressed, with the windows over which losses are measured.

    Raises
    ------
    OutputError
        If required statistics have been deleted, as they are once a layer is compressed.

    Notes
    -----
    Methods predict the divergence: the loss to second order, for labels of the model itself. The
    loss of real labels has the same mean, but the loss of one token varies at random with a
    variance of about 2 r where the divergence is r (the log-ratio of two close distributions), so
    that n tokens distinguish r from chance only if ``n >> 2 / r``: 0.001 nats take many thousands.
    """
    tasks = [task for task in plan.tasks if plan.stored_config(task).compressed]
    layers = sorted({task.layer for task in tasks})
    journal, tokens = context.journal, context.windows()
    left = [layer for layer in layers if not _measured(journal, layer, len(tokens))]
    _check_statistics([task for task in tasks if task.layer in left], journal)
    solver = TaskSolver(reader, statistics, context.device, plan.seed)
    if left:
        effects = LayerEffects(context, solver.compress)
        by_layer = {layer: [task for task in tasks if task.layer == layer] for layer in left}
        for together in _blocks(by_layer, effects.most_tasks()):
            before, found = effects.measure(together)
            for layer, here in together.items():
                measured = {task.name: found[task.name] for task in here}
                facts = {"windows": len(tokens), "dense": before, "measured": measured}
                journal.write_json(profile_file(layer), facts)
                context.on_step("profile", layers.index(layer) + 1, len(layers))
        journal.forget(*cache_files(journal))
    return _collect(journal, layers, windows=len(tokens), length=tokens.shape[1])


def _blocks(
    by_layer: dict[int, list[LayerTask]], most: int
) -> Iterator[dict[int, list[LayerTask]]]:
    """Yield layers with at most `most` tasks together, or one layer with more."""
    block: dict[int, list[LayerTask]] = {}
    for layer, tasks in by_layer.items():
        if block and sum(map(len, block.values())) + len(tasks) > most:
            yield block
            block = {}
        block[layer] = tasks
    yield block


def stored_profile(plan: Plan, journal: Journal) -> Profile | None:
    """Return what an earlier `profile_plan` of the run has measured; None if it is incomplete."""
    layers = sorted({t.layer for t in plan.tasks if plan.stored_config(t).compressed})
    files = [profile_file(layer) for layer in layers]
    if not files or not all(map(journal.has, files)):
        return None
    counts = {journal.read_json(file)["windows"] for file in files}
    if len(counts) > 1:
        return None
    return _collect(journal, layers, windows=counts.pop(), length=plan.calibration["length"])


def _collect(journal: Journal, layers: list[int], *, windows: int, length: int) -> Profile:
    found = [journal.read_json(profile_file(layer)) for layer in layers]
    pairs = {name: pair for facts in found for name, pair in facts["measured"].items()}
    return Profile(
        windows=windows,
        tokens=windows * (length - 1),
        dense=found[0]["dense"] if found else None,
        divergences={name: divergence for name, (divergence, _) in pairs.items()},
        increases={name: increase for name, (_, increase) in pairs.items()},
    )


def profile_file(layer: int) -> str:
    """Return the journal's name for the measurements of one decoder layer."""
    return f"profile/layer-{layer:04d}.json"


def _measured(journal: Journal, layer: int, windows: int) -> bool:
    file = profile_file(layer)
    return journal.has(file) and bool(journal.read_json(file)["windows"] == windows)


def _check_statistics(tasks: list[LayerTask], journal: Journal) -> None:
    for weight in (weight for task in tasks if task.statistics for weight in task.weights):
        if not journal.has(statistics_files(weight.layer)[0]):
            raise OutputError(
                f"output: {journal.output} contains a run that has compressed {weight.name} and "
                "deleted its statistics, which profiling needs; choose another folder",
                code="statistics-deleted",
            )
