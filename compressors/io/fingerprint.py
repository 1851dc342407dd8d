"""Identify files by their content, as times of modification change without it."""

import hashlib
from pathlib import Path

BLOCK, BLOCKS = 2**14, 2**10


def fingerprint(path: Path, *, whole: bool = False) -> str:
    """Return a hash of the size and content of a file.

    Parameters
    ----------
    path : Path
        An existing file.
    whole : bool
        Read all of it. Otherwise, 1,024 blocks of 16 KiB, from the first to the last at equal
        distances, stand for a file of more than 16 MiB: a new range of 1/1,024 of its bytes, such
        as one matrix of a shard, is noticed, and a model of any size is identified in seconds.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if whole or size <= BLOCK * BLOCKS:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(BLOCKS):
            file.seek((size - BLOCK) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def fingerprints(folder: Path, *patterns: str) -> dict[str, str]:
    """Return name -> hash of the files in a folder that match one of the patterns."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {str(path.relative_to(folder)): fingerprint(path) for path in sorted(found)}
