"""Where the times of a budget in time come from: a file, or a measurement at the start of a run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lrc.compressors.io.versions import versions
from lrc.compressors.latency.latency_table import LatencyTable, Product, describe, read_table
from lrc.compressors.latency.product_timing import measure_table
from lrc.compressors.planning.compile import Draft, compile_plan
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.problems import Problems
from lrc.compressors.session import Session
from lrc.configs.decompose import DecomposeBase
from lrc.configs.errors import OutputError
from lrc.configs.recipe import Recipe

TIMES = "latency.json"
"""The journal's name for the table that a run has measured."""
COMMAND = "lrc latency RECIPE --output FILE"


def read_given_table(options: DecomposeBase, where: str, problems: Problems) -> LatencyTable | None:
    """Read the table that a stage names; None without one, or with the reason in `problems`."""
    path, key = options.latency_table, f"{where}.latency_table"
    if path is None:
        return None
    try:
        table = read_table(path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        problems.add(
            "unreadable-file", key, f"{path} cannot be read: {reason}; make it with: {COMMAND}"
        )
        return None
    except ValueError as error:
        problems.add("invalid-latency-table", key, f"{path}: {error}; make it with: {COMMAND}")
        return None
    if table.rows != options.rows:
        problems.add(
            "invalid-latency-table",
            key,
            f"{path} must have times for rows: {options.rows}, got {table.rows}; change 'rows', or "
            f"make another table with: {COMMAND}",
        )
        return None
    return table


def check_table(draft: Draft, where: str, products: Sequence[Product]) -> None:
    """Report products without times, and warn of times of other versions."""
    table = draft.table
    if table is None:
        return
    missing = table.missing(products)
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        draft.problems.add(
            "invalid-latency-table",
            f"{where}.latency_table",
            f"must have times of all products that the stage may choose, got none of "
            f"{describe(missing[0])}{more}; make a complete one with: {COMMAND}, or leave the key "
            "out to measure on this machine",
        )
    installed = versions()
    old = [f"{k} {v}" for k, v in table.versions.items() if installed.get(k) != v]
    if old:
        draft.warnings.append(
            f"{where}.latency_table: measured with {' and '.join(old)}, here are "
            f"{', '.join(f'{k} {installed.get(k)}' for k in table.versions)}; make it again if "
            "their kernels differ"
        )


def without_tables(recipe: Recipe) -> Recipe:
    """Return a recipe that names no table, so that all times are measured."""
    stages: list[Any] = []
    for stage in recipe.stages:
        if getattr(stage.options, "latency_table", None) is not None:
            options = stage.options.model_copy(update={"latency_table": None})
            stage = stage.model_copy(update={stage.kind: options})
        stages.append(stage)
    return recipe.model_copy(update={"stages": stages})


def with_measured_times(session: Session, plan: Plan) -> Plan:
    """Return the plan, compiled with measured times if it needs them.

    The table is a file of the journal, measured once per run.

    Raises
    ------
    RecipeError
        If the budget cannot be met.
    """
    if not plan.unmeasured:
        return plan
    from lrc.compressors.stages import STAGES

    prepared, journal = session.prepared, session.journal
    recipe, source, architecture = prepared.recipe, prepared.source, session.models.architecture
    given = (recipe, source, architecture, STAGES, plan.slices)
    if not journal.has(TIMES):
        stage = next(o for o in recipe.stages_of("decompose").values() if o.measure == "latency")
        with session.clock("latency"):
            table = measure_table(
                compile_plan(*given).products,
                device=session.device,
                dtype=session.models.dtype,
                rows=stage.rows,
                on_step=session.on_step,
            )
        journal.write_json(TIMES, table.to_json())
    try:
        table = LatencyTable.from_json(journal.read_json(TIMES))
    except ValueError as error:
        raise OutputError(
            f"{journal.path(TIMES)}: {error}; delete it and run the same command again, which "
            "measures the times again"
        ) from error
    again = compile_plan(*given, table=table).plan
    return replace(again, warnings=plan.warnings)
