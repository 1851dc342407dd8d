"""One run, from recipe to report; this file is the table of contents of the library."""

from typing import Any

from lrc.compressors import report
from lrc.compressors.calibrate.activation_cache import cache_files
from lrc.compressors.compress.profile import Profile
from lrc.compressors.evaluate.gates import check_gates
from lrc.compressors.evaluate.scores import check_texts
from lrc.compressors.io.machine import Machine
from lrc.compressors.model_versions import slice_folder
from lrc.compressors.planning.plan import Plan
from lrc.compressors.prepare import prepare
from lrc.compressors.session import Run, open_run
from lrc.configs.errors import GateMissed
from lrc.configs.load import LoadedRecipe


def compress(loaded: LoadedRecipe, machine: Machine | None = None) -> dict[str, Any]:
    """Run a recipe: calibrate, decompose, save, evaluate beside plain alternatives, report.

    What an earlier, interrupted run of the same recipe has finished is taken over.

    Returns
    -------
    dict
        The report, as written to ``OUTPUT/report.json``.

    Raises
    ------
    LrcError
        One of its kinds; the state is saved, and the same call continues.
    """
    machine = machine or Machine()
    recipe = loaded.recipe
    prepared = prepare(recipe)
    with open_run(prepared, machine) as run:
        result = report.stored(prepared, run.journal)
        if result is None:
            if not (run.journal.output / "checkpoint").is_dir():
                check_texts(prepared.architecture.model, prepared.tokenizer, recipe.evaluate)
                run.calibrate()
                plan = run.allocate()
                plan = run.decompose(plan)
                run.save(plan, loaded)
            run.journal.forget("statistics", "energies", *cache_files(run.journal))
            evaluation = run.evaluate()
            result = report.write(
                prepared, run.journal, evaluation, run.clock.seconds, machine.chosen
            )
        sliced = [slice_folder(stage) for stage, _ in enumerate(prepared.sliced)]
        run.journal.forget("factors", "source", *sliced)
    missed = check_gates(recipe.evaluate.gates, result["evaluation"])
    if missed:
        raise GateMissed(missed, result)
    return result


def measure(loaded: LoadedRecipe, machine: Machine | None = None) -> Plan:
    """Run a recipe as far as its ranks, and predict what every matrix loses at its rank.

    `compress` goes on from there. Where it has been already, its own predictions are read.

    Raises
    ------
    LrcError
        One of its kinds; the state is saved, and the same call continues.
    """
    machine = machine or Machine()
    with open_run(prepare(loaded.recipe), machine) as run:
        return _predicted(run)


def profile(
    loaded: LoadedRecipe, windows: int, machine: Machine | None = None
) -> tuple[Plan, Profile]:
    """As `measure`; then hold the predictions against the dense model, see `profile_plan`.

    Parameters
    ----------
    windows : int
        How many of the calibration windows the losses are taken over, the first ones.

    Raises
    ------
    LrcError
        One of its kinds; the state is saved, and the same call continues.
    """
    machine = machine or Machine()
    with open_run(prepare(loaded.recipe), machine) as run:
        plan = _predicted(run)
        return plan, run.profile(plan, windows)


def _predicted(run: Run) -> Plan:
    if run.executed is not None:
        return run.executed
    run.calibrate()
    return run.predict(run.allocate())
