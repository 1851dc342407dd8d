"""The manifest of a checkpoint: the hash of every file, written last and compared on loading."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrc.compressors.checkpoint import format as layout
from lrc.compressors.io.fingerprint import sha256
from lrc.compressors.io.json_text import parse_json
from lrc.compressors.io.shards import listed_file
from lrc.compressors.io.shortened import shortened
from lrc.configs.errors import CheckpointError

CHECKSUM = "sha256"
"""Key of the report that contains its own checksum."""
UNLISTED = (layout.REPORT, "README.md")
"""Files without a hash in the manifest: the report, which contains its own checksum, and the model
card, which may be edited."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
LOADABLE = (*PICKLES, ".safetensors", ".gguf", ".json", ".py", ".jinja", ".model", ".tiktoken")
"""Types of files that transformers may find and read although nothing refers to them."""
REMEDY = (
    f"{layout.COPY_AGAIN}; if the change was intended, remove the folder {layout.FOLDER}/, which "
    "describes the original checkpoint"
)
SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """The content of ``lrc/manifest.json``."""

    folder: Path
    """The checkpoint."""
    plain: bool
    """Whether the checkpoint loads without lrc."""
    hashes: dict[str, str]
    """Name of a file relative to the folder -> its SHA-256, in hexadecimal digits."""

    def loaded_files(self) -> list[str]:
        """Return the listed files that loading may read: all except those of the folder lrc."""
        return [name for name in self.hashes if not name.startswith(f"{layout.FOLDER}/")]

    def check_names(self, *, loaded_only: bool) -> None:
        """Reject files that transformers may read, but that are not listed.

        Parameters
        ----------
        loaded_only : bool
            Ignore files in the folder lrc, which loading does not read.

        Raises
        ------
        CheckpointError
        """
        found = {
            file.relative_to(self.folder).as_posix()
            for file in self.folder.rglob("*")
            if file.suffix.lower() in LOADABLE and not file.is_dir()
        }
        if loaded_only:
            found = {name for name in found if not name.startswith(f"{layout.FOLDER}/")}
        if unlisted := sorted(found - self.hashes.keys() - {layout.MANIFEST, *UNLISTED}):
            raise CheckpointError(
                f"{self.folder}: {shortened(unlisted, ', ')} must be listed in {layout.MANIFEST}, "
                f"because loaders may read every file of this type; remove it, or {REMEDY}",
                code="unlisted-file",
            )

    def check_hashes(self, names: Iterable[str]) -> None:
        """Compare listed files with their hashes.

        Raises
        ------
        CheckpointError
            Naming the files that are missing, changed, or links out of the folder.
        """
        names = list(names)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter's lock
            problems = list(filter(None, pool.map(self._problem, names)))
        if problems:
            raise CheckpointError(
                f"{self.folder}: {shortened(problems)}; {REMEDY}", code="changed-file"
            )

    def start_check(self) -> Callable[[], None]:
        """Check names and all loaded files; compare large files in the background.

        Returns
        -------
        callable
            Waits until the large files have been compared; raises like `check_hashes`.

        Raises
        ------
        CheckpointError
        """
        self.check_names(loaded_only=True)
        files = self.loaded_files()
        large = [name for name in files if name.endswith(".safetensors")]
        self.check_hashes({*files} - {*large})
        pool = ThreadPoolExecutor(1)
        running = pool.submit(self.check_hashes, large)
        pool.shutdown(wait=False)
        return running.result

    def _problem(self, name: str) -> str | None:
        path = self.folder / name
        if not path.is_file():
            return f"{name} is missing"
        real, root = path.resolve(), self.folder.resolve()
        # Files in the cache of the Hub are links to its folder of blobs.
        if not any(map(real.is_relative_to, (root, root.parent.parent / "blobs"))):
            return f"{name} is a link to {real}, which is outside the folder"
        try:
            found = sha256(path)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        return None if found == self.hashes[name] else f"{name} has changed since it was written"


def read_manifest(folder: Path) -> Manifest | None:
    """Read the manifest of a checkpoint; None if the folder was not written by `lrc compress`.

    Raises
    ------
    CheckpointError
        If the manifest is missing or damaged, or lists no weights.
    """
    path = folder / layout.MANIFEST
    if not (folder / layout.FOLDER).is_dir():
        return None
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {layout.MANIFEST} with the hashes to compare; {REMEDY}"
        )
    record = read_object(path)
    hashes, plain = record.get("sha256"), record.get("plain")
    if not isinstance(hashes, dict) or not hashes:
        raise CheckpointError(f"{path}: holds no hashes; {layout.COPY_AGAIN}")
    layout.check_version(record.get("format_version"), str(path))
    try:
        for name, value in hashes.items():
            listed_file(folder, name)
            if not isinstance(value, str) or not SHA256.fullmatch(value):
                raise ValueError(f"{name} must have a SHA-256, got {value!r:.80}")
        if not isinstance(plain, bool):
            raise ValueError(f"plain must be true or false, got {plain!r:.80}")
        if not any(name.endswith(".safetensors") for name in hashes) or "config.json" not in hashes:
            raise ValueError("config.json and files of weights must be listed")
    except ValueError as error:
        raise CheckpointError(
            f"{path}: {error}; {layout.EDITED}", code="invalid-manifest"
        ) from None
    return Manifest(folder, plain, hashes)


def write_manifest(folder: Path, *, plain: bool) -> None:
    """Write the SHA-256 of every file of a checkpoint except `UNLISTED`.

    `plain`: the checkpoint loads without lrc; config.json then has no table of compressed modules.
    """
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    names = sorted(found - {layout.MANIFEST, *UNLISTED})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        hashes = dict(zip(names, pool.map(sha256, map(folder.joinpath, names)), strict=True))
    record = {"format_version": layout.FORMAT_VERSION, "plain": plain, "sha256": hashes}
    text = json.dumps(record, indent=1) + "\n"
    (folder / layout.MANIFEST).write_text(text, encoding="utf-8")


def report_checksum(folder: Path, report: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the manifest of a checkpoint and of its report, without `CHECKSUM`.

    It ties the report to the checkpoint, which is complete before the report can be written.
    """
    rest = {key: value for key, value in report.items() if key != CHECKSUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256((folder / layout.MANIFEST).read_bytes() + text.encode()).hexdigest()


def read_object(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """Read a JSON object of a checkpoint; see `parse_json` for `finite`.

    Raises
    ------
    CheckpointError
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"), finite=finite)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a readable JSON file ({error}); {layout.COPY_AGAIN}"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: must be a JSON object, got {value!r:.60}; {layout.COPY_AGAIN}"
        )
    return value
