"""Runs in two processes give the results of one, and end together when a process is lost."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.forked_processes import Forked

from lrc.compressors.checkpoint import assemble
from lrc.compressors.checkpoint.writer import write_weights
from lrc.compressors.distributed import lifetime
from lrc.compressors.io import background_writes
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

# Newer Pythons warn of any fork with threads; those of torch are idle.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]

KFAC = {"decompose": {"method": "kfac", "keep": 0.6, "compensate": {"residual": 0.5}}}
GPTQ = {"quantize": {"method": "gptq", "bits": 4, "group_size": 16}}
MIXED = {"decompose": {"method": "mixed", "keep": 0.5}}
SHARD_BYTES = 40_000
DIFFERENT_EACH_TIME = ("lrc/report.json", "README.md")  # they contain times and peaks


@pytest.fixture
def new_recipe(
    tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> Callable[..., Path]:
    """Write a recipe of one stage with seven windows; keywords go to the evaluation."""

    def write(stage: dict[str, Any], **evaluate: Any) -> Path:
        calibration = {"source": str(tiny_text), "samples": 7, "length": 32}
        text = {"source": str(tiny_text), "window": 32, "windows": 3}
        evaluate = {"perplexity": [text], "baselines": ["int8"], **evaluate}
        return tiny_recipe(
            tiny_model_folder,
            tmp_path / "run",
            calibration=calibration,
            stages=[stage],
            evaluate=evaluate,
        )

    return write


def lrc(*arguments: object, before: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """Return a function that executes the command line."""

    def call() -> None:
        from lrc.cli.main import main

        before()
        sys.argv = ["lrc", *map(str, arguments)]
        main()

    return call


def in_two(folder: Path, *arguments: object) -> Forked:
    return Forked(folder, [lrc(*arguments)] * 2)


def files_of(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoint"
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    return {name: data for name, data in files.items() if name not in DIFFERENT_EACH_TIME}


def undisturbed(recipe: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Run in this process; return the files of the checkpoint, and the evaluation."""
    run = recipe.with_name("run")
    compress(load_recipe(recipe), Machine(device="cpu"))
    found = files_of(run), json.loads((run / "report.json").read_text())["evaluation"]
    shutil.rmtree(run)
    return found


@pytest.mark.parametrize(
    ("stage", "evaluate"),
    [(KFAC, {"streaming": "always"}), (GPTQ, {}), (MIXED, {"perplexity": []})],
    ids=["kfac", "gptq", "mixed"],
)
def test_two_processes_give_the_results_of_one(new_recipe, stage, evaluate, tmp_path, monkeypatch):
    """With results that are written in the background, as on a GPU, and several weight files."""
    monkeypatch.setattr(background_writes, "DEVICE_TYPES", {"cpu"})
    small = partial(write_weights, max_shard_bytes=SHARD_BYTES)
    monkeypatch.setattr(assemble, "write_weights", small)
    recipe = new_recipe(stage, **evaluate)
    files, evaluation = undisturbed(recipe)
    assert sum(name.endswith(".safetensors") for name in files) > 1
    forked = in_two(tmp_path, "compress", recipe, "--device", "cpu")
    assert forked.wait() == [0, 0], forked.printed(0) + forked.printed(1)
    run = tmp_path / "run"
    assert files_of(run) == files
    assert json.loads((run / "report.json").read_text())["evaluation"] == evaluation
    assert forked.printed(1) == ""  # the first process speaks for both
    for rank in (0, 1):
        assert "calibrate: 2 of 2" in (run / f"work/processes/{rank}.log").read_text()


