"""Standard streams that cost no work: closed ones, a reader that is gone, an encoding too small."""

import io
import os
import sys
from typing import Any


class _Lossy(io.FileIO):
    """A stream that drops what can no longer be written."""

    errors: type[OSError] = BrokenPipeError  # the reader is gone, as in `| head -1`

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            # What is still buffered fails only once: not again when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if not isinstance(error, self.errors):
                raise
            return memoryview(data).nbytes


class _LossyMessages(_Lossy):
    """Messages are dropped for any reason; a full disk must not lose results without a word."""

    errors = OSError


def keep_writable() -> None:
    """Make the standard streams safe to write to, before anything is printed.

    A closed descriptor is opened on the null device: otherwise the next file that is opened would
    receive what libraries print. Characters that a stream cannot encode are escaped. Streams that
    are already replaced, as in tests, are left alone.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stdout is sys.__stdout__:
        sys.stdout = _replaced(sys.stdout, _Lossy(1, "w", closefd=False))
    if sys.stderr is sys.__stderr__:
        sys.stderr = _replaced(sys.stderr, _LossyMessages(2, "w", closefd=False))


def _replaced(stream: Any, raw: io.FileIO) -> io.TextIOWrapper:
    """Return a text stream like `stream`, which is None if it was closed."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=raw.isatty(),
    )
