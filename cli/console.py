"""Progress, signals and errors, on stderr; results go to stdout."""

import errno
import gc
import json
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

from lrc.cli.gate_results import annotation, on_github
from lrc.configs.errors import LrcError, Stopped

HEARTBEAT_SECONDS = 60.0
DISK = "check the disk and run the same command again"
OS_REMEDIES = {
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ELOOP: "a part of the path is a link to itself: name another one",
}
WITH_RECIPE = {"plan", "compress", "sweep", "latency"}
"""Commands that read a recipe."""
CONTINUING = {"compress", "sweep"}
"""Commands that keep finished steps in the output folder."""
SENSITIVITY = {"--sensitivity", "--profile", "--svg", "--format"}
"""Options with which `lrc plan` does too."""
LESS_MEMORY = (
    "lower calibration.memory_limit_gib or use --device cpu, and the same command continues; or "
    "lower calibration.samples or length and pass --overwrite"
)
RESTARTS = "the same command starts from the beginning"


def command_name() -> str:
    """Return the name of the command that was given, or an empty text."""
    return next((word for word in sys.argv[1:] if not word.startswith("-")), "")


def continues() -> bool:
    """Return whether the command that was given continues where it was stopped."""
    options = {word.partition("=")[0] for word in sys.argv[1:]}
    name = command_name()
    return name in CONTINUING or (name == "plan" and not SENSITIVITY.isdisjoint(options))


def at_once() -> str:
    """Say that the program stops before the end of a step."""
    place = "the same command continues from the last finished step"
    return f"stopped: at once; {place if continues() else RESTARTS}"


def print_json(value: Any) -> None:
    """Print a result as one JSON object to stdout."""
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


class Steps:
    """Progress of a run: bars on a terminal, otherwise one line per finished stage.

    Calling it records a step. After a first signal it raises `Stopped`, because between steps
    what a command keeps is on disk. Signals are ignored if `lost` returns True: launchers send one
    when a process of several has ended, and that is reported instead.
    """

    def __init__(self, *, quiet: bool, lost: Callable[[], bool] = lambda: False) -> None:
        self._quiet, self._lost = quiet, lost
        self.taken = 0
        self._signal: int | None = None
        self._started = self._printed = time.monotonic()  # the stage; the last line
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Record that `done` of `total` steps of a stage are finished."""
        self.taken += 1
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            then = "the same command continues from here" if continues() else RESTARTS
            raise Stopped(f"stopped on {name}; {then}")
        now = time.monotonic()
        if self._quiet:
            return
        if self._bars is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage)
            self._bars.update(self._tasks[stage], completed=done, total=total)
        elif done == total:
            say(f"{stage}: {total} of {total}, {now - self._started:.1f} s")
            self._started = self._printed = now
        elif now - self._printed > HEARTBEAT_SECONDS:
            self._printed = now
            say(f"{stage}: {done} of {total}")

    def warn(self, text: str) -> None:
        """Print a warning, also if quiet: a job of a pipeline shows nothing else."""
        warn(text)

    @contextmanager
    def running(self) -> Iterator["Steps"]:
        """Show progress and catch SIGINT and SIGTERM inside the context."""
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            if self._quiet or not sys.stderr.isatty():
                yield self
            else:
                from rich import progress
                from rich.console import Console

                columns = (
                    progress.TextColumn("{task.description:<32}"),
                    progress.BarColumn(),
                    progress.MofNCompleteColumn(),
                    progress.TimeElapsedColumn(),
                    progress.TimeRemainingColumn(),
                )
                with progress.Progress(*columns, console=Console(stderr=True)) as self._bars:
                    yield self
        finally:
            self._bars = None
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._lost():
            return
        if self._signal is not None:  # the second one: exit now
            if self._bars is not None:
                say("\x1b[?25h")  # show the cursor, which the bars have hidden
            say(at_once())
            os._exit(Stopped.exit_code)
        self._signal = number
        say("stopping after this step; a second signal stops at once")


def say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def preparing(recipe: object, *, quiet: bool) -> None:
    """Say on a terminal what takes ten seconds or more before there is progress to show."""
    if not quiet and sys.stderr.isatty():
        say(f"{recipe}: loading libraries, checking the model and planning")


def warn(text: str) -> None:
    """Print a warning to stderr."""
    say(f"warning: {text}")


class _Details(logging.Handler):
    """Prints messages of lrc's modules like warnings, above a progress display."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


def show_details() -> None:
    """Print what modules log for those who want to know more, besides warnings."""
    logger = logging.getLogger("lrc")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Details())
    logger.propagate = False


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep other libraries from printing and warning; enter before they are imported."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("TQDM_DISABLE", "1"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("COMPRESSED_TENSORS_LOG_DISABLED", "true"),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
        # MAGMA, with which CUDA would otherwise factor, is slower and prints advice to stdout.
        ("TORCH_LINALG_PREFER_CUSOLVER", "1"),
    ):
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with warnings.catch_warnings(action="ignore"):
        yield


def quiet_transformers() -> None:
    """Turn off the loading bars of transformers, for which there is no environment variable."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@contextmanager
def importing() -> Iterator[None]:
    """Collect no garbage within the context, and exclude what it makes from later collections.

    What torch and transformers import lives as long as the process. Looking through it again and
    again takes a fifth of the time of their import, and a run collects garbage after every stage.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def exit_code_of(error: BaseException, *, debug: bool) -> int:
    """Print an error for the user and return its exit code."""
    if debug and not isinstance(error, KeyboardInterrupt):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        say(at_once())
        return Stopped.exit_code
    if isinstance(error, Stopped):
        say(f"stopped: {str(error).removeprefix('stopped ')}")
        return error.exit_code
    if isinstance(error, LrcError):
        for problem in error.problems:
            say(f"error[{problem.code}]: {problem}")
            if on_github():
                say(annotation(problem))
        return error.exit_code
    if hasattr(error, "format_message"):  # typer's, about the command line
        text = " ".join(error.format_message().split()).removesuffix(".")
        if text:  # none if the help was shown instead
            command = getattr(getattr(error, "ctx", None), "command_path", "lrc")
            end = "" if text.endswith("?") else ";"
            sentence = f"{text[0].lower()}{text[1:]}{end}"
            say(f"error[usage]: {sentence} `{command} --help` lists its options")
        return int(getattr(error, "exit_code", 1))
    text = " ".join(str(error).split())[:500]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        remedy = LESS_MEMORY if continues() else "use --device cpu or a machine with more memory"
        say(f"error[out-of-memory]: out of memory ({text[:200] or 'no details'}); {remedy}")
    elif isinstance(error, OSError) and error.errno is not None:
        say(
            f"error[operating-system]: the operating system reports {text}; "
            f"{OS_REMEDIES.get(error.errno, DISK)}"
        )
    elif not debug:
        say(
            f"error[internal]: unexpected {type(error).__name__}: {text}; this is a bug in lrc: "
            "run `lrc --debug ...` and report the traceback"
        )
    return 1