@pytest.mark.parametrize("victim", [0, 1])
def test_one_message_tells_of_a_lost_process_and_the_run_continues_alone(
    new_recipe, victim, tmp_path
):
    recipe = new_recipe(KFAC, perplexity=[])
    files, _ = undisturbed(recipe)

    def die() -> None:
        from lrc.compressors.calibrate.sequential_calibration import SequentialCalibration

        def killed(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        SequentialCalibration.advance = killed  # type: ignore[method-assign]

    arguments = ("compress", recipe, "--device", "cpu", "-q")
    forked = Forked(
        tmp_path,
        [lrc(*arguments, before=die if rank == victim else lambda: None) for rank in (0, 1)],
    )
    codes, survivor = forked.wait(), 1 - victim
    assert (codes[victim], codes[survivor]) == (-signal.SIGKILL, 1)
    (line,) = forked.printed(survivor).splitlines()
    assert line.startswith(f"error[process-lost]: process {victim} of 2 ended unexpectedly")
    compress(load_recipe(recipe), Machine(device="cpu"))
    assert files_of(tmp_path / "run") == files


def test_an_error_of_all_processes_is_reported_once(new_recipe, tmp_path):
    recipe = new_recipe(KFAC)
    for override, code, message in (
        ("stages.0.decompose.keep=2", 2, "stages[0].decompose.keep"),
        ("calibration.samples=1", 2, "calibration.samples: must be at least the number of proc"),
        ("calibration.source=/nowhere.txt", 2, "/nowhere.txt"),
    ):
        forked = in_two(tmp_path, "compress", recipe, override, "--device", "cpu")
        assert forked.wait()[0] == code
        lines = (forked.printed(0) + forked.printed(1)).splitlines()
        errors = [line for line in lines if line.startswith("error[")]
        assert len(errors) == 1, lines
        assert message in errors[0]


def test_processes_with_different_folders_are_refused(new_recipe, tmp_path):
    recipe = new_recipe(KFAC)

    def hurry() -> None:
        lifetime.SHARED_SECONDS = 0.1

    outputs = [tmp_path / "run", tmp_path / "other"]
    forked = Forked(
        tmp_path,
        [
            lrc("compress", recipe, f"output={each}", "--device", "cpu", before=hurry)
            for each in outputs
        ],
    )
    assert forked.wait() == [1, 1]
    lines = (forked.printed(0) + forked.printed(1)).splitlines()
    (error,) = [line for line in lines if line.startswith("error[")]
    assert error.startswith("error[not-shared]: output: ")


def test_other_commands_run_in_one_process(new_recipe, tmp_path):
    forked = in_two(tmp_path, "plan", new_recipe(KFAC))
    assert forked.wait() == [2, 2]
    assert forked.printed(0).startswith("error[invalid-recipe]: plan: runs in one process (only")
    assert forked.printed(1) == ""


@pytest.mark.robustness
def test_processes_of_accelerate_give_the_results_of_one(new_recipe, tmp_path):
    """With the command of docs/distributed.md."""
    recipe = new_recipe(KFAC, perplexity=[])
    files, _ = undisturbed(recipe)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "-m", "lrc", "compress", str(recipe), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as in this process
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "run") == files
    assert {file.name for file in (tmp_path / "run/work/processes").glob("*.log")} == {
        "0.log",
        "1.log",
    }


@pytest.mark.robustness
def test_kills_at_random_moments_leave_a_run_that_continues_alone(new_recipe, tmp_path):
    recipe, run = new_recipe(KFAC), tmp_path / "run"
    files, _ = undisturbed(recipe)
    joined, draw = run / "work/processes/token", random.Random(0)

    def start() -> tuple[Forked, float]:
        """Start a run; return when both processes have joined it."""
        forked = in_two(tmp_path, "compress", recipe, "--device", "cpu", "-q")
        while not joined.exists():
            time.sleep(0.01)
        return forked, time.monotonic()

    forked, begun = start()
    assert forked.wait() == [0, 0]
    seconds = time.monotonic() - begun
    for _ in range(10):
        shutil.rmtree(run, ignore_errors=True)
        forked, _ = start()
        time.sleep(draw.random() * seconds)
        victim = draw.randrange(2)
        os.kill(forked.ids[victim], signal.SIGKILL)
        killed = time.monotonic()
        codes = forked.wait()
        assert time.monotonic() - killed < 60
        if codes[victim] == -signal.SIGKILL:
            lines = forked.printed(1 - victim).splitlines()
            assert sum(line.startswith("error[") for line in lines) <= 1, lines
        compress(load_recipe(recipe), Machine(device="cpu"))
        assert files_of(run) == files
