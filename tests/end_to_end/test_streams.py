"""Closed streams, readers that leave, and small encodings: the work is done, the exit code right.

The command runs in processes started by a shell: in this one, pytest owns the streams.
"""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

LRC = f"{sys.executable} -c 'from lrc.cli.main import main; main()'"
SMALL = {
    "stages": [{"quantize": {"method": "rtn", "bits": 8}}],
    "evaluate": {"perplexity": [], "baselines": []},
}


@pytest.fixture
def shell(tmp_path):
    """Run a command line of the shell; `lrc` stands for the command."""

    def run(line, **environment):
        return subprocess.run(
            ["bash", "-c", line.replace("lrc ", f"{LRC} ")],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            timeout=120,
            check=False,
        )

    return run


def good(ended, code=0):
    assert ended.returncode == code, ended.stderr
    for word in (b"Traceback", b"error[internal]", b"Exception ignored"):
        assert word not in ended.stderr + ended.stdout


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "> >(true) 2> >(true)"])
def test_a_run_whose_streams_are_closed_or_whose_readers_leave_is_completed(
    shell, lrc, tiny_recipe, tiny_model_folder, tmp_path, redirection
):
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", **SMALL)
    good(shell(f"lrc compress {recipe} --device cpu {redirection}"))
    json.loads((tmp_path / "run/report.json").read_text())
    # Nothing was printed into a file.
    assert lrc("inspect", tmp_path / "run/checkpoint", "--verify").code == 0


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("set -o pipefail; lrc schema | true", 0),
        ("set -o pipefail; lrc recipes show nothing 2>&1 | true", 2),
        ("lrc recipes show nothing 2>&-", 2),
        ("lrc recipes show nothing 2>/dev/full", 2),
        ("lrc schema >/dev/full", 1),
        ("lrc --help >&-", 0),
        ("lrc --version >&-", 0),
    ],
)
def test_the_exit_code_is_that_of_the_work(shell, line, code):
    good(shell(line), code)


def test_paths_outside_the_encoding_of_the_streams(shell, tiny_recipe, tiny_model_folder, tmp_path):
    odd = tmp_path / "mödel-Ж"
    odd.mkdir()
    recipe = tiny_recipe(tiny_model_folder, odd / "run", **SMALL)
    good(shell(f"lrc compress '{recipe}' --device cpu", PYTHONIOENCODING="ascii"))
    ended = shell(f"lrc inspect '{odd}/run/checkpoint'", PYTHONIOENCODING="ascii")
    good(ended)
    assert b"m\\xf6del" in ended.stdout.replace(b"\n", b"")  # long paths are broken into lines
    good(shell(f"lrc plan '{odd}/none.yaml'", PYTHONIOENCODING="ascii"), 2)
    good(shell(f"lrc plan '{odd}/none.yaml'", LC_ALL="C"), 2)


@pytest.mark.parametrize("columns", ["0", "1", "many"])
def test_tables_fit_terminals_of_any_width(shell, columns):
    good(shell("lrc recipes list", TERM="dumb", COLUMNS=columns))
    good(shell("lrc compress --help", TERM="dumb", COLUMNS=columns))


def test_a_file_name_that_is_not_utf_8(shell, tiny_recipe, tiny_model_folder, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xff"))
    odd.mkdir()
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", **SMALL)
    recipe.rename(odd / "recipe.yaml")
    good(shell("lrc plan n*/recipe.yaml"))
    good(shell("lrc plan n*/none.yaml none=$(echo n*)"), 2)


def test_progress_on_a_terminal_of_five_columns(tiny_recipe, tiny_model_folder, tmp_path):
    environment = {"TERM": "xterm", "COLUMNS": "5"}
    recipe = tiny_recipe(tiny_model_folder, tmp_path / "run", **SMALL)
    command = ["bash", "-c", f"exec {LRC} compress {recipe} --device cpu"]
    main, side = pty.openpty()
    with subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, env={**os.environ, **environment}
    ) as process:
        os.close(side)
        seen = b""
        while True:
            try:
                block = os.read(main, 4096)
            except OSError:  # the other side is closed
                break
            if not block:
                break
            seen += block
    os.close(main)
    assert process.returncode == 0, seen
    assert b"Traceback" not in seen
    assert b": loading libraries" in seen  # printed before seconds without progress
    assert (tmp_path / "run/report.json").exists()
