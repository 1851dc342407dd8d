"""What the runs of a sweep have in common, computed once: statistics, loss curves, dense scores.

Every run is the same as on its own, and finds finished pieces in its journal. Statistics depend on
the model, the calibration options and what the methods require; different requirements of the same
text are collected in one pass. Loss curves depend on the statistics and on all options except the
budget. Scores of the dense model and of baselines depend on the model and the evaluation.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from lrc.compressors import report
from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.activation_cache import cache_files
from lrc.compressors.calibrate.calibration_windows import FILE as WINDOWS
from lrc.compressors.compress.task_solver import Solved
from lrc.compressors.io.journal import Journal, open_journal
from lrc.compressors.io.machine import Clock, Machine
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.rate_distortion import curves_for, energies_file
from lrc.compressors.planning.required_statistics import required_statistics
from lrc.compressors.prepare import Prepared
from lrc.compressors.run_identity import identity
from lrc.compressors.session import Session
from lrc.compressors.sweep.solved_tasks import SolvedTasks

SOURCE = "source"
"""The journal's name for a source that had to be converted."""
DENSE = "evaluation-dense.json"


class SharedWork:
    """Pieces of work in a journal of the sweep, which runs borrow.

    Parameters
    ----------
    root : Journal
        Of the sweep.
    machine : Machine
        Which computes them.
    """

    def __init__(self, root: Journal, machine: Machine) -> None:
        self._root, self._machine = root, machine
        self._identities: dict[str, Any] = {}  # by output; files are hashed
        self._solved: dict[Path, SolvedTasks] = {}  # by folder of the curves

    def compute(self, runs: Sequence[Prepared]) -> None:
        """Collect the statistics and curves of all runs that have yet to be compressed."""
        texts: dict[str, list[Prepared]] = {}
        for prepared in runs:
            if _shares_statistics(prepared) and not _is_compressed(prepared):
                texts.setdefault(json.dumps(self._text_key(prepared)), []).append(prepared)
        for group in texts.values():
            session = self._session(group[0])
            with self._machine.current():
                self._collect(session, group)
                for prepared in group:
                    self._compute_curves(session, prepared)

    def lend(self, prepared: Prepared) -> None:
        """Make everything that a run needs and that is known part of its journal.

        Raises
        ------
        OutputError
            If its folder holds something else.
        """
        machine, output = self._machine, Path(prepared.recipe.output).expanduser()
        with open_journal(output, self._identity(prepared), overwrite=machine.overwrite) as journal:
            for own, name in _scores(prepared).items():
                journal.borrow(self._of_model(prepared), name, own)
            if _is_compressed(prepared):
                return
            text = self._of_text(prepared)
            journal.borrow(text, WINDOWS)
            journal.borrow(text, SOURCE)
            if not _shares_statistics(prepared):
                return
            curves, requirement = self._of_curves(prepared), self._of_requirement(prepared)
            for layer in range(len(prepared.architecture.layer_names)):
                for name in statistics.statistics_files(layer):
                    journal.borrow(requirement, name)
                journal.borrow(curves, energies_file(layer))

    def keep(self, prepared: Prepared) -> None:
        """Keep what a run has measured and solved, for later runs."""
        journal = Journal(Path(prepared.recipe.output).expanduser())
        if _is_compressed(prepared) and (known := self._solved_of(prepared)):
            known.add(journal.output / "checkpoint", self._machine.chosen)
        for own, name in _scores(prepared).items():
            self._of_model(prepared).borrow(journal, own, name)

    def solved(self, prepared: Prepared) -> Solved:
        """Return what looks up results of earlier runs that a run need not solve again."""
        known = self._solved_of(prepared)
        return known.find if known else lambda batch: None

    def _solved_of(self, prepared: Prepared) -> SolvedTasks | None:
        """Return the results that runs of other budgets share with a run, if there can be any."""
        if not _shares_statistics(prepared):
            return None
        return self._solved.setdefault(self._of_curves(prepared).output, SolvedTasks())

    def _collect(self, session: Session, group: Sequence[Prepared]) -> None:
        """Collect the statistics of runs that read the same text."""
        wanted = {
            self._of_requirement(each).output: required_statistics(each.plan.tasks)
            for each in group
        }
        experts = any(linear.expert is not None for linear in session.models.architecture.linears)
        plain: list[tuple[Journal, Any]] = []
        alone: list[tuple[Journal, Any]] = []
        for folder, required in wanted.items():
            # Sums over weighted tokens have the names of those over all tokens.
            weighted = experts or any("capped_inputs" in names for names in required.values())
            (alone if weighted else plain).append((Journal(folder), required))
        for together in [plain, *([each] for each in alone)]:
            if together:
                self._collect_together(session, together)

    def _collect_together(self, session: Session, wanted: Sequence[tuple[Journal, Any]]) -> None:
        """Collect in one pass, whose snapshots are those of these requirements."""
        names = [journal.output.name for journal, _ in wanted]
        journal = _inside(session.journal, "pass", sorted(names))
        context = replace(session.models.calibration(), journal=journal)
        statistics.collect_together(context, wanted)
        journal.forget(*cache_files(journal))

    def _compute_curves(self, session: Session, prepared: Prepared) -> None:
        plan, journal = prepared.plan, self._of_curves(prepared)
        source = self._of_requirement(prepared)
        curves_for(
            [task for task in plan.tasks if task.pending],
            plan.allocations,
            session.models.reader,
            journal,
            lambda weight: statistics.load(source, weight.layer, weight.name, session.device),
            device=session.device,
            on_step=session.on_step,
        )

    def _session(self, prepared: Prepared) -> Session:
        journal = self._of_text(prepared)
        return Session(prepared, journal, self._machine, Clock(journal))

    def _of_model(self, prepared: Prepared) -> Journal:
        return _inside(self._root, "shared-model", self._model_key(prepared))

    def _of_text(self, prepared: Prepared) -> Journal:
        return _inside(self._root, "shared-text", self._text_key(prepared))

    def _of_requirement(self, prepared: Prepared) -> Journal:
        required = required_statistics(prepared.plan.tasks)
        return _inside(self._of_text(prepared), "statistics", required)

    def _of_curves(self, prepared: Prepared) -> Journal:
        key = _without_budgets(prepared.plan)
        return _inside(self._of_requirement(prepared), "curves", key)

    def _text_key(self, prepared: Prepared) -> Any:
        return self._model_key(prepared) | {"calibration": self._identity(prepared)["calibration"]}

    def _model_key(self, prepared: Prepared) -> Any:
        known = self._identity(prepared)
        return {key: known[key] for key in ("model", "seed", "versions")}

    def _identity(self, prepared: Prepared) -> Any:
        output = prepared.recipe.output
        if output not in self._identities:
            self._identities[output] = identity(prepared)
        return self._identities[output]


