"""The command line itself: help at once, results on stdout, everything else on stderr."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import OPTConfig, OPTForCausalLM

COLOR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
HEAVY = ("torch", "transformers", "lm_eval", "datasets", "safetensors", "numpy")
WINDOW = ("--window", 32, "--windows", 2)


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a separate Python process whose streams are not a terminal."""
    ours = ("FORCE_COLOR", "NO_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERM", "COLUMNS")
    environment = {k: v for k, v in os.environ.items() if k not in ours} | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


HELP = """
import sys
from lrc.cli.main import main
sys.argv = ["lrc", *{arguments}]
try:
    main()
except SystemExit as ended:
    print(ended.code, [name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["compress", "--help"], ["--version"], ["recipes", "list"], ["schema"]],
)
def test_commands_without_a_model_load_no_model_library(arguments: list[str]) -> None:
    done = python(HELP.format(arguments=arguments, heavy=HEAVY))
    assert done.stderr == "0 []\n"
    assert done.stdout


def test_an_invalid_recipe_is_refused_without_loading_them(tmp_path: Path) -> None:
    arguments = ["compress", str(tmp_path / "no.yaml")]
    done = python(HELP.format(arguments=arguments, heavy=HEAVY))
    assert done.stderr.splitlines()[-1] == "2 []"
    assert "no such file" in done.stderr


DETAILS = """
import logging, sys
from lrc.cli.main import main
sys.argv = ["lrc", *{arguments}, "recipes", "list"]
try:
    main()
except SystemExit:
    pass
