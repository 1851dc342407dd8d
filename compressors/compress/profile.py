"""Whether predicted losses come true: what is planned, put into the dense model piece by piece."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.calibrate.statistics import inputs_file
from lrc.compressors.compress.finalize import Done, product
from lrc.compressors.compress.layerwise import factor_unit
from lrc.compressors.evaluate.perplexity import perplexity
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep
from lrc.compressors.layers import FORMS
from lrc.compressors.methods.table import METHODS
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Matrix, Plan
from lrc.compressors.planning.weight_groups import Unit, units_of
from lrc.compressors.solvers.moments import Statistics
from lrc.configs.errors import OutputError
from lrc.configs.recipe import Recipe


@dataclass(frozen=True)
class Profile:
    """What every matrix alone does to the dense model's predictions.

    Nats, the mean over the `tokens` predicted in `windows` calibration windows, by the name of a
    matrix, or of the first of those that share a factor: they count as one.
    """

    windows: int
    tokens: int
    dense: float | None
    """The dense model's loss; None where nothing is factored."""
    divergences: dict[str, float]
    """Of the changed model's distributions from the dense model's (Kullback-Leibler)."""
    rises: dict[str, float]
    """Of the loss of the tokens that follow."""

    def compared(self, predicted: Mapping[str, float | None]) -> tuple[Tensor, Tensor]:
        """Return predicted and measured values [n], of the matrices that have both."""
        pairs = [(predicted.get(name), real) for name, real in self.divergences.items()]
        both = [(value, real) for value, real in pairs if value is not None]
        table = torch.tensor(both, dtype=torch.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def to_json(self, plan: Plan) -> dict[str, Any]:
        """Return JSON values, with the rank correlations of divergences and predictions."""
        by_nats = {m.name: m.predicted_nats for m in plan.matrices}
        by_loss = {m.name: m.loss for m in plan.matrices}
        correlations = {
            "predicted_nats": spearman(*self.compared(by_nats)),
            "loss": spearman(*self.compared(by_loss)),
        }
        sums = {
            "divergence": sum(self.divergences.values()),
            "rise": sum(self.rises.values()),
        }
        return asdict(self) | sums | {"spearman": correlations}


def profile_plan(
    plan: Plan,
    recipe: Recipe,
    reader: WeightReader,
    journal: Journal,
    statistics: Callable[[Matrix], Statistics],
    tokens: Tensor,
    *,
    dense: Callable[[], Any],
    device: str,
    on_step: OnStep,
) -> Profile:
    """Measure the dense model with one matrix after the other as it is planned.

    Layer by layer, each one file of the journal. Nothing is compensated: the other matrices are
    those of the dense model.

    Parameters
    ----------
    plan : Plan
        With nothing pending.
    statistics : callable
        Returns what calibration knows of a matrix.
    tokens : Tensor, shape [n_windows, length]
        Calibration windows, int64.
    dense : callable
        Loads the whole dense model; called if a layer has still to be measured.
    on_step : callable
        Told (stage, layers done, layers) after each layer; what it raises stops the work there.

    Raises
    ------
    OutputError
        If statistics that are needed have been deleted, as they are once a layer is factored.

    Notes
    -----
    What a method predicts is the divergence: the loss to second order, of the model's own labels.
    The loss of real labels says the same in the mean, but that of one token moves at random with a
    variance of about 2 r where the divergence is r (the log-ratio of two close distributions), so
    that n tokens tell r from chance only where ``n >> 2 / r``: 0.001 nats take many thousands.
    """
    units = [unit for unit in units_of(plan.matrices) if unit.sizes is not None]
    layers = sorted({unit.first.layer for unit in units})
    left = [layer for layer in layers if not _measured(journal, layer, len(tokens))]
    _refuse_forgotten([unit for unit in units if unit.first.layer in left], journal)

    def factored(unit: Unit) -> Done:
        return factor_unit(unit, plan, recipe, reader, journal, statistics, device=device)

    if left:
        model = dense()
        before = perplexity(model, tokens).nll_mean
    for done, layer in enumerate(layers, start=1):
        if layer in left:
            measured = {
                unit.first.name: _compare(model, factored(unit), tokens)
                for unit in units
                if unit.first.layer == layer
            }
            facts = {"windows": len(tokens), "dense": before, "measured": measured}
            journal.write_json(profile_file(layer), facts)
        on_step("profile", done, len(layers))
    found = [journal.read_json(profile_file(layer)) for layer in layers]
    return Profile(
        windows=len(tokens),
        tokens=tokens.shape[0] * (tokens.shape[1] - 1),
        dense=found[0]["dense"] if found else None,
        divergences={name: m[0] for facts in found for name, m in facts["measured"].items()},
        rises={name: m[1] for facts in found for name, m in facts["measured"].items()},
    )


def profile_file(layer: int) -> str:
    """Return the journal's name for the rises of the units that begin in a decoder layer."""
    return f"profile/layer-{layer:04d}.json"


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Correlate the ranks of two samples [n]; None if all values of one are equal.

    Equal values share the mean of their ranks, so that this is Pearson's correlation of the ranks
    and not the formula of their differences, which ties make wrong.
    """
    a, b = _ranks(x), _ranks(y)
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else None


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of every value, less the mean rank."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(dim=0).double() - (counts - 1).double() / 2
    return ranks[place] - (len(values) + 1) / 2


def _measured(journal: Journal, layer: int, windows: int) -> bool:
    file = profile_file(layer)
    return journal.has(file) and bool(journal.read_json(file)["windows"] == windows)


def _refuse_forgotten(units: list[Unit], journal: Journal) -> None:
    for matrix in (m for unit in units for m in unit.members):
        if METHODS[matrix.method].needs_inputs and not journal.has(inputs_file(matrix.layer)):
            raise OutputError(
                f"output: {journal.output} holds a run that has factored {matrix.name} and deleted "
                "its statistics, without which it cannot be profiled; choose another folder"
            )


@torch.inference_mode()
def _compare(model: Any, done: Done, tokens: Tensor) -> tuple[float, float]:
    """Return divergence and rise of the loss, in nats a token, that a factored unit brings."""
    divergence = rise = 0.0
    for window in tokens:
        row = window[None].to(model.device)

        def predictions(row: Tensor = row) -> Tensor:
            logits: Tensor = model(input_ids=row, use_cache=False).logits
            return logits[0, :-1].float().log_softmax(dim=-1)  # [length - 1, vocabulary]

        p = predictions()
        with _put_in(model, done):
            q = predictions()
        change = p - q
        divergence += float((p.exp() * change).sum(dtype=torch.float64))
        rise += float(change.gather(1, row[0, 1:, None]).sum(dtype=torch.float64))
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    return divergence / count, rise / count


@contextmanager
def _put_in(model: Any, done: Done) -> Iterator[None]:
    """Let the model have the factored weights of a unit while the body runs."""
    before: list[tuple[nn.Module, str, nn.Parameter | None]] = []

    def put(name: str, leaf: str, value: Tensor) -> None:
        linear = model.get_submodule(name)
        before.append((linear, leaf, getattr(linear, leaf)))
        value = value.to(linear.weight.device, linear.weight.dtype)
        setattr(linear, leaf, nn.Parameter(value, requires_grad=False))

    try:
        for m in done.unit.members:
            if m.sizes is None:
                continue
            put(m.name, "weight", product(m, done.tensors.__getitem__))
            bias = done.tensors.get(f"{m.name}.{FORMS[m.form].BIAS}")
            if bias is not None:
                put(m.name, "bias", bias)
        yield
    finally:
        for linear, leaf, parameter in reversed(before):
            setattr(linear, leaf, parameter)
