"""`lrc plan --sensitivity`: predictions, their figure, and settings of other programs."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lrc.cli import console
from lrc.configs.errors import UsageError

if TYPE_CHECKING:
    from lrc.configs.load import LoadedRecipe


def run(
    loaded: "LoadedRecipe",
    windows: int | None,
    device: str,
    *,
    svg: Path | None,
    program: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Calibrate, allocate, and print or draw what is predicted.

    Parameters
    ----------
    windows : int or None
        Calibration windows on which predictions are checked.
    svg : Path or None
        File of the figure.
    program : str or None
        Program whose settings are printed instead of the table.

    Raises
    ------
    UsageError
        If there is nothing to predict, or an option is out of range.
    """
    _check(loaded, windows, svg, program, as_json=as_json)
    with console.importing():
        from lrc.cli.sensitivity import print_profile, print_sensitivity
        from lrc.compressors import pipeline
        from lrc.compressors.export.layer_settings import layer_settings
        from lrc.compressors.io.files import write_text
        from lrc.compressors.io.machine import Machine
        from lrc.compressors.page.sensitivity_plot import sensitivity_svg
        from lrc.compressors.planning.loss_curves import curves_json

        console.quiet_transformers()
    measured = None
    with console.Steps(quiet=quiet).running() as steps:
        machine = Machine(device, on_step=steps)  # warnings are printed with the plan
        if windows is None:
            found = pipeline.measure(loaded, machine)
        else:
            found, measured = pipeline.profile(loaded, windows, machine)
    plan = found.plan
    if svg is not None:
        if not found.curves:
            raise UsageError(
                "--svg: no curves of the loss by size, which methods with output gradients and "
                "allocation: lagrangian have until a run is finished; change the recipe or its "
                "output"
            )
        bits = {t.name: plan.stored_config(t) for t in plan.tasks}
        chosen = {
            task.name: task.bits_of(bits[task.name]) / (len(task.weights) * prod(task.shape))
            for task in plan.tasks
        }
        write_text(svg, sensitivity_svg(found.curves, chosen))
    if program is not None:
        settings = layer_settings(program, plan, found.architecture)
        typer.echo(settings.text)
        for note in [*settings.notes, *plan.warnings]:
            console.say(f"note: {note}")
    elif as_json:
        extra = {"profile": measured.to_json(plan)} if measured else {}
        extra |= {"curves": curves_json(found.curves)} if found.curves else {}
        console.print_json(plan.to_json() | extra)
    else:
        print_sensitivity(plan)
        if measured is not None:
            print_profile(plan, measured)


def _check(
    loaded: "LoadedRecipe",
    windows: int | None,
    svg: Path | None,
    program: str | None,
    *,
    as_json: bool,
) -> None:
    """Refuse what cannot be predicted, drawn or printed."""
    if not loaded.recipe.stages_of("decompose"):
        raise UsageError(
            "--sensitivity: shows predictions for 'decompose' stages, but the recipe has "
            "no 'decompose' stage; add one, or leave the option out"
        )
    samples = loaded.recipe.calibration.samples
    if windows is not None and not 1 <= windows <= samples:
        raise UsageError(
            f"--profile: must be in [1, {samples}], the windows of the calibration, got "
            f"{windows}; change it, or raise calibration.samples"
        )
    if svg is not None and svg.suffix.lower() != ".svg":
        raise UsageError(f"--svg: must end in .svg, got {svg}; name another file")
    if program is not None and as_json:
        raise UsageError("--json: --format prints the settings of a program; leave one out")
