"""What the healing methods are given, and what they return."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lrc.compressors.heal.adapted_integers import IntegerMatrix
from lrc.compressors.heal.adapted_parameters import AdaptedParameters
from lrc.compressors.heal.adapter_kinds import ADAPTERS, AdapterSite, adaptable
from lrc.compressors.heal.added_components import adding
from lrc.compressors.heal.budget import Budget, StepBudget, TimeBudget
from lrc.compressors.heal.descent import Descent
from lrc.compressors.heal.factor_coordinates import Coordinates, factor_coordinates
from lrc.compressors.heal.held_out import TrainingText
from lrc.compressors.heal.moving_support import MovingSupport, move_supports_
from lrc.compressors.heal.pace import Pace
from lrc.compressors.heal.parameters import TrainedParameters, parameter_roles
from lrc.compressors.heal.stored import StoredModel
from lrc.compressors.heal.trained_files import state_file
from lrc.compressors.heal.unpacked_factors import UnpackedFactor
from lrc.compressors.layers.dense import Dense
from lrc.compressors.planning.plan import Plan
from lrc.compressors.session import Session
from lrc.configs.errors import RecipeError
from lrc.configs.heal import HealBase

SNAPSHOT_SECONDS = 30.0
SNAPSHOT_SHARE = 0.05
"""Largest fraction of the time that writing snapshots takes."""
WHOLE = f".{Dense.TYPE}.{IntegerMatrix.LEAF}"
"""Ending of the names of integers that are a whole weight, not a factor."""


@dataclass(frozen=True)
class HealWork:
    """A stage that trains."""

    session: Session
    plan: Plan
    """With results."""
    stage: int
    options: HealBase
    """Of a healing method."""
    steps: int | None
    """None if the time is limited instead."""
    text: TrainingText
    pace: Pace
    """Counts the steps."""

    @property
    def where(self) -> str:
        """Key path of the stage."""
        return f"stages[{self.stage}].heal"

    @property
    def seed(self) -> int:
        """Seed of the order of windows, different for every stage."""
        return self.plan.seed * 1_000_003 + self.stage

    def budget(self, seconds: float | None = None) -> Budget:
        """Return a budget that starts now; by default with all of the time, if it is limited."""
        if self.steps is not None:
            return StepBudget(self.steps)
        return TimeBudget(self.options.seconds if seconds is None else seconds)

    def stored(self) -> StoredModel:
        """Return the reader of the model before this stage."""
        return StoredModel(self.session, self.plan, self.stage)


Trainable = nn.Parameter | AdapterSite
"""What is trained of a stored tensor: its values, or an adapter that is added to it."""


def select(
    root: nn.Module, options: Any, excluded: tuple[nn.Module | None, ...] = ()
) -> dict[str, Trainable]:
    """Return what the option `train` selects, see `parameter_roles` and `ADAPTERS`, by name."""
    train: str = options.train
    if train in ADAPTERS:
        matrices = adaptable(root, excluded)
        if not getattr(options, "merge", True):
            matrices = adding(root, matrices, excluded)
        return {**ADAPTERS[train](root, matrices, options)}
    roles = parameter_roles(root, excluded)
    return {
        name: parameter
        for name, parameter in root.named_parameters()
        if train in roles.get(name, ()) and parameter.is_floating_point()
    }


def selected_supports_(
    root: nn.Module, selected: dict[str, Trainable], options: HealBase
) -> dict[str, MovingSupport]:
    """Let values change their places if the options say so, see `move_supports_`."""
    return move_supports_(root, selected) if options.moves_support else {}


def coordinates_of(
    root: nn.Module, selected: Mapping[str, Trainable], options: Any, prefix: str = ""
) -> dict[str, Coordinates]:
    """Return the coordinates of the selected factors if the options want them.

    Names in `root` and `selected` lack the `prefix` that the result has.
    """
    if not options.precondition:
        return {}
    parameters = {
        f"{prefix}{n}": each for n, each in selected.items() if isinstance(each, nn.Parameter)
    }
    return factor_coordinates(root, parameters, prefix)


def nothing_to_train(where: str, train: str) -> RecipeError:
    """Return the error for a model without parameters of the kind that is trained."""
    return RecipeError(
        f"{where}.train: must select something, got '{train}', of which the compressed model has "
        "nothing; choose another value, such as all, or remove the stage"
    )


def trained_parameters(
    selected: Mapping[str, Trainable],
    stored: StoredModel,
    forms: Mapping[str, MovingSupport | UnpackedFactor],
    coordinates: Mapping[str, Coordinates],
    *,
    seed: int,
) -> TrainedParameters:
    """Return the parameters of what is trained, which is named as in the checkpoint."""
    sites = {n: each for n, each in selected.items() if isinstance(each, AdapterSite)}
    if not sites:
        parameters = {n: each for n, each in selected.items() if isinstance(each, nn.Parameter)}
        unpacked = {n for n, form in forms.items() if isinstance(form, UnpackedFactor)}
        dtypes = stored.dtypes(parameters.keys() - unpacked)
        return TrainedParameters(
            parameters,
            {**dtypes, **dict.fromkeys(unpacked, torch.float32)},
            forms,
            coordinates,
        )
    matrices = {name: site.matrix for name, site in sites.items()}
    for name, matrix in matrices.items():
        if isinstance(matrix, IntegerMatrix) and name.endswith(WHOLE):
            matrix.start_from(stored.source(name.removesuffix(WHOLE)))
    generator = torch.Generator().manual_seed(seed % 2**63)
    adapters = {name: site.make(generator) for name, site in sites.items()}
    names = {name: f"{name}{matrix.like}" for name, matrix in matrices.items()}
    found = stored.dtypes(names.values())
    return AdaptedParameters(matrices, adapters, {n: found[like] for n, like in names.items()})


class Snapshots:
    """The state of a descent in the journal, from which an interrupted run continues.

    A snapshot is written from time to time, and when the progress callback stops the run.
    """

    def __init__(self, work: HealWork, descent: Descent) -> None:
        self._journal, self._on_step = work.session.journal, work.session.on_step
        self._piece = state_file(work.stage)
        self._descent = descent
        self._saved, self._interval = time.monotonic(), SNAPSHOT_SECONDS

    def resume(self) -> bool:
        """Load the snapshot; return whether there was one."""
        if not self._journal.has(self._piece):
            return False
        facts = self._journal.read_facts(self._piece)["state"]
        names = {name: name for name in self._descent.state_names()}
        self._descent.resume(self._journal.read_tensors(self._piece, names), facts)
        return True

    def finish_step(self) -> None:
        """Save if a snapshot is due; report progress."""
        if time.monotonic() - self._saved >= self._interval:
            self._save()
        try:
            self._on_step("heal", self._descent.done, self._descent.steps)
        except BaseException:
            self._save()
            raise

    def forget(self) -> None:
        """Delete the snapshot."""
        self._journal.forget(self._piece)

    def _save(self) -> None:
        start = time.monotonic()
        tensors, facts = self._descent.state()
        self._journal.write_tensors(self._piece, tensors, {"state": facts})
        self._saved = time.monotonic()
        self._interval = max(SNAPSHOT_SECONDS, (self._saved - start) / SNAPSHOT_SHARE)


def loss_facts(descent: Descent) -> dict[str, Any]:
    """Return what a descent did, as JSON values."""
    return {
        "trainable": descent.trained.count,
        "moved": descent.trained.moved(descent.best),
        "steps": descent.done,
        "losses": [[step, finite(loss)] for step, loss in descent.losses],
        "best_step": descent.best_step,
        "skipped": descent.skipped,
        "rates": [[step, rate] for step, rate in descent.rates],
    }


def budget_facts(
    budgets: Sequence[float], before: Sequence[float], after: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the losses at every budget before and after training, as JSON values."""
    return [
        {"keep": keep, "before": finite(first), "after": finite(last)}
        for keep, first, last in zip(budgets, before, after, strict=True)
    ]


def finite(loss: float) -> float | None:
    """Return a loss as a JSON value: None if it is not finite."""
    return loss if math.isfinite(loss) else None


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Let backward passes on a GPU add in a fixed order inside the context."""
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.startswith("cuda"):
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False  # a kernel for every tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        settings.fill_uninitialized_memory = filled
