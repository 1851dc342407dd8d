"""Run a recipe from start to end, one call per phase."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lrc.compressors import report
from lrc.compressors.calibrate.activation_cache import cache_files
from lrc.compressors.checkpoint.reader import missing_files
from lrc.compressors.compress.profile import Profile, profile_plan
from lrc.compressors.compress.task_solver import Solved
from lrc.compressors.estimates.estimate import estimate, refuse_too_large
from lrc.compressors.evaluate.broken_source import check_source_model, is_quick
from lrc.compressors.evaluate.gates import check_gates, metrics_of
from lrc.compressors.evaluate.scores import check_evaluation, missing_sentences
from lrc.compressors.heal.run import training_files
from lrc.compressors.io.files import remove
from lrc.compressors.io.machine import Machine, release_memory
from lrc.compressors.model_versions import slice_folder
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.model_kinds import refuse_encoder, refuse_encoder_decoder
from lrc.compressors.page.page_file import PAGE, write_page
from lrc.compressors.planning.loss_curves import LossCurves
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.spectra import store_spectra
from lrc.compressors.prepare import Prepared, prepare
from lrc.compressors.run_evaluation import evaluate_run, warn_of_missing_tasks
from lrc.compressors.session import Session, join_session, open_session
from lrc.compressors.stages import STAGES
from lrc.compressors.stages.compress_weights import (
    EXECUTED,
    executed_plan,
    predict_losses,
    stored_curves,
)
from lrc.compressors.stages.save_checkpoint import save_checkpoint
from lrc.compressors.statistic_division import statistic_segments
from lrc.configs.errors import (
    CheckpointError,
    EvaluationIncomplete,
    GateMissed,
    OutputError,
    RecipeError,
)
from lrc.configs.load import LoadedRecipe


def compress(
    loaded: LoadedRecipe,
    machine: Machine | None = None,
    prepared: Prepared | None = None,
    *,
    solved: Solved = lambda batch: None,
) -> dict[str, Any]:
    """Run a recipe: compile, run its stages, save, evaluate, report.

    Results of an earlier, interrupted run of the same recipe are used.

    Parameters
    ----------
    prepared : Prepared, optional
        Result of `prepare` for this recipe, if there is one.
    solved : callable
        Returns results of tasks that need not be solved.

    Returns
    -------
    dict
        The report, as written to ``OUTPUT/report.json``.

    Raises
    ------
    LrcError
        The state is saved, and the same call continues.
    """
    machine = machine or Machine()
    recipe = loaded.recipe
    prepared = prepared or prepare(recipe, STAGES)
    with open_session(prepared, machine, solved) as session:
        written = _has_checkpoint(session)
        result = report.stored(prepared, session.journal) if written else None
        if result is None:
            _check_stages(session)
            if not written:
                model, tokenizer = prepared.architecture.model, prepared.tokenizer
                check_evaluation(model, tokenizer, recipe.evaluate, seed=recipe.seed)
                _check_estimate(session)
                warn_of_missing_tasks(session)
                _check_source(session)
                save_checkpoint(session, _run_stages(session), loaded)
            store_spectra(_executed(session), session.journal)
            session.journal.forget("statistics", "energies", *cache_files(session.journal))
            evaluation = session.in_all_processes(evaluate_run)
            remove(session.journal.output / PAGE)  # of an earlier evaluation
            result = report.write(session, _executed(session), evaluation)
        page = session.journal.output / PAGE
        if not page.is_file():
            write_page(page.parent, result, machine.on_warning)
        sliced = [slice_folder(stage) for stage, _ in enumerate(prepared.sliced)]
        trained = training_files(prepared.plan)
        session.journal.forget("compressed", "source", *sliced, *trained)
    if missing := missing_sentences(result["evaluation"]["missing"]):
        raise EvaluationIncomplete(missing, result)
    gates = check_gates(recipe.evaluate.gates, metrics_of(result))
    if missed := [each.sentence for each in gates if not each.passed]:
        raise GateMissed(missed, result)
    return result


def assist(loaded: LoadedRecipe, machine: Machine) -> None:
    """Take part in a run that the first of several processes executes with `compress`.

    Raises
    ------
    LrcError
        The state is saved, and the same call continues.
    """
    with join_session(prepare(loaded.recipe, STAGES), machine) as session:
        session.assist()


@dataclass(frozen=True)
class Sensitivity:
    """What is predicted before anything is compressed."""

    plan: Plan
    """After allocation, with predicted losses."""
    curves: LossCurves
    """Of the matrices whose size an allocator has chosen by predicted loss; empty if a finished run
    has deleted them."""
    architecture: Architecture
    """Of the model that is decomposed."""


def measure(loaded: LoadedRecipe, machine: Machine | None = None) -> Sensitivity:
    """Run a recipe as far as its allocation, and predict what every weight loses.

    `compress` continues from there. Results of an earlier run are used where they exist.

    Raises
    ------
    LrcError
        The state is saved, and the same call continues.
    """
    prepared = prepare(loaded.recipe, STAGES)
    with open_session(prepared, machine or Machine()) as session:
        return _predict(session)


def profile(
    loaded: LoadedRecipe, windows: int, machine: Machine | None = None
) -> tuple[Sensitivity, Profile]:
    """Run `measure`, then compare its predictions with the dense model, see `profile_plan`.

    Parameters
    ----------
    windows : int
        Number of calibration windows, from the first, over which losses are measured.

    Raises
    ------
    LrcError
        The state is saved, and the same call continues.
    """
    prepared = prepare(loaded.recipe, STAGES)
    refuse_encoder(prepared.dense.kind, "model", "--profile")
    refuse_encoder_decoder(prepared.dense.kind, "model", "--profile")
    if statistic_segments(prepared) is not None:
        raise RecipeError(
            "calibration.disk_limit_gib: --profile needs the statistics of all layers, which do "
            "not fit on the disk together; raise it, or choose an output folder with more room"
        )
    with open_session(prepared, machine or Machine()) as session:
        found = _predict(session)
        context = session.models.calibration()
        context = replace(context, windows=lambda: session.windows()[:windows])
        return found, profile_plan(found.plan, session.models.reader, session.statistics, context)


def _predict(session: Session) -> Sensitivity:
    planned = _sliced(session)
    plan = predict_losses(session, planned)
    return Sensitivity(plan, stored_curves(session, planned), session.models.architecture)


def _check_estimate(session: Session) -> None:
    """Estimate what the run needs, once, and refuse what cannot fit."""
    processes = session.processes
    expected = estimate(session.prepared, session.device, processes.size)
    refuse_too_large(expected, session.prepared, session.device, processes.on_host)
    if not session.journal.has(report.ESTIMATE):
        session.journal.write_json(report.ESTIMATE, expected.to_json())


def _check_source(session: Session) -> None:
    """Warn of a dense model that is no better than chance, if that is found quickly."""
    prepared, models = session.prepared, session.models
    evaluate = prepared.recipe.evaluate
    n_bytes = prepared.plan.dense_parameters * models.dtype.itemsize
    if not (evaluate.dense and evaluate.perplexity and is_quick(n_bytes, session.device)):
        return
    load, spec = partial(models.load_dense, models.dtype), evaluate.perplexity[0]
    for warning in check_source_model(load, prepared.tokenizer, spec):
        session.machine.on_warning(warning)
    release_memory()


def _check_stages(session: Session) -> None:
    for kind, stage in STAGES.items():
        if stages := session.prepared.recipe.stages_of(kind):
            stage.check(session, stages)


def _run_stages(session: Session) -> Plan:
    plan = session.prepared.plan
    for kind, stage in STAGES.items():
        if session.prepared.recipe.stages_of(kind):
            plan = stage.run(session, plan)
    session.journal.write_json(EXECUTED, plan.to_json())
    return plan


def _sliced(session: Session) -> Plan:
    plan = session.prepared.plan
    return STAGES["slice"].run(session, plan) if plan.slices else plan


def _executed(session: Session) -> Plan:
    plan = executed_plan(session)
    assert plan is not None
    return plan


def _has_checkpoint(session: Session) -> bool:
    """Return whether the checkpoint is written; refuse one that is no longer complete."""
    folder = session.checkpoint
    if not folder.exists():
        return False
    try:
        missing = missing_files(folder)
    except CheckpointError as error:
        missing = [str(error)]
    if missing:
        raise OutputError(
            f"{folder}: is not complete ({missing[0]}); delete the folder and run the same command "
            "again, which recreates it"
        )
    return True
