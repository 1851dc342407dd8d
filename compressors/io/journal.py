"""Finished pieces of a run on disk, so that a killed run can continue.

A run works in ``OUTPUT/work``. Every finished piece is one file that appears under its name only
when it is complete (written under another name, flushed, renamed). ``run.json`` identifies the
run; a lock excludes a second process and ends with the process that holds it.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
    errno.EFBIG: "larger than files may be here: raise the limit and run the same command again",
    errno.EROFS: "the file system is read-only: choose another 'output'",
    errno.EACCES: "permission denied: choose another 'output'",
    errno.EPERM: "permission denied: choose another 'output'",
    errno.ENOTDIR: "a part of the path is a file: choose another 'output'",
    errno.EEXIST: "a file of that name is in the way: choose another 'output'",
    errno.ENOENT: "the folder cannot be made there: choose another 'output'",
}
OS_ERROR = re.compile(r"(?:code: |os error )(\d+)")  # how safetensors writes an errno
# What a run writes to its output folder besides `work`; nothing else is ever deleted there. Not
# plan.json, which users edit and may refer to in a recipe.
RESULTS = ("checkpoint", "report.json", "README.md")
# A run that left only these has done no work and may be replaced by a corrected recipe.
CLAIMS = ("lock", IDENTITY, "seconds.json")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn operating system errors about `path` into an `OutputError` with a remedy."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None)
        if code is None and (found := OS_ERROR.search(str(error))):
            code = int(found[1])
        if code not in REMEDIES:
            raise
        raise OutputError(
            f"{path}: cannot be written ({os.strerror(code)}); {REMEDIES[code]}"
        ) from error


class Journal:
    """The files of a run in its output folder; use `open_journal`, which locks the folder first."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.work = output / "work"

    def path(self, name: str) -> Path:
        """Return the path of the piece `name`, finished or not."""
        return self.work / name

    def has(self, name: str) -> bool:
        """Return whether the piece `name` is finished."""
        return self.path(name).exists()

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON value as a finished piece."""
        write_text(self.path(name), json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        """Read a finished JSON piece."""
        with _damage(self.path(name)):
            return json.loads(self.path(name).read_text(encoding="utf-8"))

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Write a set of tensors and facts about them as a finished piece."""
        write_tensors(self.path(name), tensors, metadata)

    def read_tensor(self, name: str, key: str) -> Tensor:
        """Read one tensor of a finished set into memory."""
        return self.read_tensors(name, {key: key})[key]

    def read_tensors(self, name: str, keys: Mapping[str, str]) -> dict[str, Tensor]:
        """Read those tensors of a finished set that are in `keys`, which maps to new names."""
        with _damage(self.path(name)), safe_open(self.path(name), framework="pt") as file:
            present = [key for key in file.keys() if key in keys]
            # Cloned, because mapped pages stay resident.
            return {keys[key]: file.get_tensor(key).clone() for key in present}

    def read_facts(self, name: str) -> dict[str, Any]:
        """Read the facts about a finished set of tensors."""
        with _damage(self.path(name)), safe_open(self.path(name), framework="pt") as file:
            metadata = file.metadata() or {}
            return {key: json.loads(value) for key, value in metadata.items()}

    def forget(self, *names: str) -> None:
        """Delete pieces that are no longer needed."""
        for name in names:
            path = self.path(name)
            partial = path.with_name(_partial(path.name))
            shutil.rmtree(partial, ignore_errors=True)  # of an interrupted deletion
            if path.is_dir():  # renamed first: a half-deleted folder would count as finished
                shutil.rmtree(path.rename(partial), ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def open_journal(
    output: Path, identity: Mapping[str, Any], *, overwrite: bool = False
) -> Iterator[Journal]:
    """Create and lock an output folder, and check which run it belongs to.

    `identity` is what determines the result: a run of another identity is not continued. With
    `overwrite` an earlier run of lrc in this folder is deleted, and nothing else.

    Raises
    ------
    OutputError
        If it holds other files or another run, is in use, or is not writable.
    """
    journal = Journal(output)
    with storage_errors(output):
        _refuse_foreign(journal)
        journal.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(journal.work / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OutputError(
                f"output: {output} is in use by another lrc compress or lrc plan; wait for it, "
                "or choose another folder"
            ) from None
    try:
        with storage_errors(output):
            if overwrite:
                _clear(journal)
            _claim(journal, json.loads(json.dumps(identity)))
        yield journal
    finally:
        lock.release()


def _refuse_foreign(journal: Journal) -> None:
    output, work = journal.output, journal.work
    if output.exists() and not output.is_dir():
        raise OutputError(f"output: {output} is a file; choose another folder")
    if not output.is_dir() or (work / IDENTITY).is_file():
        return
    others = [f for f in output.iterdir() if f != work]
    if work.is_dir():
        others += [f for f in work.iterdir() if f.name not in ("lock", _partial(IDENTITY))]
    elif work.exists():
        others.append(work)
    if others:
        raise OutputError(
            f"output: {output} is not empty and was not written by lrc compress (it holds "
            f"{min(others).relative_to(output)}); choose another folder, or move what is in it"
        )


def _claim(journal: Journal, identity: dict[str, Any]) -> None:
    found = journal.read_json(IDENTITY) if journal.has(IDENTITY) else identity
    if found != identity:
        names = [path.name for path in journal.work.iterdir()]
        has_work = any(name not in CLAIMS and not name.endswith(".partial") for name in names)
        if has_work or (journal.output / "checkpoint").exists():
            differences = "; ".join(_differences(found, identity))
            raise OutputError(
                f"output: {journal.output} holds a run that differs in {differences}; choose "
                "another folder, or pass --overwrite to lrc compress to delete that run"
            )
        _clear(journal)
    if not journal.has(IDENTITY):
        journal.write_json(IDENTITY, identity)


def _differences(there: Any, here: Any, key: str = "") -> list[str]:
    """Describe where two JSON values differ, mappings key by key."""
    if there == here:
        return []
    if isinstance(there, dict) and isinstance(here, dict):
        inner = [(f"{key}.{k}".removeprefix("."), k) for k in [*there, *(here.keys() - there)]]
        return [d for name, k in inner for d in _differences(there.get(k), here.get(k), name)]
    values = [json.dumps(value, ensure_ascii=False) for value in (there, here)]
    short = max(map(len, values)) <= 60
    return [f"{key} ({values[0]} there, {values[1]} here)" if short else key]


def _clear(journal: Journal) -> None:
    """Delete what an earlier run has written; other files stay."""
    results = [journal.output / each for name in RESULTS for each in (name, _partial(name))]
    # The identity last: without it, the rest would be taken for files of others.
    work = sorted(journal.work.iterdir(), key=lambda path: path.name == IDENTITY)
    for path in [*results, *work]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink(missing_ok=True)


def _partial(name: str) -> str:
    return f".{name}.partial"


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, SafetensorError) as error:
        remedy = "delete it and run the same command again, which recreates it"
        if path.name == IDENTITY:
            remedy = "choose another folder, or pass --overwrite to lrc compress to delete that run"
        reason = str(error).strip()[:200]
        raise OutputError(f"{path}: is damaged ({reason}); {remedy}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears only when it is complete."""
    with _atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a safetensors file that appears only when complete; `metadata` are JSON values."""
    facts = {key: json.dumps(value) for key, value in (metadata or {}).items()}
    with _atomic(path) as partial:
        save_file({k: t.contiguous() for k, t in tensors.items()}, partial, metadata=facts)


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    partial = path.with_name(_partial(path.name))
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            publish(partial, path)
    except BaseException:
        with suppress(OSError):  # free the space, which the disk may lack
            partial.unlink(missing_ok=True)
        raise


def publish(partial: Path, final: Path) -> None:
    """Flush a finished file or folder to the disk and rename it atomically.

    Files get the permissions of new files: safetensors lets only their owner read them.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    with storage_errors(final):
        for path in [*partial.rglob("*"), partial] if partial.is_dir() else [partial]:
            if path.is_file():
                with suppress(PermissionError):  # of a file system without permissions
                    path.chmod(0o666 & ~umask)
            _fsync(path)
        os.replace(partial, final)
        _fsync(final.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
