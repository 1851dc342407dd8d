"""`lrc recipes`: the recipes that come with lrc."""

from pathlib import Path
from typing import Annotated

import typer

from lrc.cli import console
from lrc.cli.options import Json
from lrc.configs import shipped
from lrc.configs.errors import UsageError

recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that come with lrc.")


@recipes_app.command("list")
def recipes_list(as_json: Json = False) -> None:
    """List the recipes that come with lrc."""
    summaries = {name: shipped.summary(name) for name in shipped.names()}
    if as_json:
        console.print_json(summaries)
    else:
        width = max(map(len, summaries))
        for name, summary in summaries.items():
            typer.echo(f"{name:<{width}}  {summary}")


@recipes_app.command("show")
def recipes_show(name: str) -> None:
    """Print a recipe that comes with lrc."""
    typer.echo(shipped.read(name), nl=False)


@recipes_app.command("copy")
def recipes_copy(
    name: str,
    to: Annotated[Path | None, typer.Argument(help="File to write; NAME.yaml here.")] = None,
) -> None:
    """Copy a recipe that comes with lrc, to edit it."""
    text = shipped.read(name)
    target = to or Path(f"{name}.yaml")
    if target.exists():
        raise UsageError(f"{target} exists already; name another file")
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        message = f"{target} cannot be written ({error.strerror}); name another file"
        raise UsageError(message) from error
    console.say(f"wrote {target}")
