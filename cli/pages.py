"""`lrc report`: the reports of runs as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from lrc.cli import console
from lrc.cli.options import Json
from lrc.configs.errors import UsageError

COMPARISON = Path("comparison.html")


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Output folders of finished runs; several are compared.",
            metavar="RUN...",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page to write, in place of an earlier one; `report.html` in the folder of "
            "the run, or for several runs `comparison.html`.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the report of a run, or a comparison of several runs, as one HTML page."""
    if output is not None and output.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--output: must end in .html, got {output}; name another file")
    from lrc.compressors.io.files import write_text
    from lrc.compressors.page.page_file import PAGE
    from lrc.compressors.page.render import render
    from lrc.compressors.page.saved_runs import read_run

    found = [read_run(path) for path in runs]
    if output is None:
        output = COMPARISON if len(found) > 1 else found[0].folder / PAGE
    write_text(output, render(found))
    if as_json:
        names = [{"name": run.name, "folder": str(run.folder)} for run in found]
        console.print_json({"page": str(output), "runs": names})
    else:
        typer.echo(f"page: {output}")