logging.getLogger("lrc.compressors.kernels").info("a detail")
logging.getLogger("lrc.compressors.kernels").warning("a warning")
logging.getLogger("another.library").info("of another library")
"""


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [([], "a warning\n"), (["--verbose"], "info: a detail\nwarning: a warning\n")],
    ids=["plain", "verbose"],
)
def test_details_are_shown_if_wanted(arguments: list[str], shown: str) -> None:
    assert python(DETAILS.format(arguments=arguments)).stderr == shown


def test_help_names_every_command_and_exit_code() -> None:
    done = python(HELP.format(arguments=["--help"], heavy=HEAVY), COLUMNS="100")
    for word in (
        "plan",
        "compress",
        "eval",
        "bench",
        "delta",
        "export",
        "generate",
        "inspect",
        "recipes",
        "schema",
        "75 stopped",
    ):
        assert word in " ".join(done.stdout.split())


def test_only_terminals_get_colors_unless_disabled() -> None:
    code = HELP.format(arguments=["--help"], heavy=HEAVY)
    assert "\x1b" not in python(code).stdout
    assert COLOR.search(python(code, FORCE_COLOR="1", TERM="xterm-256color").stdout)
    assert not COLOR.search(
        python(code, FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1").stdout
    )


USAGE: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no recipe": (["compress"], ("missing argument", "recipe", "`lrc compress --help`")),
    "no checkpoint": (["eval"], ("missing argument", "`lrc eval --help`")),
    "misspelt command": (["compres"], ("no such command 'compres'", "'compress'")),
    "unknown option": (["plan", "a.yaml", "--quick"], ("no such option: --quick",)),
    "unknown option of lrc": (["--quick"], ("no such option: --quick", "`lrc --help`")),
    "no value": (["plan", "a.yaml", "--device"], ("'--device' requires an argument",)),
    "no number": (["eval", "a", "--window", "wide"], ("invalid value for '--window'",)),
    "no name": (
        ["export", "a", "b", "--format", "drafter", "--parent", ""],
        ("invalid value for '--parent'", "must be a folder"),
    ),
    "too much": (["schema", "more"], ("unexpected extra argument", "more")),
    "no such recipe": (["recipes", "show", "dmo"], ("demo", "svd-llm")),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_command_lines_exit_with_2(lrc, case: str) -> None:
    arguments, words = USAGE[case]
    code = "unknown-recipe" if case == "no such recipe" else "usage"
    lrc(*arguments).refuses(2, *words, code=code)


def test_no_command_shows_the_help(lrc) -> None:
    ended = lrc()
    assert (ended.code, ended.err) == (2, "")
    assert "Usage: lrc" in ended.out


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_devices_are_checked_against_the_machine(
    lrc, recipe: Path, output: Path, command: str
) -> None:
    lrc(command, recipe, "--device", "gpu").refuses(2, "--device: must be auto, cpu, cuda or")
    lrc(command, recipe, "--device", "cuda:99").refuses(2, "cuda:99", "torch sees", "--device cpu")
    assert not output.exists()


EVAL: dict[str, tuple[list[object], int, tuple[str, ...]]] = {
    "nothing to measure": ([], 2, ("nothing to measure", "--perplexity python-docs")),
    "no such text": (["--perplexity", "no.txt"], 2, ("--perplexity: no such file: no.txt",)),
    "unknown text": (["--perplexity", "c5"], 2, ("--perplexity: must be python-docs",)),
    "window of nothing": (
        ["--perplexity", "python-docs", "--window", 0],
        2,
        ("'--window': must be a whole number >= 1, got 0",),
    ),
    "window of one": (["--perplexity", "python-docs", "--window", 1], 2, ("--window: must be at",)),
    "window beyond": (
        ["--perplexity", "python-docs", "--window", 512],
        2,
        ("--window: must be at most 256", "got 512"),
    ),
    "no task files": (
        ["--tasks", "a", "--include-path", "nowhere"],
        2,
        ("--include-path: no such folder: nowhere",),
    ),
}


@pytest.mark.parametrize("case", EVAL)
def test_errors_of_eval_name_its_options_not_recipe_keys(
    lrc, tiny_model_folder: Path, case: str
) -> None:
    options, code, words = EVAL[case]
    ended = lrc("eval", tiny_model_folder, *options)
    ended.refuses(code, *words)
    assert "evaluate." not in ended.err


def test_eval_of_missing_models(lrc, tmp_path: Path) -> None:
    text = ("--perplexity", "python-docs")
    lrc("eval", tmp_path / "no", *text).refuses(2, f"no file or folder '{tmp_path / 'no'}'")
    lrc("eval", "no-such/model", *text).refuses(1, "'no-such/model'", "not a local folder", "Hub")
    lrc("eval", tmp_path, *text).refuses(1, "no checkpoint here (no config.json)")


def test_generate_continues_a_prompt_with_every_model(lrc, tiny_model_folder: Path) -> None:
    models = (tiny_model_folder, f"{tiny_model_folder}/")
    ended = lrc("generate", *models, "--prompt", "a", "--tokens", 3, "--json")
    assert (ended.code, ended.err) == (0, "")
    values = json.loads(ended.out)
    assert values["prompt"] == "a"
    assert [*values["continuations"]] == [str(model) for model in models]
    first, second = values["continuations"].values()
    assert first == second != ""
    shown = lrc("generate", tiny_model_folder, "--prompt", "a", "--tokens", 3).out
    assert shown.splitlines()[0] == "prompt: a"
    assert f"\n{tiny_model_folder}:\n{first.strip()}" in shown


def test_generate_refuses_what_it_cannot_continue(lrc, tmp_path: Path) -> None:
    lrc("generate", tmp_path, "--prompt", "").refuses(2, "--prompt: must contain text")
    lrc("generate", tmp_path, "--prompt", "a", "--tokens", 0).refuses(2, "--tokens: must be")
    missing = tmp_path / "no"
    lrc("generate", missing, "--prompt", "a").refuses(2, f"no file or folder '{missing}'")


def test_results_go_to_stdout_and_everything_else_to_stderr(
    lrc, recipe: Path, output: Path, tiny_model_folder: Path, tiny_text: Path
) -> None:
    planned = lrc("plan", recipe, "--json")
    assert (planned.code, planned.err) == (0, "")
    assert json.loads(planned.out)["totals"]["kept"] < 0.6
    assert not output.exists()

    done = lrc("compress", recipe, "--json")
    assert done.code == 0
    assert json.loads(done.out) == json.loads((output / "report.json").read_text())
    warning, *lines = done.err.splitlines()  # a random model is no better than chance
    assert warning.startswith("warning: near-uniform-model: ")
    stages = [line.partition(":")[0] for line in lines]
    evaluated = ["evaluate dense", "evaluate compressed", "evaluate dense and compressed"]
    assert stages == ["calibrate", "compress", *evaluated]
    assert "\x1b" not in done.err

    checkpoint = output / "checkpoint"
    options = ("--perplexity", tiny_text, *WINDOW, "--json")
    measured = lrc("eval", tiny_model_folder, checkpoint, *options)
    assert measured.code == 0
    blocks = json.loads(measured.out)["checkpoints"]
    report = json.loads(done.out)["evaluation"]["perplexity"]["english"]
    assert [block["perplexity"]["english"]["perplexity"] for block in blocks.values()] == [
        pytest.approx(report["dense"], rel=1e-2),  # in bfloat16 there, as stored here
        pytest.approx(report["compressed"], rel=1e-6),
    ]
    assert len(measured.err.splitlines()) == 3  # one line a model, and their comparison

    inspected = lrc("inspect", checkpoint, "--verify", "--json")
    assert (inspected.code, inspected.err) == (0, "")
    assert json.loads(inspected.out)["verified"] is True
    for command in (["schema"], ["recipes", "list", "--json"]):
        ended = lrc(*command)
        assert (ended.code, ended.err) == (0, "")
        assert isinstance(json.loads(ended.out), dict)


def test_quiet_leaves_warnings_on_stderr(lrc, recipe: Path, output: Path, tiny_text: Path) -> None:
    for command, warnings in (
        (("compress", recipe), ["warning: near-uniform-model"]),
        (("compress", recipe), []),  # finished already
        (("eval", output / "checkpoint", "--perplexity", tiny_text, *WINDOW), []),
    ):
        ended = lrc(*command, "-q")
        assert ended.code == 0
        assert [line.rpartition(": ")[0][:27] for line in ended.err.splitlines()] == warnings
        assert ended.out
        assert "\x1b" not in ended.out


def test_commands_find_the_checkpoint_of_a_run(
    lrc, recipe: Path, output: Path, tmp_path: Path
) -> None:
    lrc("inspect", output).refuses(2, "no such folder", code="usage")
    assert lrc("compress", recipe, "evaluate={}", "-q").code == 0
    for command in (
        ("inspect", output),
        ("generate", output, "--prompt", "a", "--tokens", 1),
        ("bench", output, "--batch", 1, "--prompt", 4, "--tokens", 2, "--repeats", 1),
        ("export", output, tmp_path / "dense", "--format", "dense"),
    ):
        ended = lrc(*command)
        assert ended.code == 0, ended.err
    assert (tmp_path / "dense/config.json").is_file()


def test_a_missed_gate_exits_with_4_after_all_results_are_written_and_shown(
    lrc, recipe: Path, output: Path
) -> None:
    gates = (
        "evaluate.gates=[{metric: perplexity.english, at_most: 1.5},"
        " {metric: perplexity.english, relative: true, at_most: 0.1}]"
    )
    for _ in range(2):  # also if the run is finished already
        ended = lrc("compress", recipe, gates, "--json", "-q")
        assert ended.code == 4
        assert [error.partition(" is ")[0] for error in ended.errors] == [
            "error[gate-missed]: perplexity.english"
        ] * 2
        assert "must be at most 1.5" in ended.errors[0]
        assert "compressed / dense" in ended.errors[1]
        assert json.loads(ended.out) == json.loads((output / "report.json").read_text())
        assert (output / "checkpoint" / "config.json").exists()
    assert lrc("compress", recipe, gates, "evaluate.gates=[]", "-q").code == 0


def test_an_unexpected_error_shows_a_traceback_only_with_debug(
    lrc, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrc.compressors import pipeline

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(pipeline, "prepare", fail)
    ended = lrc("compress", recipe)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.splitlines() == [
        "error[internal]: unexpected ZeroDivisionError: a b; this is a bug in lrc: run `lrc "
        "--debug ...` and report the traceback"
    ]
    debugged = lrc("--debug", "compress", recipe)
    assert debugged.code == 1
    assert "Traceback" in debugged.err


def test_running_out_of_memory_names_what_to_lower(
    lrc, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrc.compressors import pipeline

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pipeline, "prepare", fail)
    lrc("compress", recipe).refuses(1, "calibration.memory_limit_gib", code="out-of-memory")


def test_without_a_recipe_running_out_of_memory_names_no_key(
    lrc, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrc.cli import generate

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(generate, "run", fail)
    ended = lrc("generate", tiny_model_folder, "--prompt", "a")
    ended.refuses(1, "use --device cpu", code="out-of-memory")
    assert "calibration" not in ended.err


def test_a_broken_tokenizer_is_named_without_keys_of_a_recipe(
    lrc, tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "tokenizer.json").write_text("{")
    ended = lrc("generate", folder, "--prompt", "a")
    ended.refuses(1, "no tokenizer could be loaded", str(folder))


def test_a_closed_pipe_is_not_an_error() -> None:
    code = (
        "import subprocess, sys; run = [sys.executable, '-m', 'lrc', 'schema']; "
        "p = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True); "
        "p.stdout.close(); print(p.stderr.read(), p.wait())"
    )
    assert python(code).stdout.split() == ["0"]


def test_copies_of_recipes_do_not_replace_files(lrc, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    ended = lrc("recipes", "copy", "demo", target)
    assert (ended.code, ended.out, ended.err) == (0, "", f"wrote {target}\n")
    assert target.read_text() == lrc("recipes", "show", "demo").out
    target.write_text("mine")
    lrc("recipes", "copy", "demo", target).refuses(2, "exists already; name another file")
    assert target.read_text() == "mine"
    lrc("recipes", "copy", "demo", target / "below").refuses(2, "cannot be written", "another file")


def test_every_model_is_checked_before_one_is_measured(
    lrc, tiny_model_folder, tiny_text, make_tokenizer, tmp_path
):
    config = OPTConfig(
        vocab_size=512,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path / "short")
    make_tokenizer().save_pretrained(tmp_path / "short")
    options = ("--perplexity", tiny_text, "--window", 64, "--windows", 2)
    ended = lrc("eval", tiny_model_folder, tmp_path / "short", *options)
    ended.refuses(2, "--window: must be at most 32")
    assert "perplexity tiny" not in ended.err  # the progress of the first model
