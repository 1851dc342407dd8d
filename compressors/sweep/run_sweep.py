"""Run every combination of a sweep in a folder; one that fails stops no other."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lrc.compressors.io.files import remove, write_text
from lrc.compressors.io.journal import open_journal
from lrc.compressors.io.machine import Machine, release_memory
from lrc.compressors.pipeline import compress
from lrc.compressors.prepare import CheckedModel, Prepared, prepare
from lrc.compressors.stages import STAGES
from lrc.compressors.sweep.outcome import Outcome, sweep_json
from lrc.compressors.sweep.shared_work import SharedWork
from lrc.configs.axes import Combination
from lrc.configs.errors import (
    EvaluationIncomplete,
    GateMissed,
    LrcError,
    OutputError,
    Problem,
    RecipeError,
    Stopped,
)
from lrc.configs.load import LoadedRecipe, load_recipe

RESULTS, SHARED = "sweep.json", "shared"


@dataclass
class Sweep:
    """Runs in one folder, and the results so far.

    Parameters
    ----------
    recipe : Path
        The recipe that combinations override.
    output : Path
        Folder of all runs, and of ``sweep.json``, which is written after every run.
    machine : Machine
        Which runs them. With `overwrite`, earlier runs in their folders are deleted.
    """

    recipe: Path
    output: Path
    machine: Machine
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """By name of the combination, in the order of the runs."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further keys of ``sweep.json``."""
    _warned: set[str] = field(default_factory=set)
    _models: dict[str, CheckedModel] = field(default_factory=dict)

    @contextmanager
    def opened(self) -> Iterator[SharedWork]:
        """Lock the folder, and yield what its runs share, which is deleted after the last run.

        Nothing of it remains but the runs and the results, unless the sweep was interrupted.

        Raises
        ------
        OutputError
            If the folder holds something else, is in use, or is not writable.
        """
        own = any((self.output / name).exists() for name in (SHARED, RESULTS))
        if self.output.is_dir() and not own:
            others = sorted(path.name for path in self.output.iterdir())
            if others:
                raise OutputError(
                    f"--output: {self.output} is not empty and was not written by lrc sweep (it "
                    f"holds {others[0]}); choose another folder, or move what is in it"
                )
        with open_journal(self.output / SHARED, {"sweep": 1}) as root:
            yield SharedWork(root, self._labelled("shared"))
        remove(self.output / SHARED)

    def load(self, combinations: Sequence[Combination]) -> dict[str, LoadedRecipe]:
        """Read the recipes of combinations.

        Raises
        ------
        RecipeError
            With every problem of every combination; also if two are the same recipe.
        """
        found: dict[str, LoadedRecipe] = {}
        problems: list[Problem] = []
        names: dict[str, str] = {}
        repeated: list[Problem] = []
        for each in combinations:
            folder = json.dumps(str(self.output / each.name))
            try:
                loaded = load_recipe(self.recipe, [*each.overrides, f"output={folder}"])
                content = loaded.recipe.model_dump_json(exclude={"output"})
                if (first := names.setdefault(content, each.name)) != each.name:
                    repeated = repeated or [_same(first, each.name)]
                found[each.name] = loaded
            except RecipeError as error:
                problems += [p for p in error.problems if p not in problems]
        if problems or repeated:
            raise RecipeError(problems + repeated)
        return found

    def run(self, combinations: Sequence[Combination], shared: SharedWork) -> None:
        """Run combinations, after computing what they share."""
        loaded = self.load(combinations)
        prepared: dict[str, Prepared] = {}
        for each in combinations:
            with self._recorded(each):
                prepared[each.name] = prepare(
                    loaded[each.name].recipe, STAGES, checked=self._models
                )
        shared.compute([*prepared.values()])
        for each in combinations:
            if each.name in prepared:
                self._run(each, loaded[each.name], prepared.pop(each.name), shared)
            self.write()

    def write(self) -> None:
        """Write the results so far to ``sweep.json``."""
        text = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        write_text(self.output / RESULTS, text)

    def to_json(self) -> dict[str, Any]:
        """Return the results so far."""
        return sweep_json(self.recipe, [*self.outcomes.values()]) | self.facts

    def _run(
        self, each: Combination, loaded: LoadedRecipe, prepared: Prepared, shared: SharedWork
    ) -> None:
        machine = replace(self._labelled(each.name), overwrite=False)
        with self._recorded(each) as outcome:
            shared.lend(prepared)
            try:
                outcome.report = compress(loaded, machine, prepared, solved=shared.solved(prepared))
            finally:
                shared.keep(prepared)
        release_memory()

    @contextmanager
    def _recorded(self, combination: Combination) -> Iterator[Outcome]:
        """Yield the outcome of a combination, and record an error instead of raising it."""
        name = combination.name
        outcome = self.outcomes[name] = Outcome(combination, self.output / name)
        try:
            yield outcome
        except Stopped:
            raise
        except (EvaluationIncomplete, GateMissed) as error:
            outcome.fail(error)
            outcome.report = error.report
        except (LrcError, MemoryError, OSError, RuntimeError) as error:  # of torch, too
            outcome.fail(error)
        if outcome.error is not None:
            self.machine.on_warning(f"{name}: {'; '.join(outcome.problems)}")

    def _labelled(self, name: str) -> Machine:
        """Return the machine with progress and warnings that name a run, each warning once."""
        on_step, on_warning = self.machine.on_step, self.machine.on_warning

        def step(stage: str, done: int, total: int) -> None:
            on_step(f"{name}: {stage}", done, total)

        def warn(text: str) -> None:
            if text not in self._warned:
                self._warned.add(text)
                on_warning(f"{name}: {text}")

        return replace(self.machine, on_step=step, on_warning=warn)


def _same(first: str, name: str) -> Problem:
    return Problem(
        "invalid-override",
        "",
        f"the combinations {first} and {name} are the same recipe; remove values that change "
        "nothing, or keys that are given under two names",
    )
