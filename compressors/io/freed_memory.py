"""Give memory of the host back to the system as soon as it is no longer used."""

import ctypes
import mmap
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from lrc.configs.size import MIB

BATCH = 2 * MIB
"""Bytes of tensors that are collected before memory is given back: it takes milliseconds."""
MADV_DONTNEED = 4
"""Of Linux. Pages of a file that is mapped privately are read again if they are needed."""
MAPS = Path("/proc/self/maps")


def trim() -> None:
    """Return the pages of freed blocks to the system.

    glibc keeps them, in one arena per thread that has allocated.
    """
    if (run := _of_libc("malloc_trim")) is not None:
        run(0)


class ReplacedTensors:
    """Give back the memory of tensors that others have replaced while a model is loaded.

    transformers maps the files of a checkpoint into memory. A mapping lives as long as any tensor
    in it, so that the pages of replaced tensors would stay resident: the checkpoint would be in
    memory twice. On systems other than Linux nothing is given back.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def __call__(self, tensors: Iterable[Tensor]) -> None:
        """Accept tensors to which nothing else refers and which nothing has changed."""
        self._tensors += [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if sum(tensor.nbytes for tensor in self._tensors) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Give back the memory of all tensors since the last call."""
        drop_file_pages(self._tensors)
        self._tensors.clear()
        trim()


def drop_file_pages(tensors: Iterable[Tensor]) -> None:
    """Drop the pages of tensors in files that are mapped into memory.

    They are read from the file again if they are needed, so that changes of such a tensor are lost.
    Other tensors stay as they are.
    """
    advise = _of_libc("madvise")
    # Read each time: the tensors are alive now, so that the addresses are theirs.
    mapped = [] if advise is None else _mapped_files()
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0 and any(low <= start and end <= high for low, high in mapped):
            assert advise is not None
            advise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_DONTNEED)


def drop_shared_pages(tensor: Tensor) -> None:
    """Drop the pages of a tensor in a file that is mapped shared; its values stay in the file.

    For buffers that are larger than memory: without this, all pages that were used stay resident
    until another process needs memory. Other tensors stay as they are.
    """
    if tensor.device.type != "cpu" or tensor.untyped_storage().filename is None:
        return
    if (advise := _of_libc("madvise")) is not None:
        first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - first
        advise(ctypes.c_void_p(first), ctypes.c_size_t(length), MADV_DONTNEED)


def _mapped_files() -> list[tuple[int, int]]:
    """Return the addresses of private mappings of files."""
    try:
        lines = MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        # Those of a device, such as /dev/zero, would be lost.
        if "p" in permissions and path and path[0].startswith("/") and path[0][:5] != "/dev/":
            low, high = addresses.split("-")
            found.append((int(low, 16), int(high, 16)))
    return found


@cache
def _of_libc(name: str) -> Any:
    """Return a function of the C library; None if it has no such function, as musl."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
