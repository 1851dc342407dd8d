"""Finished pieces of a run on disk, so that a killed run can continue.

A run works in ``OUTPUT/work``. Every finished piece is one file that appears under its name only
when it is complete (written under another name, flushed, renamed). ``run.json`` identifies the
run; a lock excludes a second process and ends with the process that holds it.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lrc.compressors.distributed.lifetime import FOLDER as PROCESSES
from lrc.compressors.io.device_copies import to_device
from lrc.compressors.io.files import (
    new_file,
    new_folder,
    partial_path,
    remove,
    storage_errors,
    write_tensors,
    write_text,
)
from lrc.configs.errors import OutputError

WORK, LOCK, IDENTITY = "work", "lock", "run.json"
FILES = "files.json"
"""Names and sizes of the files of a finished folder."""
# What a run writes to its output folder besides `work`; nothing else is ever deleted there. Not
# plan.json, which users edit and may refer to in a recipe.
RESULTS = ("checkpoint", "report.json", "report.html", "README.md")
# A run that left only these has done no work and may be replaced by a corrected recipe.
CLAIMS = (LOCK, IDENTITY, "seconds.json", "estimate.json", PROCESSES)
# Instead of the identity of a run, of which any part may be deleted already.
DELETING = {"deleting": True}


class Journal:
    """The files of a run in its output folder; use `open_journal`, which locks the folder first."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.work = output / WORK

    def path(self, name: str) -> Path:
        """Return the path of the piece `name`, finished or not."""
        return self.work / name

    def has(self, name: str) -> bool:
        """Return whether the piece `name` is finished; a folder must have all of its files."""
        path = self.path(name)
        return _is_whole(path) if path.is_dir() else path.exists()

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

    def read_tensors(
        self, name: str, keys: Mapping[str, str], device: str = "cpu"
    ) -> dict[str, Tensor]:
        """Read those tensors of a finished set that are in `keys`, which maps to new names."""
        with _damage(self.path(name)), safe_open(self.path(name), framework="pt") as file:
            present = [key for key in file.keys() if key in keys]
            # Copies, because mapped pages stay resident.
            return {keys[key]: to_device(file.get_tensor(key), device) for key in present}

    def read_facts(self, name: str) -> dict[str, Any]:
        """Read the facts about a finished set of tensors."""
        with _damage(self.path(name)), safe_open(self.path(name), framework="pt") as file:
            metadata = file.metadata() or {}
            return {key: json.loads(value) for key, value in metadata.items()}

    @contextmanager
    def new_folder(self, name: str) -> Iterator[Path]:
        """Yield a folder to write into, which is then the finished piece `name`."""
        self.forget(name)  # what is left of it
        with new_folder(self.path(name)) as folder:
            yield folder
            sizes = {str(f.relative_to(folder)): f.stat().st_size for f in _files(folder)}
            (folder / FILES).write_text(json.dumps(sizes), encoding="utf-8")

    def borrow(self, other: "Journal", name: str, own: str | None = None) -> bool:
        """Make a finished piece of another journal one of this, by default of the same name.

        Files are linked where that is possible. What both journals have is left as it is.

        Returns
        -------
        bool
            Whether the other journal has the piece.
        """
        own = own or name
        if not other.has(name):
            return False
        if self.has(own):
            return True
        if not other.path(name).is_dir():
            with new_file(self.path(own)) as partial:
                _link(other.path(name), partial)
            return True
        with self.new_folder(own) as folder:
            for file in _files(other.path(name)):
                if file.name != FILES:  # a list of its own, which is written into
                    _link(file, folder / file.relative_to(other.path(name)))
        return True

    def forget(self, *names: str) -> None:
        """Delete pieces that are no longer needed."""
        for name in names:
            with storage_errors(self.path(name)):
                remove(self.path(name))


def _link(file: Path, link: Path) -> None:
    """Link a file, or copy it where the file system has no links."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)  # of a run that was killed
    try:
        link.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, link)


def _is_whole(folder: Path) -> bool:
    listing = folder / FILES
    if not listing.is_file():
        return False
    with _damage(listing):
        sizes = json.loads(listing.read_text(encoding="utf-8"))
    present = {str(f.relative_to(folder)): f.stat().st_size for f in _files(folder)}
    return all(present.get(name) == size for name, size in sizes.items())


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


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
        lock = FileLock(journal.work / LOCK)
        try:
            lock.acquire(timeout=0)
        except NotImplementedError as error:
            raise OutputError(
                f"output: {output} is on a file system without locks; choose another folder"
            ) from error
        except Timeout:
            raise OutputError(
                f"output: {output} is in use by another lrc compress or lrc plan; wait for it, "
                "or choose another folder"
            ) from None
    try:
        with storage_errors(output):
            if overwrite:
                journal.write_json(IDENTITY, DELETING)
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
        others += [
            f for f in work.iterdir() if f.name not in (LOCK, partial_path(work / IDENTITY).name)
        ]
    elif work.exists():
        others.append(work)
    if others:
        raise OutputError(
            f"output: {output} is not empty and was not written by lrc compress (it holds "
            f"{min(others).relative_to(output)}); choose another folder, or move what is in it"
        )


def _claim(journal: Journal, identity: dict[str, Any]) -> None:
    found = journal.read_json(IDENTITY) if journal.has(IDENTITY) else identity
    if found == identity:
        if not journal.has(IDENTITY):
            journal.write_json(IDENTITY, identity)
        return
    names = [path.name for path in journal.work.iterdir()]
    has_work = any(name not in CLAIMS and not name.endswith(".partial") for name in names)
    if found != DELETING and (has_work or (journal.output / "checkpoint").exists()):
        differences = "; ".join(_differences(found, identity))
        raise OutputError(
            f"output: {journal.output} holds a run that differs in {differences}; choose "
            "another folder, or pass --overwrite to lrc compress to delete that run"
        )
    journal.write_json(IDENTITY, DELETING)
    _clear(journal)
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
    """Delete what an earlier run has written; other files stay.

    The identity stays too, to be replaced: without it the folder would be taken for that of others.
    """
    for name in RESULTS:
        remove(journal.output / name)
        partial_path(journal.output / name).unlink(missing_ok=True)
    for path in journal.work.iterdir():
        if path.name not in (LOCK, IDENTITY):
            remove(path)


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
