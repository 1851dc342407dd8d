"""`lrc export`: write a checkpoint in another size."""

from pathlib import Path
from typing import Annotated

import typer

from lrc.cli import console
from lrc.configs.errors import RecipeError


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="Folder to create.", show_default=False)],
    keep: Annotated[
        float | None,
        typer.Option(
            help="A budget of an elastic checkpoint, such as 0.7; nothing is calibrated.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a smaller budget of an elastic checkpoint as an ordinary checkpoint."""
    if keep is None:
        raise RecipeError("--keep: missing; give a budget of the checkpoint, such as --keep 0.7")
    from lrc.compressors.checkpoint.export import export_budget

    console.quiet_transformers()
    export_budget(checkpoint, output, keep, key="--keep")
    console.say(f"wrote {output}")
