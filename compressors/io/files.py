"""Write files and folders that appear under their names only when they are complete."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from lrc.configs.errors import OutputError

REMEDIES = {
    errno.ENOSPC: "the disk is full: free space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free space and run the same command again",
    errno.EFBIG: "larger than files may be here: raise the limit and run the same command again",
    errno.EROFS: "the file system is read-only: choose another 'output'",
    errno.EACCES: "permission denied: choose another 'output'",
    errno.EPERM: "permission denied: choose another 'output'",
    errno.ENOTDIR: "a part of the path is a file: choose another 'output'",
    errno.EEXIST: "a file of that name is in the way: choose another 'output'",
    errno.EISDIR: "a folder of that name is in the way: move it, or choose another 'output'",
    errno.ENOTEMPTY: "a folder of that name is in the way: move it, or choose another 'output'",
    errno.ENOENT: "the folder cannot be made there: choose another 'output'",
    errno.ELOOP: "a part of the path is a link to itself: choose another 'output'",
    errno.ENAMETOOLONG: "the name is too long: choose another 'output'",
}
SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
"""What `numpy.ndarray.tofile` says of a full disk, without an errno."""
_UMASK = Lock()
"""Reading the umask sets it for a moment, and threads publish files at the same time."""
OS_ERROR = re.compile(r"(?:code: |os error )(\d+)")  # how safetensors and tokenizers write an errno


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn operating system errors about `path` into an `OutputError` with a remedy.

    Errors that name a file elsewhere, such as one that is read meanwhile, pass through.
    """
    try:
        yield
    except Exception as error:  # tokenizers raises Exception itself
        code = getattr(error, "errno", None)
        if code is None and (found := OS_ERROR.search(str(error))):
            code = int(found[1])
        if code is None and SHORT_WRITE.fullmatch(str(error)):
            code = errno.ENOSPC
        named = getattr(error, "filename", None)
        if code not in REMEDIES or (named and not _concerns(Path(os.fsdecode(named)), path)):
            raise
        raise OutputError(
            f"{path}: cannot be written ({os.strerror(code)}); {REMEDIES[code]}"
        ) from error


def _concerns(named: Path, path: Path) -> bool:
    """Return whether a file is in the folder of `path`, or is one of the folders above."""
    named, folder = named.absolute(), path.absolute().parent
    return named.is_relative_to(folder) or folder.is_relative_to(named)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears only when it is complete."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file that appears only when complete; `metadata` are JSON values."""
    facts = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    with new_file(path) as partial:
        save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata=facts)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to, which gets its final name only when it is complete.

    On a clean exit it is flushed and renamed, on an error removed.

    Raises
    ------
    OutputError
        If it could not be written.
    """
    partial = partial_path(path)
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            publish(partial, path)
    except BaseException:
        with suppress(OSError):  # free the space, which the disk may lack
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to write into, which gets its final name only when it is complete.

    On a clean exit it is flushed and renamed, on an error removed.

    Raises
    ------
    OutputError
        If something could not be written.
    """
    partial = partial_path(final)
    try:
        with storage_errors(final):
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            partial.mkdir(parents=True)
            yield partial
            publish(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def one_writer(final: Path) -> Iterator[None]:
    """Exclude other processes that write the same new file or folder.

    Both would write under the same unfinished name. Runs lock their output folder instead.

    Raises
    ------
    OutputError
        If another process is writing it, or has written it by now.
    """
    missing = [folder for folder in final.parents if not folder.exists()]  # the nearest first
    lock = FileLock(final.with_name(f".{final.name}.lock"))
    try:
        with storage_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            with suppress(NotImplementedError):  # a file system without locks
                lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"{final}: another process is writing it; wait for it, or choose another name"
        ) from error
    try:
        if final.exists() or final.is_symlink():
            raise OutputError(f"{final}: exists by now; choose another name, or delete it")
        yield
    finally:
        with suppress(OSError):  # while it is held: nobody else can have locked it
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # stops at the first that is not empty
            for folder in missing:
                folder.rmdir()


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder and below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists, in one step: its name is free, or it is unchanged."""
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted deletion
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path.rename(partial), ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Return the path under which a file or folder is written or deleted."""
    return path.with_name(f".{path.name}.partial")


def publish(partial: Path, final: Path) -> None:
    """Flush a finished file or folder to the disk and rename it atomically.

    Files get the permissions of new files: safetensors lets only their owner read them.
    """
    with _UMASK:
        umask = os.umask(0o077)
        os.umask(umask)
    with storage_errors(final):
        for path in [*partial.rglob("*"), partial] if partial.is_dir() else [partial]:
            if path.is_file():
                with suppress(PermissionError):  # of a file system without permissions
                    path.chmod(0o666 & ~umask)
            flush(path)
        os.replace(partial, final)
        flush(final.parent)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
