"""Errors that a user can act on, each with a stable code and the exit code of the command.

A message says what is wrong, what is allowed, what was found, and what to do about it. The command
line prints it without a traceback (`lrc --debug` shows one).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    code: str
    """Short and stable, in kebab case, such as `unknown-key`; it does not change with `message`."""
    where: str
    """Key path of the recipe, file, or name of a layer; may be empty."""
    message: str
    source: str = ""
    """The line of the file or the override that wrote the value at `where`; may be empty."""

    @classmethod
    def parse(cls, text: str, code: str = "invalid-recipe") -> "Problem":
        """Split a sentence of the form `where: message`; `where` has no spaces.

        >>> Problem.parse("stages[0].decompose.keep: must be at most 1, got 2").where
        'stages[0].decompose.keep'
        """
        found = re.match(r"(\S+): (?=\S)", text)
        where = found[1] if found else ""
        return cls(code, where, text[found.end() :] if found else text)

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.source, self.where, self.message)))


class LrcError(Exception):
    """Base of every error that the user can correct.

    Several lines of the message are several problems, all of the same `code`, by default that of
    the class, and about the same file, key path or layer, `where`.
    """

    exit_code = 1
    default_code = "failed"

    def __init__(self, message: str, *, code: str | None = None, where: str = "") -> None:
        self.code = self.default_code if code is None else code
        self.problems = [Problem(self.code, where, line) for line in message.splitlines()]
        super().__init__("\n".join(map(str, self.problems)))


class RecipeError(LrcError):
    """The recipe or an override requests something impossible.

    All problems are shown together. Plain sentences, `where: message`, have the code of the class;
    a single one needs no list.
    """

    exit_code = 2
    default_code = "invalid-recipe"

    def __init__(self, problems: str | Sequence[Problem | str]) -> None:
        problems = [problems] if isinstance(problems, str) else problems
        code = self.default_code
        found = [Problem.parse(each, code) if isinstance(each, str) else each for each in problems]
        super().__init__("\n".join(map(str, found)), code=found[0].code if found else None)
        self.problems = found


class UsageError(RecipeError):
    """An argument or option of the command line requests something impossible."""

    default_code = "usage"


class ModelError(LrcError):
    """The source model is missing, damaged, not finite or of an unsupported architecture."""

    default_code = "invalid-model"


class DataError(LrcError):
    """Calibration or evaluation text is missing, empty, binary or too short."""

    default_code = "invalid-text"


class CheckpointError(LrcError):
    """A compressed checkpoint is damaged, modified or of a newer format."""

    default_code = "invalid-checkpoint"


class ExportError(LrcError):
    """A checkpoint cannot be expressed in the requested format."""

    default_code = "cannot-export"


class DeltaError(LrcError):
    """A delta cannot be made, is damaged, or does not belong to this base model."""

    default_code = "invalid-delta"


class OutputError(LrcError):
    """The output folder is in use, locked, read-only or full."""

    default_code = "invalid-output"


class ProcessLost(LrcError):
    """A process of a run in several processes has ended; the same command continues."""

    default_code = "process-lost"


class EvaluationIncomplete(LrcError):
    """The run is complete and saved, but some texts or tasks could not be measured."""

    default_code = "evaluation-incomplete"

    def __init__(self, missing: list[str], report: dict[str, Any]) -> None:
        self.report = report
        super().__init__("\n".join(missing))


class BenchmarkIncomplete(LrcError):
    """Some speeds could not be measured; the others are shown."""

    default_code = "benchmark-incomplete"


class GateMissed(LrcError):
    """The run is complete and saved, but missed quality gates of the recipe: one sentence each."""

    exit_code = 4
    default_code = "gate-missed"

    def __init__(self, missed: list[str], report: dict[str, Any]) -> None:
        self.report = report
        super().__init__("\n".join(missed))


class SweepIncomplete(LrcError):
    """Some runs of a sweep failed; the others are complete and saved."""

    default_code = "sweep-incomplete"


class TargetMissed(LrcError):
    """No run of a sweep meets the target; the runs are complete and saved."""

    exit_code = 4
    default_code = "target-missed"


class Stopped(LrcError):
    """A signal requested a stop; the state is saved, and the same command continues the run."""

    exit_code = 75
    default_code = "stopped"
