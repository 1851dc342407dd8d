"""Errors a user can act on; each class carries the exit code of the command that meets it.

A message says what is wrong, where, what is allowed, what was found, and what to do about it.
The command line prints it without a traceback (`lrc --debug` shows one).
"""

from typing import Any


class LrcError(Exception):
    """Base of every error that is the user's to fix."""

    exit_code = 1


class RecipeError(LrcError):
    """The recipe, an override or the command line asks for something that cannot be done.

    Parameters
    ----------
    problems : list of str
        Every problem found, one sentence group each; they are all shown at once.
    """

    exit_code = 2

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class ModelError(LrcError):
    """The source model is missing, damaged, not finite or of an unsupported architecture."""


class DataError(LrcError):
    """Calibration or evaluation text is missing, empty, binary or too short."""


class CheckpointError(LrcError):
    """A compressed checkpoint is damaged, tampered with or of a newer format."""


class OutputError(LrcError):
    """The output folder is taken, locked, read-only or full."""


class GateMissed(LrcError):
    """The run is complete and saved, but a quality gate of the recipe was missed.

    Parameters
    ----------
    missed : list of str
        One sentence for every missed gate.
    report : dict
        The report of the run.
    """

    exit_code = 4

    def __init__(self, missed: list[str], report: dict[str, Any]) -> None:
        self.report = report
        super().__init__("\n".join(missed))


class Stopped(LrcError):
    """A signal asked to stop; the state is saved and the same command continues."""

    exit_code = 75
