"""Several processes on this machine, forked from this one, which has paid for the imports.

All calculate on one thread: a forked OpenMP would hang on two.
"""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from lrc.compressors.estimates.machine_rates import measure_rates

SECONDS = 100


class Forked:
    """Processes that call a function each; `wait` returns how they ended.

    Parameters
    ----------
    folder : Path
        For what they print.
    work : sequence of callable
        One function per process. Processes find each other by the variables of a launcher.
    """

    def __init__(self, folder: Path, work: Sequence[Callable[[], None]]) -> None:
        self._folder, threads = folder, torch.get_num_threads()
        torch.set_num_threads(1)
        measure_rates("cpu", torch.float32, folder)  # once, and not in every process
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ids = []
        for rank, call in enumerate(work):
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(work)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            child = os.fork()
            if child == 0:
                self._run(rank, call, {key: str(value) for key, value in variables.items()})
            self.ids.append(child)
        torch.set_num_threads(threads)

    def wait(self) -> list[int]:
        """Return the exit codes; -N for signal N, and 70 for an exception."""
        return [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in self.ids]

    def printed(self, rank: int) -> str:
        """Return what a process has written to stderr."""
        return (self._folder / f"{rank}.err").read_text()

    def _run(self, rank: int, call: Callable[[], None], variables: dict[str, str]) -> NoReturn:
        code = 70
        try:
            signal.alarm(SECONDS)
            os.environ.update(variables)
            for number, kind in ((1, "out"), (2, "err")):
                path = self._folder / f"{rank}.{kind}"
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            torch.set_num_threads(1)  # makes torch's pool again, before threads race for it
            call()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 70
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # without the handlers of pytest
