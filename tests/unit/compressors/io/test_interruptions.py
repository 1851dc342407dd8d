"""A run that ends at any call of the operating system leaves a folder that it can continue in."""

import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lrc.compressors.io.files import new_folder, write_text
from lrc.compressors.io.journal import Journal, open_journal
from lrc.configs.errors import OutputError

CALLS = ((os, "open"), (os, "mkdir"), (os, "rename"), (os, "replace"), (os, "unlink"))
CALLS += ((os, "rmdir"), (os, "fsync"), (io, "open"))
OLD, NEW = {"seed": 0}, {"seed": 1}
MINE = {"notes.txt": "mine", "plan.json": "edited"}


@contextmanager
def ending_at(n: int, error: Callable[[], BaseException], *, dead: bool) -> Iterator[None]:
    """Raise at call `n` of the operating system, from 0; if `dead`, at all later ones too.

    Nothing can be cleaned up after a SIGKILL, which `dead` stands for.
    """
    calls = 0

    def counting(call: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls - 1 == n or (dead and calls > n):
                raise error()
            return call(*arguments, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, counting(getattr(module, name)))
        yield


def finished_run(output: Path) -> None:
    with open_journal(output, OLD) as journal:
        journal.write_json("plan.json", 1)
        journal.write_tensors("compressed/layer-0000.safetensors", {"x": torch.ones(2)})
        with journal.new_folder("source") as folder:
            (folder / "config.json").write_text("{}")
            (folder / "model.safetensors").write_text("weights")
    with new_folder(output / "checkpoint") as folder:
        (folder / "model.safetensors").write_text("weights")
    write_text(output / "report.json", "{}")
    for name, text in MINE.items():
        write_text(output / name, text)


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # hundreds would take seconds


def attempts(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    finished_run(tmp_path / "whole")
    for n in range(1000):
        yield n, Path(shutil.copytree(tmp_path / "whole", tmp_path / str(n)))
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("next_run", [OLD, NEW])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_overwrite_that_is_killed_at_any_moment(
    tmp_path: Path, dead: bool, next_run: dict[str, int], overwrite: bool
) -> None:
    """Neither locks the folder, nor deletes other files, nor leaves parts of the earlier run."""
    for n, output in attempts(tmp_path):
        killed = False
        with ending_at(n, KeyboardInterrupt, dead=dead):
            try:
                with open_journal(output, NEW, overwrite=True):
                    pass
            except KeyboardInterrupt:
                killed = True
        for name, text in MINE.items():
            assert (output / name).read_text() == text
        untouched = (output / "work/run.json").read_text() == '{\n "seed": 0\n}\n'
        if untouched:  # nothing is deleted before the identity says so
            assert (output / "report.json").exists()
            assert Journal(output).has("source")
            assert not killed or (output / "checkpoint/model.safetensors").exists()
        elif killed or next_run == NEW:
            with open_journal(output, next_run, overwrite=overwrite) as journal:
                assert [p.name for p in journal.work.iterdir() if p.name[0] != "."] in (
                    ["lock", "run.json"],
                    ["run.json", "lock"],
                )
                assert not list(output.rglob("*.safetensors"))
                assert not (output / "report.json").exists()
        if not killed:
            assert not untouched
            return


@pytest.mark.parametrize("dead", [False, True])
def test_a_deletion_that_is_killed_at_any_moment_leaves_a_piece_whole_or_absent(
    tmp_path: Path, dead: bool
) -> None:
    for n, output in attempts(tmp_path):
        journal, killed = Journal(output), False
        with ending_at(n, KeyboardInterrupt, dead=dead):
            try:
                journal.forget("source", "compressed", "plan.json")
            except KeyboardInterrupt:
                killed = True
        if journal.has("source"):
            assert (journal.path("source") / "model.safetensors").read_text() == "weights"
        assert not journal.path("compressed").exists() or list(journal.path("compressed").iterdir())
        journal.forget("source", "compressed", "plan.json")
        assert {p.name for p in journal.work.iterdir()} == {"lock", "run.json"}
        if not killed:
            return


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, lambda: OSError(errno.ENOSPC, "full")])
def test_writing_that_ends_at_any_moment_leaves_a_piece_whole_or_absent(
    tmp_path: Path, dead: bool, error: Callable[[], BaseException]
) -> None:
    for n, output in attempts(tmp_path):
        journal, ended = Journal(output), False
        journal.forget("source", "plan.json")
        with ending_at(n, error, dead=dead):
            try:
                journal.write_json("plan.json", {"n": 2})
                with journal.new_folder("source") as folder:
                    (folder / "model.safetensors").write_text("new weights")
            except (KeyboardInterrupt, OutputError):
                ended = True
        if journal.has("plan.json"):
            assert journal.read_json("plan.json") == {"n": 2}
        if journal.has("source"):
            assert (journal.path("source") / "model.safetensors").read_text() == "new weights"
        with journal.new_folder("source") as folder:
            (folder / "model.safetensors").write_text("again")
        assert journal.has("source")
        if not ended:
            return


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "files.json"])
def test_a_folder_without_one_of_its_files_is_not_finished(tmp_path: Path, name: str) -> None:
    finished_run(tmp_path)
    journal = Journal(tmp_path)
    assert journal.has("source")
    (journal.path("source") / name).unlink()
    assert not journal.has("source")
    with journal.new_folder("source") as folder:
        (folder / "config.json").write_text("{}")
    assert journal.has("source")
    (journal.path("source") / "config.json").write_text("")  # truncated
    assert not journal.has("source")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Root may write everywhere: the refusal is simulated."""
    for call in ("open", "mkdir", "replace"):
        output = tmp_path / call

        def refuse(path: object, *_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code), path)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(OutputError), open_journal(output, OLD):
                pass
        with open_journal(output, OLD):
            pass


def test_an_error_about_a_file_elsewhere_is_not_one_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out/checkpoint"):
        (tmp_path / "source/model.safetensors").read_bytes()
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_recognized_in_errors_of_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(OutputError), new_folder(tmp_path / "checkpoint"):
        raise Exception("No space left on device (os error 28)")
