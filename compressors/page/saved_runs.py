"""Find the reports of finished runs, and check that pages can be made of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.checkpoint.manifest import CHECKSUM, report_checksum
from lrc.compressors.io.journal import IDENTITY, WORK
from lrc.compressors.io.json_text import parse_json
from lrc.compressors.report import SCHEMA_VERSION
from lrc.configs.errors import CheckpointError, UsageError

REPORT = "report.json"
GIVEN = f"{layout.FOLDER}/recipe.given.yaml"
"""The recipe as it was written, in a checkpoint."""
AGAIN = "run the same `lrc compress` command again, which writes it again"


@dataclass(frozen=True)
class SavedRun:
    """A finished run."""

    name: str
    """Of its folder."""
    report: dict[str, Any]
    """The content of ``report.json``."""
    recipe: str | None
    """The recipe as it was written; None if the checkpoint of the run is not there."""
    folder: Path
    """Where its page belongs: never into a checkpoint, whose files are listed."""


def read_run(path: Path) -> SavedRun:
    """Read a finished run.

    Parameters
    ----------
    path : Path
        The output folder of a run, its checkpoint, or its ``report.json``.

    Raises
    ------
    UsageError
        If there is no report.
    CheckpointError
        If the report is damaged, was edited, or has another version.
    """
    file, checkpoint = _find(path)
    report = _read(file)
    _check_version(file, report)
    if (checkpoint / layout.MANIFEST).is_file() and (
        report.get(CHECKSUM) != report_checksum(checkpoint, report)
    ):
        raise CheckpointError(
            f"{file}: has changed since it was written, or belongs to another checkpoint; {AGAIN}",
            code="changed-file",
        )
    folder = file.parent
    if folder.name == layout.FOLDER:
        folder = checkpoint.parent
    name = checkpoint.name if checkpoint.name != "checkpoint" else folder.resolve().name
    return SavedRun(name, report, _recipe(checkpoint), folder)


def finished_run(output: Path, report: dict[str, Any]) -> SavedRun:
    """Return the run that has just written `report` into its output folder."""
    return SavedRun(output.resolve().name, report, _recipe(output / "checkpoint"), output)


def _find(path: Path) -> tuple[Path, Path]:
    """Return the report of a run and the folder of its checkpoint, which may not exist."""
    path = path.expanduser()
    if path.is_file():
        folder = path.parent
        inside = folder.name == layout.FOLDER
        return path, folder.parent if inside else folder / "checkpoint"
    if (path / REPORT).is_file():
        return path / REPORT, path / "checkpoint"
    if (path / layout.REPORT).is_file():
        return path / layout.REPORT, path
    if not path.exists():
        raise UsageError(
            f"{path}: no such folder; give the output folder of a finished run of `lrc compress`"
        )
    unfinished = (path / WORK / IDENTITY).is_file()
    raise UsageError(
        f"{path}: a run that is not finished, without {REPORT}; continue it with `lrc compress`"
        if unfinished
        else f"{path}: not the output folder of a run, it has no {REPORT}; give the 'output' of a "
        "recipe that `lrc compress` has run"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not a readable JSON file ({error}); {AGAIN}", code="invalid-report"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file}: must be a JSON object, got {value!r:.60}; {AGAIN}", code="invalid-report"
        )
    return value


def _check_version(file: Path, report: dict[str, Any]) -> None:
    version = report.get("schema_version")
    if version == SCHEMA_VERSION and type(version) is int:
        return
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{file}: not a report of lrc: schema_version must be {SCHEMA_VERSION}, got "
            f"{version!r:.60}; give the {REPORT} of a run",
            code="invalid-report",
        )
    remedy = f"{AGAIN} with --overwrite" if version < SCHEMA_VERSION else "upgrade lrc"
    raise CheckpointError(
        f"{file}: was written by another version of lrc: schema_version must be {SCHEMA_VERSION}, "
        f"got {version}; {remedy}",
        code="report-version",
    )


def _recipe(checkpoint: Path) -> str | None:
    try:
        return (checkpoint / GIVEN).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
