"""`lrc sweep`: one recipe with several values, and the best of the results."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrc.cli import console
from lrc.cli.options import Device, Json, Quiet, RecipeFile
from lrc.configs.axes import combinations, read_axes
from lrc.configs.errors import (
    EvaluationIncomplete,
    GateMissed,
    RecipeError,
    SweepIncomplete,
    TargetMissed,
    UsageError,
)
from lrc.configs.gate_text import parse_gate

if TYPE_CHECKING:
    from lrc.configs.recipe import Gate, Recipe

INCOMPLETE, INFEASIBLE = EvaluationIncomplete.default_code, "infeasible-budget"


def sweep(
    recipe: RecipeFile,
    values: Annotated[
        list[str] | None,
        typer.Argument(
            help="Overrides with one or more values, e.g. `keep=0.9,0.8 method=kfac,mixed`.",
            metavar="[KEY=VALUE[,VALUE]...]...",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of all runs; by default the output of the recipe with `-sweep` appended.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Find the smallest `keep` that meets a gate, such as 'perplexity.c4 <= 1.02x', "
            "by bisection.",
            metavar="GATE",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete earlier runs of these combinations.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe with all combinations of values; statistics are computed once."""
    from lrc.configs.load import load_recipe

    axes = read_axes(values or [])
    if "output" in axes:
        raise UsageError(
            f"output: is one folder for all runs of a sweep; write --output {axes['output'][0]}"
        )
    runs = combinations(axes)
    first = load_recipe(recipe, runs[0].overrides).recipe
    if len(runs) == 1 and target is None:
        raise UsageError(
            "lrc sweep: must have a key with several values, such as keep=0.9,0.8, or a --target; "
            "`lrc compress` runs a recipe once"
        )
    gate = None if target is None else _gate(target, axes, first)
    folder = (output or Path(f"{first.output}-sweep")).expanduser()
    with console.importing():
        from lrc.cli.sweep_table import print_sweep
        from lrc.compressors.io.files import write_text
        from lrc.compressors.io.machine import Machine
        from lrc.compressors.page.render import render_sweep
        from lrc.compressors.sweep.run_sweep import Sweep
        from lrc.compressors.sweep.target import search

        console.quiet_transformers()
    with console.Steps(quiet=quiet).running() as steps:
        machine = Machine(device, overwrite=overwrite, on_step=steps, on_warning=steps.warn)
        work = Sweep(recipe, folder, machine)
        if gate is None:
            work.load(runs)  # every mistake before any work
        with work.opened() as shared:
            if gate is None:
                work.run(runs, shared)
            else:
                search(work, shared, runs, gate)
    found = work.to_json()
    page, plot = render_sweep(found)
    write_text(folder / "sweep.html", page)
    if plot:
        write_text(folder / "sweep.svg", plot)
    if as_json:
        console.print_json(found)
    else:
        print_sweep(found, folder)
    _raise_problems(found)


def _gate(text: str, axes: dict[str, list[str]], recipe: "Recipe") -> "Gate":
    """Return the target, or refuse what cannot be searched for."""
    if "keep" in axes:
        raise UsageError(f"--target: searches keep, got keep={','.join(axes['keep'])}; remove it")
    from lrc.compressors.evaluate.gates import check_gate_names
    from lrc.configs.recipe import Gate

    try:
        gate = Gate.model_validate(parse_gate(text))
    except ValueError as error:
        raise UsageError(f"--target: {error}") from None
    try:
        check_gate_names([gate], recipe.evaluate)
    except RecipeError as error:
        key = re.compile(r"evaluate\.gates\[0\]\.\w+")
        raise UsageError(
            [replace(p, code="usage", where=key.sub("--target", p.where)) for p in error.problems]
        ) from None
    return gate


def _raise_problems(found: dict[str, Any]) -> None:
    """Raise an error with the worst that happened."""
    runs = found["runs"]
    failed = [run for run in runs if run["bytes"] is None or run["status"] == INCOMPLETE]
    if found["target"] is not None:
        failed = [run for run in failed if run["status"] != INFEASIBLE]
    if failed:
        raise SweepIncomplete("\n".join(f"{r['name']}: {p}" for r in failed for p in r["problems"]))
    if found["target"] is None:
        missed = [f"{run['name']}: {p}" for run in runs for p in run["problems"]]
        if missed:
            raise GateMissed(missed, found)
        return
    for each in found["target"]["found"]:
        if each["keep"] is None:
            where = ", ".join(f"{k}={v}" for k, v in each["values"].items())
            raise TargetMissed(
                f"{where or 'the recipe'}: no keep was found with {found['target']['gate']}; "
                "relax the target, or choose another method"
            )
