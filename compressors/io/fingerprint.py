"""Identify files by a hash of their content.

Modification times change even if the content does not.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK, BLOCKS = 2**14, 2**10
REMEMBERED = 2**25
"""Bytes from which on a hash is remembered: it takes longer than the clock of a file system."""

State = tuple[int, int, int, int]
"""Device, number, size and time of the last modification of a file."""
_HASHES: dict[State, str] = {}


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces.

    A large file that this process has hashed, and that has not been modified since, is not read
    again: a run hashes the checkpoint that it writes, and loads it several times.
    """
    with path.open("rb") as file:
        state = _state(file.fileno())
        if state in _HASHES:
            return _HASHES[state]
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if state[2] >= REMEMBERED and _state(file.fileno()) == state:
            _HASHES[state] = found
    return found


def known_hashes(paths: Iterable[Path]) -> dict[State, str]:
    """Return the hashes of some files, for `learn_hashes` in another process."""
    paths = list(paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing releases the interpreter's lock
        return dict(zip(map(_state, paths), pool.map(sha256, paths), strict=True))


def learn_hashes(found: Mapping[State, str]) -> None:
    """Remember what `known_hashes` has returned in another process.

    On a host that gives a file another number, nothing is known of it.
    """
    _HASHES.update({state: digest for state, digest in found.items() if state[2] >= REMEMBERED})


def _state(file: Path | int) -> State:
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def fingerprint(path: Path) -> str:
    """Return a hash of the size and content of a file.

    Only 1,024 evenly spaced blocks of 16 KiB are hashed if the file is larger than 16 MiB, so that
    a model of any size is identified in seconds. A change of more than 1/1,024 of the file in one
    place, such as another matrix, is detected; a smaller one may not be.
    """
    size = path.stat().st_size
    if size <= BLOCK * BLOCKS:
        return sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(BLOCKS):
            file.seek((size - BLOCK) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def fingerprints(folder: Path, *patterns: str) -> dict[str, str]:
    """Return name -> hash of the files in a folder that match one of the patterns."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): fingerprint(path) for path in sorted(found)}