def _inside(journal: Journal, kind: str, key: Any) -> Journal:
    """Return a journal within another one, for work that a key identifies."""
    digest = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    found = Journal(journal.path(f"{kind}-{digest}"))
    found.work.mkdir(parents=True, exist_ok=True)
    return found


def _without_budgets(plan: Plan) -> Any:
    """Return what the curves of pending tasks depend on besides statistics."""
    pending = replace(
        plan,
        tasks=[replace(task, estimated_bits=None) for task in plan.tasks if task.pending],
        embeddings=[],
        allocations=[
            replace(
                each,
                budget=0,
                keep=None,
                size=None,
                total=0,
                min_keep=0.0,
                max_relative_error=1.0,
                elastic=(),
                one_scheme=False,
                overrides=False,
            )
            for each in plan.allocations
        ],
    ).to_json()
    return {key: pending[key] for key in ("tasks", "allocations")}


def _shares_statistics(prepared: Prepared) -> bool:
    """Return whether all that has to be collected is known, and is about the source model."""
    plan = prepared.plan
    needed = bool(required_statistics(plan.tasks))
    return needed and not plan.slices and not plan.unmeasured


def _is_compressed(prepared: Prepared) -> bool:
    return (Path(prepared.recipe.output).expanduser() / "checkpoint").exists()


def _scores(prepared: Prepared) -> dict[str, str]:
    """Return the journal's names of scores that runs share, and the names under which they do."""
    targets = report.baseline_targets(prepared.plan, prepared)
    shapes = sha256(json.dumps([*asdict(targets)["shapes"].items()]).encode()).hexdigest()[:16]
    return {
        DENSE: DENSE,
        **{
            f"evaluation-{name}.json": f"evaluation-{name}-{shapes}.json"
            for name in _of_any_size(prepared)
        },
    }


def _of_any_size(prepared: Prepared) -> Iterator[str]:
    """Yield the baselines that do not depend on the size of the result."""
    evaluate = prepared.recipe.evaluate
    yield from (name for name in evaluate.baselines if name != "sparse" and evaluate.perplexity)
