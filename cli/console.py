"""What a user sees besides results: progress, signals, errors. All of it on stderr."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lrc.configs.errors import LrcError, Stopped

HEARTBEAT_SECONDS = 60.0
AT_ONCE = "stopped: at once; the same command continues from the last finished step"


class Steps:
    """Progress of a run: bars on a terminal, one line a finished stage elsewhere.

    Calling it notes a step. It raises `Stopped` after a first signal: steps are the places where
    everything finished is on disk.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self.taken = 0
        self._signal: int | None = None
        self._stage = ""
        self._started = self._spoke = time.monotonic()  # of the stage, and of the last line
        self._bars: Any = None
        self._task: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Note that `done` of `total` steps of a stage are finished."""
        self.taken += 1
        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise Stopped(f"stopped on {name}; the same command continues from here")
        if self._quiet:
            return
        if self._bars is not None:
            self._draw(stage, done, total)
            return
        now = time.monotonic()
        if done == total:
            say(f"{stage}: {total} of {total}, {now - self._started:.1f} s")
            self._started = self._spoke = now
        elif now - self._spoke > HEARTBEAT_SECONDS:
            self._spoke = now
            say(f"{stage}: {done} of {total}")

    def _draw(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            self._task = self._bars.add_task(stage, total=total)
        self._bars.update(self._task, completed=done, total=total)

    @contextmanager
    def running(self) -> Iterator["Steps"]:
        """Show progress and catch SIGINT and SIGTERM while the body runs."""
        before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            if self._quiet or not sys.stderr.isatty():
                yield self
            else:
                from rich.console import Console
                from rich.progress import (
                    BarColumn,
                    MofNCompleteColumn,
                    Progress,
                    TextColumn,
                    TimeElapsedColumn,
                    TimeRemainingColumn,
                )

                columns = (
                    TextColumn("{task.description:<32}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                )
                with Progress(*columns, console=Console(stderr=True)) as self._bars:
                    yield self
        finally:
            self._bars = None
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:  # asked twice: leave now; what is finished is on disk
            if self._bars is not None:
                say("\x1b[?25h")  # the cursor, which the bars have hidden
            say(AT_ONCE)
            os._exit(Stopped.exit_code)
        self._signal = number
        say("stopping after this step; a second signal stops at once")


def say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def hush() -> None:
    """Keep the libraries below from talking over us; call before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("COMPRESSED_TENSORS_LOG_DISABLED", "true")
    # What CUDA would otherwise factor with (MAGMA) is slower, and prints advice to stdout.
    os.environ.setdefault("TORCH_LINALG_PREFER_CUSOLVER", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")


def quiet_transformers() -> None:
    """Turn off the loading bars of transformers (there is no environment variable for them)."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def exit_code_of(error: BaseException, *, debug: bool) -> int:
    """Print an error as its user should see it and return the exit code it stands for."""
    if debug and not isinstance(error, KeyboardInterrupt):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        say(AT_ONCE)
        return Stopped.exit_code
    if isinstance(error, Stopped):
        say(f"stopped: {str(error).removeprefix('stopped ')}")
        return error.exit_code
    if isinstance(error, LrcError):
        for problem in error.problems:
            say(f"error[{problem.code}]: {problem}")
        return error.exit_code
    if hasattr(error, "format_message"):  # typer's: the command line is wrong
        return _usage(error)
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        reason = " ".join(str(error).split())[:200]
        say(
            f"error[out-of-memory]: out of memory ({reason or 'no details'}); lower "
            "calibration.memory_limit_gib or use --device cpu, and the same command continues; "
            "or lower calibration.samples or length and pass --overwrite"
        )
        return 1
    text = " ".join(str(error).split())[:500]
    if isinstance(error, OSError) and error.errno is not None:
        say(
            f"error[system]: the operating system reports {text}; check the disk and run the same "
            "command again, it continues"
        )
    elif not debug:
        say(
            f"error[internal]: unexpected {type(error).__name__}: {text}; this is a fault of lrc: "
            "run `lrc --debug ...` and report the traceback"
        )
    return 1


def _usage(error: Any) -> int:
    text = " ".join(error.format_message().split()).removesuffix(".")
    command = getattr(error.ctx, "command_path", "lrc")
    if text:  # none where the help was shown instead
        end = "" if text.endswith("?") else ";"
        say(f"error[usage]: {text[0].lower()}{text[1:]}{end} `{command} --help` says what it takes")
    return int(error.exit_code)
