"""The journal: whole or not there, one process at a time, nothing of others touched."""

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from lrc.compressors.io.files import one_writer, storage_errors, write_text
from lrc.compressors.io.journal import Journal, open_journal
from lrc.configs.errors import OutputError


def test_a_piece_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.write_json("a.json", {"n": 1})

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    for write in (
        lambda: journal.write_json("a.json", {"n": 2}),
        lambda: journal.write_tensors("b.safetensors", {"x": torch.ones(2)}),
    ):
        with pytest.raises(OutputError, match=r"disk is full: free space and run the same"):
            write()
    assert journal.read_json("a.json") == {"n": 1}
    assert not journal.has("b.safetensors")


def test_tensors_and_facts_come_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    x = torch.arange(6.0).view(2, 3).T  # not contiguous
    journal.write_tensors("t.safetensors", {"x": x}, {"facts": {"list": [1, None, "ü"]}})
    assert torch.equal(journal.read_tensor("t.safetensors", "x"), x)
    assert journal.read_facts("t.safetensors") == {"facts": {"list": [1, None, "ü"]}}


def test_the_same_run_continues_and_another_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with open_journal(output, {"seed": 0, "model": "m"}) as journal:
        journal.write_json("piece.json", 1)
    with open_journal(output, {"seed": 0, "model": "m"}) as journal:
        assert journal.has("piece.json")
    with (
        pytest.raises(OutputError, match=r"differs in seed \(0 there, 1 here\); choose another"),
        open_journal(output, {"seed": 1, "model": "m"}),
    ):
        pass
    assert (output / "work" / "piece.json").exists()


def test_overwrite_takes_away_what_lrc_wrote_and_nothing_else(tmp_path: Path) -> None:
    with open_journal(tmp_path, {"seed": 0}) as journal:
        journal.write_json("piece.json", 1)
    (tmp_path / "checkpoint").mkdir()
    write_text(tmp_path / "report.json", "{}")
    write_text(tmp_path / "notes.txt", "mine")
    with open_journal(tmp_path, {"seed": 1}, overwrite=True) as journal:
        assert not journal.has("piece.json")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "work"]


def test_an_interrupted_overwrite_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_journal(tmp_path, {"seed": 0}) as journal:
        journal.write_json("piece.json", 1)
    (tmp_path / "checkpoint").mkdir()
    unlink, deleted = Path.unlink, []

    def kill(path: Path, **options: bool) -> None:
        if deleted:
            raise KeyboardInterrupt
        deleted.append(path.name)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill)
        with (
            pytest.raises(KeyboardInterrupt),
            open_journal(tmp_path, {"seed": 1}, overwrite=True),
        ):
            pass
    with open_journal(tmp_path, {"seed": 1}, overwrite=True) as journal:
        assert not journal.has("piece.json")


def test_a_folder_that_is_half_deleted_is_not_a_finished_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    journal.write_json("factors/a.json", 1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        journal.forget("factors")
    assert not journal.has("factors")
    journal.write_json("factors/b.json", 1)
    journal.forget("factors")
    assert list(journal.work.iterdir()) == []


def test_a_second_process_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    with (
        open_journal(tmp_path, {}),
        pytest.raises(OutputError, match="in use by another lrc compress"),
        open_journal(tmp_path, {}),
    ):
        pass
    with open_journal(tmp_path, {}):  # released
        pass


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "thesis.tex", "precious")
    for overwrite in (False, True):
        with (
            pytest.raises(OutputError, match="not empty and was not written by lrc"),
            open_journal(tmp_path, {}, overwrite=overwrite),
        ):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "")
    with pytest.raises(OutputError, match="is a file"), open_journal(tmp_path / "file", {}):
        pass
    with (
        pytest.raises(OutputError, match="a part of the path is a file"),
        open_journal(tmp_path / "file" / "below", {}),
    ):
        pass


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="is a link to itself"):
        write_text(tmp_path / "loop" / "below" / "file", "")


def test_a_second_writer_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.gguf"
    with (
        one_writer(target),
        pytest.raises(OutputError, match="another process is writing it"),
        one_writer(target),
    ):
        pass
    assert not [*tmp_path.iterdir()]
    with one_writer(target):
        write_text(target, "whole")
    assert [*target.parent.iterdir()] == [target]
    with pytest.raises(OutputError, match="exists by now"), one_writer(target):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_arrays_that_a_disk_has_no_room_for_are_an_output_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="the disk is full"),
        storage_errors(tmp_path),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        np.ones(10**5).tofile(file)


def test_errors_that_are_not_about_storage_pass_through(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="strange"), storage_errors(tmp_path):
        raise OSError(errno.EIO, "strange")


def test_files_that_threads_write_together_have_the_permissions_of_new_files(tmp_path, monkeypatch):
    set_mask = os.umask

    def slow(mask: int) -> int:
        before = set_mask(mask)
        time.sleep(0.02)
        return before

    expected = set_mask(0o022)
    try:
        monkeypatch.setattr(os, "umask", slow)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda name: write_text(tmp_path / name, "text"), ["a", "b"]))
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}
        assert set_mask(0o022) == 0o022
    finally:
        set_mask(expected)
