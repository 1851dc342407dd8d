"""Files are identified by their content: all of small ones, samples of large ones."""

import hashlib
import os
from pathlib import Path

import pytest

from lrc.compressors.io import fingerprint as module
from lrc.compressors.io.fingerprint import (
    BLOCK,
    BLOCKS,
    fingerprint,
    fingerprints,
    known_hashes,
    learn_hashes,
    sha256,
)

LARGE = 3 * BLOCK * BLOCKS + 17


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    path.write_bytes(b"\0" * LARGE)
    return path


def test_times_and_names_do_not_count(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"content")
    second.write_bytes(b"content")
    os.utime(second, (0, 0))
    assert fingerprint(first) == fingerprint(second)
    second.write_bytes(b"contenT")
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize(
    ("place", "count"),
    [(0, 1), (LARGE - 1, 1), (LARGE // 2, 1 + LARGE // BLOCKS), (5, 1 + LARGE // BLOCKS)],
)
def test_a_change_of_a_thousandth_of_a_large_file_is_noticed(
    large: Path, place: int, count: int
) -> None:
    before = fingerprint(large)
    with large.open("r+b") as file:
        file.seek(place)
        file.write(b"\1" * min(count, LARGE - place))
        file.flush()
        assert fingerprint(large) != before
        file.seek(place)
        file.write(b"\0" * min(count, LARGE - place))
    assert fingerprint(large) == before


def test_the_size_of_a_large_file_counts_and_reading_it_whole_misses_nothing(large: Path) -> None:
    before, whole = fingerprint(large), sha256(large)
    with large.open("r+b") as file:
        file.seek(BLOCK + 1)  # between the first two blocks
        file.write(b"\1")
        file.flush()
        assert fingerprint(large) == before
        assert sha256(large) != whole
        file.seek(BLOCK + 1)
        file.write(b"\0")
        file.truncate(LARGE - 1)
    assert fingerprint(large) != before


def test_a_large_file_is_hashed_once_until_it_is_modified(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = known_hashes([large])
    monkeypatch.setattr(hashlib, "file_digest", None)  # nothing is read any more
    assert sha256(large) == known_hashes([large])[next(iter(known))]
    monkeypatch.setattr(module, "_HASHES", {})  # another process
    learn_hashes(known)
    assert [sha256(large)] == [*known.values()]
    monkeypatch.undo()
    with large.open("r+b") as file:
        file.write(b"\1")
        file.flush()
        changed = hashlib.sha256(large.read_bytes()).hexdigest()
        assert sha256(large) == changed not in known.values()
        file.seek(0)
        file.write(b"\0")


def test_only_files_that_match_are_listed(tmp_path: Path) -> None:
    for name in ("config.json", "notes.md", "sub/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(fingerprints(tmp_path, "*.json", "config*")) == ["config.json"]
