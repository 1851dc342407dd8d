"""Arguments and options that several commands share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from lrc.configs.errors import UsageError
from lrc.configs.shape import closest

T = TypeVar("T", bound=str)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Overrides, e.g. `stages.0.decompose.keep=0.6`.", metavar="[KEY=VALUE]..."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress on stderr; warnings and errors stay.")
]
Device = Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")]


def checkpoint_of(path: str) -> str:
    """Return the checkpoint in the output folder of a run; every other path is returned as it is.

    >>> checkpoint_of("HuggingFaceTB/SmolLM2-135M")
    'HuggingFaceTB/SmolLM2-135M'
    """
    folder = Path(path).expanduser()
    inside = folder / "checkpoint"
    is_run = not (folder / "config.json").exists() and (inside / "config.json").is_file()
    return str(Path(path) / "checkpoint") if is_run else path


Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="Folder of a checkpoint, or of the run that wrote it.",
        show_default=False,
        callback=lambda path: Path(checkpoint_of(str(path))),
    ),
]
Models = Annotated[
    list[str],
    typer.Argument(
        help="Folders of models or runs, Hub ids or .gguf files.",
        show_default=False,
        callback=lambda names: [checkpoint_of(str(named(name))) for name in names],
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a model.")
]


def named(model: str | None) -> str | None:
    """Refuse a model without a name."""
    if model is not None and not model.strip():
        raise typer.BadParameter("must be a folder, a .gguf file or a Hub id, got ''")
    return model


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


def known(option: str, value: str, allowed: Sequence[T], meant: Mapping[str, T] | None = None) -> T:
    """Return the one of the allowed values that was given, or raise `UsageError`.

    `meant` maps other words to the allowed value that they probably mean.
    """
    for each in allowed:
        if each == value:
            return each
    *others, last = allowed
    near = (meant or {}).get(value.lower()) or closest(value, [*allowed])
    hint = "choose one of them" if near is None else f"did you mean {near}?"
    raise UsageError(f"{option}: must be {', '.join(others)} or {last}, got {value!r}; {hint}")
