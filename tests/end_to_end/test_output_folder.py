"""The output folder: other files are kept, results are complete, interrupted runs continue."""

import fcntl
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Newer Pythons warn of any fork with threads; those of torch are idle.
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def weights_of(output: Path) -> bytes:
    return (output / "checkpoint/model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["thesis.tex", "work/thesis.tex", "checkpoint/model.safetensors"])
def test_a_folder_with_other_files_is_not_changed(
    lrc, recipe: Path, output: Path, name: str
) -> None:
    (output / name).parent.mkdir(parents=True)
    (output / name).write_text("precious")
    for options in ([], ["--overwrite"]):
        ended = lrc("compress", recipe, *options)
        ended.refuses(
            1,
            str(output),
            "was not written by lrc compress",
            "choose another folder",
            code="invalid-output",
        )
        assert contents(output) == {name: b"precious"}


def test_a_model_is_not_overwritten_by_its_compressed_form(
    lrc, recipe: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    before = contents(model)
    same = (f"model={model}", f"output={model}", "--overwrite")
    lrc("compress", recipe, *same).refuses(
        1, "was not written by lrc compress", code="invalid-output"
    )
    assert contents(model) == before


def test_places_that_cannot_be_written(lrc, recipe: Path, output: Path) -> None:
    output.write_text("a file")
    lrc("compress", recipe).refuses(
        1, f"{output} is a file; choose another folder", code="invalid-output"
    )
    below = f"output={output / 'below'}"
    lrc("compress", recipe, below).refuses(
        1, "a part of the path is a file", "choose another", code="invalid-output"
    )
    assert output.read_text() == "a file"
    for read_only in ("/proc/lrc-out", "/sys/lrc-out"):
        if Path(read_only).parent.is_dir():
            lrc("compress", recipe, f"output={read_only}").refuses(
                1,
                f"{read_only}: cannot be written",
                "choose another 'output'",
                code="invalid-output",
            )


def test_a_folder_in_use_is_refused(lrc, recipe: Path, output: Path) -> None:
    (output / "work").mkdir(parents=True)
    with (output / "work/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a running command would
        lrc("compress", recipe, "--overwrite").refuses(
            1, "in use by another lrc compress", "wait", code="invalid-output"
        )
    assert [f.name for f in (output / "work").iterdir()] == ["lock"]
    assert lrc("compress", recipe, "-q").code == 0  # the lock has ended with its process


def test_a_finished_run_returns_its_stored_report(lrc, recipe: Path, output: Path) -> None:
    first = lrc("compress", recipe, "--json", "-q")
    assert first.code == 0
    before = contents(output)
    again = lrc("compress", recipe, "--json")
    assert (again.code, again.out) == (0, first.out)
    assert again.err.splitlines() == ["finished earlier, nothing to do; --overwrite runs it again"]
    assert contents(output) == before


def test_another_evaluation_only_measures_again(lrc, recipe: Path, output: Path) -> None:
    assert lrc("compress", recipe, "-q").code == 0
    written = (output / "checkpoint/model.safetensors").stat().st_mtime_ns
    ended = lrc("compress", recipe, "evaluate.perplexity.0.windows=3", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["evaluation"]["perplexity"]["english"]["windows"] == 3
    assert {line.split(":")[0] for line in ended.err.splitlines()} == {
        "evaluate dense",
        "evaluate compressed",
        "evaluate dense and compressed",
    }
    assert (output / "checkpoint/model.safetensors").stat().st_mtime_ns == written
    report = json.loads((output / "report.json").read_text())
    assert report == json.loads(ended.out)


def test_another_run_is_replaced_only_with_overwrite(lrc, recipe: Path, output: Path) -> None:
    assert lrc("compress", recipe, "-q").code == 0
    (output / "notes.txt").write_text("mine")
    before = contents(output)
    for override, words in {
        "seed=1": "differs in seed (0 there, 1 here)",
        "stages.0.decompose.keep=0.5": "differs in stages",
        "calibration.samples=3": "differs in calibration.samples (4 there, 3 here)",
        "model.dtype=float32": 'differs in model.dtype ("bfloat16" there, "float32" here)',
    }.items():
        lrc("compress", recipe, override).refuses(
            1, words, "choose another folder", "--overwrite", code="invalid-output"
        )
        assert contents(output) == before
    assert lrc("compress", recipe, "seed=1", "--overwrite", "-q").code == 0
    assert weights_of(output) != before["checkpoint/model.safetensors"]
    assert (output / "notes.txt").read_text() == "mine"


def test_a_memory_limit_does_not_make_another_run(lrc, recipe: Path, output: Path) -> None:
    assert lrc("compress", recipe, "-q").code == 0
    before = weights_of(output)
    assert lrc("compress", recipe, "calibration.memory_limit_gib=0.5", "-q").code == 0
    assert weights_of(output) == before


def test_damage_in_the_work_folder_is_named(lrc, recipe: Path, output: Path) -> None:
    assert lrc("compress", recipe, "-q").code == 0
    (output / "report.json").unlink()
    damaged = output / "work/evaluation-dense.json"
    damaged.write_text("{")
    lrc("compress", recipe).refuses(
        1, str(damaged), "is damaged", "delete it and run the same", code="invalid-output"
    )
    damaged.unlink()
    assert lrc("compress", recipe, "-q").code == 0
    (output / "work/run.json").write_text("{")
    lrc("compress", recipe, "seed=1").refuses(
        1, "run.json: is damaged", "--overwrite", code="invalid-output"
    )
    assert lrc("compress", recipe, "seed=1", "--overwrite", "-q").code == 0


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "lrc/manifest.json"])
def test_a_checkpoint_that_lacks_a_file_is_not_a_finished_run(
    lrc, recipe: Path, output: Path, name: str
) -> None:
    assert lrc("compress", recipe, "-q").code == 0
    before = contents(output / "checkpoint")
    (output / "checkpoint" / name).unlink()
    for override in ((), ("evaluate.perplexity.0.windows=3",)):
        lrc("compress", recipe, *override).refuses(1, "delete the folder", code="invalid-output")
    shutil.rmtree(output / "checkpoint")
    assert lrc("compress", recipe, "-q").code == 0
    after = contents(output / "checkpoint")
    assert after[name] == before[name]


@FORKS
@pytest.mark.parametrize("limit", [3_000, 20_000, 40_000])
def test_a_full_disk_is_reported_and_the_same_command_continues(
    fork_lrc: Callable[..., Any], recipe: Path, output: Path, limit: int
) -> None:
    """A limit on file sizes interrupts writers as a full disk would."""

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    assert fork_lrc("compress", recipe, "-q").ended().code == 0
    undisturbed = contents(output / "checkpoint")
    shutil.rmtree(output)
    fork_lrc("compress", recipe, "-q", before=fill).ended().refuses(
        1,
        str(output),
        "cannot be written (File too large)",
        "run the same command again",
        code="invalid-output",
    )
    assert not (output / "checkpoint").exists()
    assert not list(output.rglob("*.partial"))
    assert fork_lrc("compress", recipe, "-q").ended().code == 0
    finished = contents(output / "checkpoint")
    for name in {*undisturbed, *finished} - {"README.md", "lrc/report.json"}:  # they contain times
        assert finished[name] == undisturbed[name], name


def test_disk_space_for_states_is_reserved_before_they_are_written(
    lrc, recipe: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to a memory map of a sparse file would kill the process if the disk is full."""
    reserved = []

    def refuse(descriptor: int, start: int, length: int) -> None:
        reserved.append(length)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    ended = lrc("compress", recipe, "calibration.memory_limit_gib=1e-9", "-q")
    ended.refuses(
        1, "states.live: cannot be written", "the disk is full: free space", code="invalid-output"
    )
    assert reserved == [4 * 64 * 32 * 4]
