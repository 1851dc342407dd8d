"""Ctrl-C and SIGTERM: the step is finished, the state is saved, the same command continues.

Real signals to real processes, forked from this one.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

# Newer Pythons warn of any fork with threads; those of torch are idle.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

FOREVER = 60.0
CONTINUES = "the same command continues from here"
EVERY_STAGE = ("stages=[{decompose: {method: kfac, keep: 0.6, compensate: {}}}]",)


@pytest.fixture
def hold(tmp_path: Path) -> Callable[..., Callable[[], None]]:
    """Make a child wait at the first step of a stage, after it has created the file `there`."""

    def make(stage: str, seconds: float) -> Callable[[], None]:
        def before() -> None:
            from lrc.cli.console import Steps

            original = Steps.__call__

            def slow(self: Steps, name: str, done: int, total: int) -> None:
                if name.startswith(stage) and not (tmp_path / "there").exists():
                    (tmp_path / "there").touch()
                    end = time.monotonic() + seconds
                    while time.monotonic() < end and self._signal is None:
                        time.sleep(0.01)
                    if seconds == FOREVER:
                        time.sleep(FOREVER)
                original(self, name, done, total)

            Steps.__call__ = slow

        return before

    return make


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + FOREVER
    while not condition():
        assert time.monotonic() < end, otherwise
        time.sleep(0.01)


def wait_for(path: Path) -> None:
    wait_until(path.exists, f"{path.name} never came")


def checkpoint_of(output: Path) -> dict[str, bytes]:
    """Read what depends neither on the name of the output folder nor on times and peaks."""
    folder = output / "checkpoint"
    files = [f for f in folder.iterdir() if f.is_file() and f.name != "README.md"]
    return {f.name: f.read_bytes() for f in [*files, folder / "lrc/plan.json"]}


@pytest.fixture(scope="module")
def undisturbed(
    tiny_model_folder: Path,
    tiny_text: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, bytes]:
    """Return the checkpoint of an uninterrupted run."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compress(load_recipe(tiny_recipe(tiny_model_folder, output), EVERY_STAGE), Machine("cpu"))
    torch.set_num_threads(threads)
    return checkpoint_of(output)


@pytest.mark.parametrize(
    ("number", "stage"),
    [
        (signal.SIGINT, "calibrate"),
        (signal.SIGTERM, "gradients"),
        (signal.SIGINT, "allocate"),
        (signal.SIGTERM, "compress"),
        (signal.SIGINT, "evaluate dense"),
        (signal.SIGTERM, "evaluate compressed"),
    ],
)
def test_a_signal_stops_after_the_step_and_the_same_command_continues(
    fork_lrc: Callable[..., Any],
    hold: Callable[..., Callable[[], None]],
    recipe: Path,
    output: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
    number: signal.Signals,
    stage: str,
) -> None:
    child = fork_lrc("compress", recipe, *EVERY_STAGE, before=hold(stage, 30.0))
    wait_for(tmp_path / "there")
    os.kill(child.id, number)
    ended = child.ended()
    assert (ended.code, ended.out) == (75, "")
    said = ended.err.splitlines()[-2:]
    assert said[0] == "stopping after this step; a second signal stops at once"
    assert said[1] == f"stopped: on {number.name}; {CONTINUES}"
    assert "Traceback" not in ended.err
    assert not (output / "report.json").exists()
    assert not list(output.rglob("*.partial"))
    work = output / "work"
    if stage == "calibrate":
        assert [f.name for f in (work / "statistics").iterdir()] == ["inputs-0000.safetensors"]
    assert (output / "checkpoint").exists() == stage.startswith("evaluate")
    assert (work / "evaluation-dense.json").exists() == (stage == "evaluate compressed")

    assert fork_lrc("compress", recipe, *EVERY_STAGE, "-q").ended().code == 0
    assert checkpoint_of(output) == undisturbed
    assert (output / "report.json").exists()


def test_a_second_signal_stops_at_once(
    lrc: Callable[..., Any],
    fork_lrc: Callable[..., Any],
    hold: Callable[..., Callable[[], None]],
    recipe: Path,
    output: Path,
    tmp_path: Path,
) -> None:
    child = fork_lrc("compress", recipe, before=hold("calibrate", FOREVER))
    wait_for(tmp_path / "there")
    lrc("compress", recipe).refuses(
        1, "is in use by another lrc compress", code="invalid-output"
    )  # while the child runs
    os.kill(child.id, signal.SIGINT)
    # Simultaneous equal signals would arrive as one.
    wait_until(lambda: "stopping after this step" in child.err.read_text(), "no answer to a signal")
    start = time.monotonic()
    os.kill(child.id, signal.SIGINT)
    ended = child.ended()
    assert time.monotonic() - start < FOREVER / 2
    assert ended.code == 75
    assert ended.err.splitlines()[-1].startswith("stopped: at once; the same command continues")
    assert lrc("compress", recipe, "-q").code == 0  # the lock has ended with its process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_stops_at_once(
    fork_lrc: Callable[..., Any], recipe: Path, output: Path, tmp_path: Path, number: signal.Signals
) -> None:
    def before() -> None:
        from lrc.configs import load

        def slow(*_: object) -> None:
            (tmp_path / "there").touch()
            time.sleep(FOREVER)

        load.load_recipe = slow

    child = fork_lrc("compress", recipe, before=before)
    wait_for(tmp_path / "there")
    os.kill(child.id, number)
    ended = child.ended()
    assert ended.code == 75
    assert ended.err.splitlines() == [
        "stopped: at once; the same command continues from the last finished step"
    ]
    assert not output.exists()


def test_lrc_eval_stops_too(
    fork_lrc: Callable[..., Any],
    hold: Callable[..., Callable[[], None]],
    tiny_model_folder: Path,
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    window = ("--window", 32, "--windows", 3)
    child = fork_lrc(
        *("eval", tiny_model_folder, "--perplexity", tiny_text, *window),
        before=hold(str(tiny_model_folder), 30.0),
    )
    wait_for(tmp_path / "there")
    os.kill(child.id, signal.SIGTERM)
    ended = child.ended()
    assert (ended.code, ended.out) == (75, "")
    # Nothing is kept of it.
    last = "stopped: on SIGTERM; the same command starts from the beginning"
    assert ended.err.splitlines()[-1] == last
