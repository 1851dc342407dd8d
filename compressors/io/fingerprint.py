"""Identify files by a hash of their content.

Modification times change even if the content does not.
"""

import hashlib
from pathlib import Path

BLOCK, BLOCKS = 2**14, 2**10


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
