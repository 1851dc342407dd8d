"""Watch the processes of a run, from the opening of its output folder to its end."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from lrc.compressors.distributed.processes import Processes
from lrc.compressors.distributed.watch import Watch
from lrc.configs.errors import OutputError

FOLDER = "processes"
"""Folder of the journal with the locks and logs of all processes."""
TOKEN = "token"
SHARED_SECONDS = 30.0
"""Time in which a file that one host has written must appear on the others."""


@contextmanager
def watched(
    processes: Processes, work: Path, on_lost: Callable[[list[int]], None]
) -> Iterator[None]:
    """Watch the other processes inside the context, which all of them enter and leave.

    Parameters
    ----------
    work : Path
        Folder of the journal, which exists.
    on_lost : callable
        Called in a thread with the numbers of the processes that have ended inside the context.

    Raises
    ------
    OutputError
        If a process does not see the same folder.
    """
    if processes.alone:
        yield
        return
    folder = work / FOLDER
    token = processes.agree(uuid4().hex)
    if processes.first:
        folder.mkdir(exist_ok=True)
        (folder / TOKEN).write_text(token)
    processes.barrier()
    seen = _appears(folder / TOKEN, token)
    hosts = [host for host, sees in processes.gather((socket.gethostname(), seen)) if not sees]
    if hosts:
        raise OutputError(
            f"output: {work.parent} is not the same folder on {', '.join(sorted({*hosts}))} as on "
            "the host of the first process; choose one on a file system that all hosts share",
            code="not-shared",
        )
    processes.watch = Watch(folder, processes.rank, processes.size, on_lost)
    processes.barrier()
    processes.watch.start()
    yield
    processes.watch.stop()
    processes.barrier()
    processes.watch.release()
    processes.watch = None


def _appears(path: Path, content: str) -> bool:
    until = time.monotonic() + SHARED_SECONDS
    while True:
        try:
            if path.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
