"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Overrides, e.g. `stages.0.decompose.keep=0.6`.", metavar="[KEY=VALUE]..."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no warnings on stderr.")
]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model.")
]


def positive(number: int | None) -> int | None:
    """Refuse an option below 1."""
    if number is not None and number < 1:
        raise typer.BadParameter(f"must be a whole number >= 1, got {number}")
    return number


def all_positive(numbers: list[int] | None) -> list[int] | None:
    """Refuse an option that was given a number below 1."""
    for number in numbers or []:
        positive(number)
    return numbers
