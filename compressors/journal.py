"""What is finished, on disk: the reason why a killed run can continue.

A run works in ``OUTPUT/work``. Every finished piece is one file there that appears under its name
only when it is whole (written beside, flushed to the disk, renamed), so that the files themselves
are the journal. ``run.json`` says which run they belong to; a lock keeps a second process out and
dies with the process that holds it.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrc.configs.errors import OutputError

IDENTITY = "run.json"
REMEDIES = {
    errno.ENOSPC: "the disk is full: free space and run the same command again, it continues",
    errno.EDQUOT: "the disk quota is used up: free space and run the same command again",
    errno.EFBIG: "the file is larger than this system allows: raise the limit or lower shard sizes",
    errno.EROFS: "the file system is read-only: choose another 'output'",
    errno.EACCES: "permission denied: choose another 'output'",
    errno.EPERM: "permission denied: choose another 'output'",
    errno.ENOTDIR: "a part of the path is a file: choose another 'output'",
    errno.EEXIST: "a file of that name is in the way: choose another 'output'",
    errno.ENOENT: "the folder cannot be made there: choose another 'output'",
}


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about `path` into one sentence with a remedy.

    Raises
    ------
    OutputError
    """
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        raise OutputError(f"{path}: cannot be written ({error.strerror}); {remedy}") from error
    except SafetensorError as error:  # its writer reports the errno in its text only
        for code, remedy in REMEDIES.items():
            if f"code: {code}," in str(error):
                raise OutputError(
                    f"{path}: cannot be written ({os.strerror(code)}); {remedy}"
                ) from error
        raise


class Journal:
    """The files of one run.

    Parameters
    ----------
    output : Path
        The recipe's output folder. Use `open_journal`, which locks it first.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.work = output / "work"

    def path(self, name: str) -> Path:
        """Return where the piece `name` lies, finished or not."""
        return self.work / name

    def has(self, name: str) -> bool:
        """Say whether the piece `name` is finished."""
        return self.path(name).exists()

    def write_json(self, name: str, value: Any) -> None:
        """Finish a piece that is a JSON value."""
        write_text(self.path(name), json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        """Read a finished JSON piece."""
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Finish a piece that is a set of tensors, with some facts about them."""
        write_tensors(self.path(name), tensors, metadata)

    def read_tensor(self, name: str, key: str) -> Tensor:
        """Read one tensor of a finished set into memory."""
        with safe_open(self.path(name), framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor.clone()  # what stays mapped stays resident

    def read_facts(self, name: str) -> dict[str, Any]:
        """Read the facts about a finished set of tensors."""
        with safe_open(self.path(name), framework="pt") as file:
            metadata = file.metadata() or {}
        return {key: json.loads(value) for key, value in metadata.items()}

    def forget(self, *names: str) -> None:
        """Delete pieces that nothing needs any more."""
        for name in names:
            path = self.path(name)
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(True)


@contextmanager
def open_journal(
    output: Path, identity: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[Journal]:
    """Enter an output folder: make it, lock it, and see whose work lies there.

    Parameters
    ----------
    output : Path
    identity : mapping
        What decides the result; a folder of another identity is not continued.
    overwrite : bool
        Throw away an earlier run of lrc in this folder. Nothing else is ever deleted.

    Raises
    ------
    OutputError
        Occupied by something else, by another run, or by a running process; or not writable.
    """
    journal = Journal(output)
    with storage_errors(output):
        if output.exists() and not output.is_dir():
            raise OutputError(f"output: {output} is a file; choose another folder")
        ours = (journal.work / IDENTITY).is_file()
        foreign = (
            output.is_dir()
            and not ours
            and any(entry.name != journal.work.name for entry in output.iterdir())
        )
        if foreign:
            raise OutputError(
                f"output: {output} is not empty and was not written by lrc compress; choose "
                "another folder, or move what is in it"
            )
        journal.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(journal.work / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"output: {output} is in use by another lrc compress; wait for it, or choose "
                "another folder"
            ) from None
        try:
            if ours and overwrite:
                _clear(journal)
            _claim(journal, identity)
            yield journal
        finally:
            lock.release()


def _claim(journal: Journal, identity: Mapping[str, Any]) -> None:
    identity = json.loads(json.dumps(identity))
    if not journal.has(IDENTITY):
        journal.write_json(IDENTITY, identity)
        return
    found = journal.read_json(IDENTITY)
    different = [key for key in identity if identity[key] != found.get(key)]
    if different:
        raise OutputError(
            f"output: {journal.output} holds a run that differs in {', '.join(different)}; choose "
            "another folder, or pass --overwrite to throw that run away"
        )


def _clear(journal: Journal) -> None:
    for path in [*journal.work.iterdir(), *journal.output.iterdir()]:
        if path.name in ("lock", journal.work.name):
            continue
        if path.parent == journal.work or path.name in ("checkpoint", "report.json", "README.md"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file that is either whole or not there."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        publish(partial, path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file that is either whole or not there; `metadata` as JSON values."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        facts = {key: json.dumps(value) for key, value in (metadata or {}).items()}
        save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata=facts)
        publish(partial, path)


def publish(partial: Path, final: Path) -> None:
    """Flush a finished file or folder to the disk and give it its name in one step."""
    with storage_errors(final):
        for path in [*partial.rglob("*"), partial] if partial.is_dir() else [partial]:
            _fsync(path)
        os.replace(partial, final)
        _fsync(final.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
