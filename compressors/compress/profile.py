"""Measure the effect of each compressed weight alone, to compare it with the prediction."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from lrc.compressors.calibrate.statistics import statistics_files
from lrc.compressors.compress.group import CompressedGroup
from lrc.compressors.compress.layerwise import Compression
from lrc.compressors.evaluate.agreement import kl_divergence, log_probabilities
from lrc.compressors.evaluate.perplexity import perplexity
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep
from lrc.compressors.layers.experts import split_experts_
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
    found = float(spearmanr(x, y).statistic)
    return found if isfinite(found) else None


def profile_plan(
    plan: Plan,
    reader: WeightReader,
    journal: Journal,
    statistics: Callable[[Weight], Statistics],
    tokens: Tensor,
    *,
    dense: Callable[[], Any],
    device: str,
    on_step: OnStep,
) -> Profile:
    """Measure the dense model with one compressed task at a time.

    Each layer is one file of the journal. Nothing is compensated: all other weights are dense.

    Parameters
    ----------
    plan : Plan
        Without pending tasks.
    statistics : callable
        Returns the calibration statistics of a weight.
    tokens : Tensor, shape [n_windows, length]
        Calibration windows, int64.
    dense : callable
        Loads the dense model; called if a layer has yet to be measured.

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
    left = [layer for layer in layers if not _measured(journal, layer, len(tokens))]
    _check_statistics([task for task in tasks if task.layer in left], journal)
    work = Compression(plan, reader, journal, statistics, device)
    if left:
        model = dense()
        split_experts_(model)
        before = perplexity(model, tokens).nll_mean
    for done, layer in enumerate(layers, start=1):
        if layer in left:
            here = [task for task in tasks if task.layer == layer]
            measured = {task.name: _compare(model, work.compress(task), tokens) for task in here}
            facts = {"windows": len(tokens), "dense": before, "measured": measured}
            journal.write_json(profile_file(layer), facts)
        on_step("profile", done, len(layers))
    return _collect(journal, layers, windows=len(tokens), length=tokens.shape[1])


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


@torch.inference_mode()
def _compare(model: Any, done: CompressedGroup, tokens: Tensor) -> tuple[float, float]:
    """Return KL divergence and increase of the loss, in nats per token, due to one group."""
    divergence = increase = 0.0
    for window in tokens:
        row = window[None].to(model.device)

        def predictions(row: Tensor = row) -> Tensor:
            logits: Tensor = model(input_ids=row, use_cache=False).logits
            return log_probabilities(logits[0, :-1])  # [length - 1, vocabulary]

        p = predictions()
        with _replaced(model, done):
            q = predictions()
        divergence += float(kl_divergence(p, q).sum(dtype=torch.float64))
        increase += float((p - q).gather(1, row[0, 1:, None]).sum(dtype=torch.float64))
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    return divergence / count, increase / count


@contextmanager
def _replaced(model: Any, done: CompressedGroup) -> Iterator[None]:
    """Put the compressed weights of a group into the model inside the context."""
    before: list[tuple[nn.Module, str, nn.Parameter | None]] = []

    def put(name: str, leaf: str, value: Tensor) -> None:
        linear = model.get_submodule(name)
        before.append((linear, leaf, getattr(linear, leaf)))
        value = value.to(linear.weight.device, linear.weight.dtype)
        setattr(linear, leaf, nn.Parameter(value, requires_grad=False))

    try:
        if done.result.config.compressed:
            for weight in done.task.weights:
                put(weight.name, "weight", done.weight(weight.name))
                bias = done.tensors.get(f"{weight.name}.bias")
                if bias is not None:
                    put(weight.name, "bias", bias)
        yield
    finally:
        for linear, leaf, parameter in reversed(before):
            setattr(linear, leaf, parameter)
