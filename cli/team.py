"""`lrc compress` as one of several processes: the first one prints, and each writes a log."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lrc.cli import console
from lrc.configs.errors import LrcError, ProcessLost, RecipeError

if TYPE_CHECKING:
    from lrc.compressors.distributed.processes import Processes
    from lrc.compressors.io.machine import Machine
    from lrc.configs.load import LoadedRecipe

WATCH_SECONDS = 10.0
"""Time in which `Watch` finds out which process a failed communication is due to."""


@dataclass
class Team:
    """All processes of a run, seen from one of them."""

    processes: "Processes"
    log: "Log"

    def machine(self, machine: "Machine", loaded: "LoadedRecipe") -> "Machine":
        """Return the machine of a process that executes a recipe together with the others."""
        self.log.open(loaded.recipe.output, self.processes.rank)
        return replace(
            machine,
            device=self.processes.device,
            on_step=self.log.steps(machine.on_step),
            processes=self.processes,
            on_lost=self.on_lost,
        )

    @property
    def assists(self) -> bool:
        """Whether another process has the lead: writes the results and shows progress."""
        return not self.processes.first

    def assist(self, loaded: "LoadedRecipe") -> None:
        """Execute a recipe under the lead of another process."""
        with console.importing():
            from lrc.compressors.io.machine import Machine
            from lrc.compressors.pipeline import assist

            console.quiet_transformers()
        assist(loaded, self.machine(Machine(self.processes.device), loaded))

    def on_lost(self, ranks: list[int]) -> None:
        """End this process; the first that notices says why."""
        from lrc.compressors.distributed.launch import is_first_failure

        which = f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        text = (
            f"{which} of {self.processes.size} ended unexpectedly (killed, or out of memory), and "
            "the others have stopped; the same command continues from the last finished step, with "
            "any number of processes"
        )
        self.log.write(text)
        if is_first_failure(self.processes):
            if sys.stderr.isatty():
                console.say("\x1b[?25h")  # show the cursor, which bars have hidden
            console.say(f"error[process-lost]: {text}")
        os._exit(1)


class Log:
    """The steps of this process, in the folder of the run."""

    def __init__(self) -> None:
        self._path: Path | None = None

    def open(self, output: str, rank: int) -> None:
        """Write to a file in the output folder from now on, as soon as that exists."""
        from lrc.compressors.distributed.lifetime import FOLDER
        from lrc.compressors.io.journal import WORK

        self._path = Path(output).expanduser() / WORK / FOLDER / f"{rank}.log"

    def write(self, text: str) -> None:
        """Append a line with the time."""
        if self._path is not None and self._path.parent.is_dir():
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def steps(self, then: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
        """Return a progress callback that writes to the log and calls `then`."""

        def on_step(stage: str, done: int, total: int) -> None:
            self.write(f"{stage}: {done} of {total}")
            then(stage, done, total)

        return on_step


_team: Team | None = None


def is_one_of_several() -> bool:
    """Return whether a launcher has started several processes; imports nothing heavy."""
    return os.environ.get("WORLD_SIZE", "1").strip() not in ("", "1")


def join(device: str) -> Team:
    """Connect to the other processes that a launcher has started.

    Raises
    ------
    RecipeError
        If they cannot work together.
    """
    global _team
    with console.importing():
        from lrc.compressors.distributed.launch import join, process_device

    _team = Team(join(process_device(device)), Log())
    if _team.assists:  # the first process stops the others
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return _team


def lost() -> bool:
    """Return whether another process has ended unexpectedly."""
    watch = None if _team is None else _team.processes.watch
    return watch is not None and bool(watch.lost())


def refuse_several(command: str | None) -> None:
    """Refuse to run a command in several processes that does not divide its work."""
    if command not in (None, "compress") and is_one_of_several():
        raise RecipeError(
            f"{command}: runs in one process (only `lrc compress` divides its work); start it "
            "without torchrun or accelerate launch, or unset WORLD_SIZE"
        )


def end() -> None:
    """Disconnect after a complete run."""
    if _team is not None:
        from torch import distributed

        distributed.destroy_process_group()


def exit_code_of(error: BaseException, *, debug: bool) -> int:
    """Print an error for the user, once for all processes, and return its exit code."""
    if _team is None:
        if is_one_of_several() and os.environ.get("LOCAL_RANK", "0") != "0":
            return int(getattr(error, "exit_code", 1))
        return console.exit_code_of(error, debug=debug)
    from lrc.compressors.distributed.launch import is_first_failure

    _team.log.write("".join(traceback.format_exception(error)))
    if isinstance(error, ProcessLost) and _team.processes.watch is not None:
        time.sleep(WATCH_SECONDS)  # ends in `on_lost`
    if is_first_failure(_team.processes):
        code = console.exit_code_of(error, debug=debug)
    else:
        code = error.exit_code if isinstance(error, LrcError) else 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # other threads may wait for a process that has ended
