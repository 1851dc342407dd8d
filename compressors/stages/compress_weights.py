"""What decomposition and quantization have in common: one pass over the layers does both."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.activation_cache import cache_files
from lrc.compressors.calibrate.segments import FOLDER
from lrc.compressors.calibrate.sequential_calibration import SequentialCalibration
from lrc.compressors.calibrate.statistic_table import Required
from lrc.compressors.compress.layerwise import (
    compress_layers,
    layer_file,
    read_results,
    relative_cost,
)
from lrc.compressors.compress.quantize_embeddings import quantize_embeddings
from lrc.compressors.distributed.processes import Processes
from lrc.compressors.io.files import write_text
from lrc.compressors.io.machine import OnStep, no_progress
from lrc.compressors.planning.allocate import allocate
from lrc.compressors.planning.loss_curves import LossCurves, loss_curves
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.rate_distortion import curves_for, energies_file
from lrc.compressors.planning.required_statistics import required_statistics
from lrc.compressors.planning.tasks import LayerTask
from lrc.compressors.session import Session
from lrc.compressors.stages.measured_times import with_measured_times

ALLOCATED, EXECUTED = "plan.json", "executed.json"
"""Plans in the journal: before compression, and with results."""


def compress_weights(session: Session, plan: Plan) -> Plan:
    """Calibrate, allocate and compress all tasks of a plan, unless that is done."""
    done = executed_plan(session)
    # A finished run has deleted the tensors: they are computed again if its checkpoint is missing.
    if done is not None and all(session.journal.has(layer_file(t.layer)) for t in done.all_tasks):
        return done
    plan = with_measured_times(session, plan)
    calibrate(session, plan)
    plan = replace(allocate_budgets(session, plan), slices=plan.slices)

    with session.clock("compress"):
        plan = quantize_embeddings(
            plan, session.models.reader, session.journal, device=session.device
        )
        if plan.tasks:
            plan = _compress(session, plan)
    session.journal.write_json(EXECUTED, plan.to_json())
    session.journal.forget(FOLDER)
    return plan


def executed_plan(session: Session) -> Plan | None:
    """Return the plan with the results of a run whose weights are compressed."""
    if not session.journal.has(EXECUTED):
        return None
    return Plan.from_json(session.journal.read_json(EXECUTED))


def calibrate(session: Session, plan: Plan) -> None:
    """Collect the statistics that tasks of unfinished layers require.

    If they do not fit on the disk, they are collected when they are used instead.
    """
    left = [task for task in plan.tasks if not session.journal.has(layer_file(task.layer))]
    required = required_statistics(left)
    with session.clock("calibrate"):
        if not required or session.segments is not None:
            return
        session.windows()  # read once, for all processes
        session.in_all_processes(_collect, required)
        session.check_coverage(range(len(session.models.architecture.layers)))
        session.journal.forget(*cache_files(session.journal))


def _collect(session: Session, required: Required) -> None:
    statistics.collect(session.divided_calibration(), required)


def allocate_budgets(session: Session, plan: Plan) -> Plan:
    """Choose pending configurations, and write plan.json for users to read and edit."""
    journal = session.journal
    with session.clock("allocate"):
        if journal.has(ALLOCATED):
            return Plan.from_json(journal.read_json(ALLOCATED))
        _share_curves(session, plan)
        plan = _allocate(session, plan)
        text = json.dumps(plan.to_json(), indent=1) + "\n"
        write_text(journal.output / "plan.json", text)
        journal.write_json(ALLOCATED, plan.to_json())
    return plan


def predict_losses(session: Session, plan: Plan) -> Plan:
    """Calibrate and allocate, and predict the losses that no allocator needed.

    The results of layers that are compressed already are used instead.
    """
    done = executed_plan(session)
    if done is not None:
        return done
    plan = with_measured_times(session, plan)
    calibrate(session, plan)
    plan = allocate_budgets(session, plan)
    for layer in {task.layer for task in plan.tasks if session.journal.has(layer_file(task.layer))}:
        plan = plan.with_results(read_results(session.journal, layer))
    return _allocate(session, plan, predict_all=True)


def stored_curves(session: Session, plan: Plan) -> LossCurves:
    """Return the loss curves of a plan before allocation, if they are still in the journal."""
    plan = with_measured_times(session, plan)
    pending = [task for task in plan.tasks if task.pending]
    if not all(session.journal.has(energies_file(task.layer)) for task in pending):
        return {}
    return loss_curves(plan, _curves(session, plan, pending, no_progress))


def _allocate(session: Session, plan: Plan, *, predict_all: bool = False) -> Plan:
    return allocate(
        plan,
        session.models.reader,
        session.journal,
        session.statistics,
        device=session.device,
        on_step=session.on_step,
        predict_all=predict_all,
        finished=_forgetting(session),
    )


def _share_curves(session: Session, plan: Plan) -> None:
    """Let all processes write the curves of a plan, some layers each."""
    if not session.processes.alone and any(task.pending for task in plan.tasks):
        session.in_all_processes(_write_curves, plan)


def _write_curves(session: Session, plan: Plan) -> None:
    pending = [task for task in plan.tasks if task.pending]
    _curves(session, plan, _own_layers(pending, session.processes), session.on_step)


def _curves(session: Session, plan: Plan, tasks: Sequence[LayerTask], on_step: OnStep) -> Any:
    return curves_for(
        tasks,
        plan.allocations,
        session.models.reader,
        session.journal,
        session.statistics,
        device=session.device,
        on_step=on_step,
    )


def _own_layers(tasks: Sequence[LayerTask], processes: Processes) -> list[LayerTask]:
    """Return the tasks of the layers that this process is responsible for."""
    layers = sorted({task.layer for task in tasks})
    costs = [sum(relative_cost(t) for t in tasks if t.layer == layer) for layer in layers]
    own = dict(zip(layers, processes.owners(costs), strict=True))
    return [task for task in tasks if own[task.layer] == processes.rank]


def _forgetting(session: Session) -> Callable[[int], None]:
    """Return what deletes the statistics of a layer if they can be collected again."""
    return (lambda _: None) if session.segments is None else session.segments.forget


def _compress(session: Session, plan: Plan) -> Plan:
    """Compress the tasks of a plan in all processes; return it with the results."""
    refit = {task.layer for task in plan.tasks if task.compensate is not None}
    compensates = not all(session.journal.has(layer_file(layer)) for layer in refit)
    if compensates:
        session.windows()
    elif not session.processes.alone:
        session.in_all_processes(_compress_own_layers, plan)
    return session.in_all_processes(_compress_layers, plan, compensates)


def _compress_own_layers(session: Session, plan: Plan) -> None:
    """Compress the layers of this process: without compensation, they do not depend on others."""
    if tasks := _own_layers(plan.tasks, session.processes):
        _layers_of(session, replace(plan, tasks=tasks))


def _compress_layers(session: Session, plan: Plan, compensates: bool) -> Plan:
    """Compress all layers that are not in the journal, each by all processes."""
    segments = session.segments

    def finished(layer: int) -> None:
        if segments is not None:
            segments.finish(layer)
        session.journal.forget(*statistics.statistics_files(layer))

    return _layers_of(
        session,
        plan,
        prefix=SequentialCalibration(session.divided_calibration()) if compensates else None,
        finished=finished,
        processes=session.processes,
    )


def _layers_of(session: Session, plan: Plan, **options: Any) -> Plan:
    return compress_layers(
        plan,
        session.models.reader,
        session.journal,
        session.statistics,
        device=session.device,
        on_step=session.on_step,
        solved=session.solved,
        **options,
    )
