"""`lrc sweep`: runs are those of `lrc compress`, share their statistics, and are compared."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors.calibrate import statistics
from lrc.compressors.compress import task_solver
from lrc.compressors.io.machine import Machine
from lrc.compressors.planning import rate_distortion
from lrc.compressors.sweep.run_sweep import Sweep
from lrc.compressors.sweep.solved_tasks import FinishedRun
from lrc.configs.axes import combinations, read_axes
from lrc.configs.errors import Stopped


@pytest.fixture
def recipe(
    tiny_model_folder: Path, tiny_text: Path, tiny_recipe: Callable[..., Path], output: Path
) -> Path:
    perplexity = {"source": str(tiny_text), "name": "english", "window": 32, "windows": 3}
    evaluate = {"perplexity": [perplexity], "baselines": ["int8"]}
    stages = [{"decompose": {"method": "kfac", "keep": 0.6}}]
    return tiny_recipe(tiny_model_folder, output, evaluate=evaluate, stages=stages)


def contents(checkpoint: Path) -> dict[str, bytes]:
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    names = {str(file.relative_to(checkpoint)): file for file in files}
    other = ("config.json", "tokenizer.json", "tokenizer_config.json")
    return {n: f.read_bytes() for n, f in names.items() if f.suffix == ".safetensors" or n in other}


class Calls:
    """Counts calls of a function, which still does its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.count, function = 0, getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counted)


def test_runs_are_those_of_compress_and_share_statistics_curves_and_dense_scores(
    lrc: Callable[..., Any], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"
    values = ("keep=0.7,0.5", "method=kfac,mixed,svd-llm")
    forward = Calls(monkeypatch, statistics, "forward_layer")
    curves = Calls(monkeypatch, rate_distortion, "_curves")
    ended = lrc("sweep", recipe, *values, "--output", folder, "--json")
    assert ended.code == 0
    found = json.loads(ended.out)
    assert found == json.loads((folder / "sweep.json").read_text())
    assert forward.count == 2  # layers of one pass, for three requirements
    assert curves.count == 2 * 14  # matrices, for the methods with an allocation
    assert ended.err.count("evaluate dense: perplexity english") == 1
    assert ended.err.count("tokens are few for") <= 2  # input widths
    assert ended.err.count("evaluate int8: perplexity english") == 1
    assert not (folder / "shared").exists()
    names = [run["name"] for run in found["runs"]]
    assert names == [
        f"keep={k}_method={m}" for k in (0.7, 0.5) for m in ("kfac", "mixed", "svd-llm")
    ]
    assert {run["status"] for run in found["runs"]} == {"finished"}
    for run in found["runs"]:
        alone = tmp_path / "alone"
        assert lrc("compress", recipe, *run["overrides"], f"output={alone}", "-q").code == 0
        assert contents(folder / run["name"] / "checkpoint") == contents(alone / "checkpoint")
        evaluation = json.loads((alone / "report.json").read_text())["evaluation"]
        assert run["metrics"]["kl.english"]["value"] == evaluation["kl"]["english"]["forward"]
        assert (
            run["metrics"]["perplexity.english"]["dense"]
            == (evaluation["perplexity"]["english"]["dense"])
        )
        shutil.rmtree(alone)


@pytest.mark.parametrize(
    ("options", "values", "solved"),
    [
        # A checkpoint of integers only is plain: its tensors have other names.
        ({"components": ["dense"], "schemes": ["int8-g16", "int4-g16"]}, "keep=0.4,0.38", 0),
        ({"components": ["pivoted_low_rank", "sparse"]}, "embeddings=int8,int4-g16", 14),
    ],
)
def test_what_a_finished_run_has_solved_is_not_solved_again(
    lrc: Callable[..., Any],
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    values: str,
    solved: int,
) -> None:
    stages = json.dumps([{"decompose": {"method": "mixed", "keep": 0.4, **options}}])
    settings = (recipe, f"stages={stages}", "evaluate={}", "-q")
    calls = Calls(monkeypatch, task_solver, "compress_together")
    folder = tmp_path / "sweep"
    assert lrc("sweep", *settings, values, "--output", folder).code == 0
    if solved:
        assert calls.count == solved
    assert 14 <= calls.count < 28  # matrices of one run, and of two
    (axis,) = read_axes([values]).items()
    for value in axis[1]:
        alone = tmp_path / value
        assert lrc("compress", *settings, f"{axis[0]}={value}", f"output={alone}").code == 0
        both = (alone, folder / f"{axis[0]}={value}")
        assert contents(both[0] / "checkpoint") == contents(both[1] / "checkpoint")
        plans, layers = [], []
        for output in both:
            plans.append(json.loads((output / "checkpoint/lrc/plan.json").read_text()))
            layers.append(json.loads((output / "report.json").read_text())["layers"])
        assert plans[0] == plans[1]
        assert layers[0] == layers[1]
    checkpoint = alone / "checkpoint"
    (task, *_) = FinishedRun(checkpoint, "cpu").plan.tasks
    assert FinishedRun(checkpoint, "cpu").find([task]) is not None
    (checkpoint / "config.json").write_text("{}")  # changed since
    assert FinishedRun(checkpoint, "cpu").find([task]) is None


def test_a_second_call_adds_runs_and_repeats_none(
    lrc: Callable[..., Any], recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    assert lrc("sweep", recipe, "keep=0.7,0.6", "--output", folder, "-q").code == 0
    before = (folder / "keep=0.7/report.json").stat().st_mtime_ns
    ended = lrc("sweep", recipe, "keep=0.7,0.6", "--output", folder, "--json")
    assert ended.code == 0
    assert "compress" not in ended.err
    assert lrc("sweep", recipe, "keep=0.7,0.5", "--output", folder, "-q").code == 0
    assert (folder / "keep=0.7/report.json").stat().st_mtime_ns == before
    assert (folder / "keep=0.5/checkpoint").is_dir()


def test_an_interrupted_sweep_continues(
    lrc: Callable[..., Any], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "keep=0.6: compress":
            raise Stopped("stopped by a test")

    sweep = Sweep(recipe, folder, Machine("cpu", on_step=stop))
    runs = combinations(read_axes(["keep=0.7,0.6"]))
    with pytest.raises(Stopped), sweep.opened() as shared:
        sweep.run(runs, shared)
    assert (folder / "keep=0.7/report.json").is_file()
    forward = Calls(monkeypatch, statistics, "forward_layer")
    ended = lrc("sweep", recipe, "keep=0.7,0.6", "--output", folder)
    assert ended.code == 0
    assert forward.count == 0
    assert (folder / "keep=0.6/report.json").is_file()


def test_a_run_that_fails_stops_no_other(
    lrc: Callable[..., Any], recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    ended = lrc("sweep", recipe, "keep=0.001,0.6", "--output", folder, "-q")
    assert ended.code == 1
    assert "keep=0.001: stages[0].decompose.keep" in ended.errors[0]
    assert "failed: keep=0.001" in ended.out
    found = json.loads((folder / "sweep.json").read_text())
    assert [run["status"] for run in found["runs"]] == ["infeasible-budget", "finished"]
    assert found["pareto"]["kl.english"] == ["keep=0.6"]


def test_missed_gates_exit_with_4_and_keep_the_run(
    lrc: Callable[..., Any], recipe: Path, tmp_path: Path
) -> None:
    gate = "evaluate.gates=['perplexity.english <= 0.1x']"
    ended = lrc(
        "sweep", recipe, gate, "keep=0.7,0.6", "--output", tmp_path / "sweep", "--json", "-q"
    )
    assert ended.code == 4
    for run in json.loads(ended.out)["runs"]:
        assert run["status"] == "gate-missed"
        assert run["metrics"]["perplexity.english"]["value"] > 0


def test_a_target_is_met_with_the_smallest_keep_of_six_runs(
    lrc: Callable[..., Any], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"
    forward = Calls(monkeypatch, statistics, "forward_layer")
    target = ("--target", "agreement.english >= 0.5")
    ended = lrc("sweep", recipe, "--output", folder, *target, "--json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    (result,) = found["target"]["found"]
    runs = {run["name"]: run["metrics"] for run in found["runs"] if run["metrics"]}
    assert len(runs) <= 6
    assert forward.count == 2  # layers, once for all runs
    agreement = {name: each["agreement.english"]["value"] for name, each in runs.items()}
    assert agreement[result["run"]] >= 0.5
    assert agreement[f"keep={result['not_met']:g}"] < 0.5
    assert result["keep"] - result["not_met"] <= 1 / 64 + 1e-9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kep=0.5"], "unknown key"),
        (["keep=0.5,,0.6"], "must have a value before and after every comma"),
        (["keep=0.5,0.5"], "must not list a value twice"),
        (["keep=0.5", "keep=0.6"], "keep is given twice"),
        (["keep"], "must be key=value"),
        (["keep=0.5,0.6", "stages.0.decompose.keep=0.7,0.8"], "are the same recipe"),
        (["output=a"], "write --output a"),
        ([], "must have a key with several values"),
        (["keep=0.5"], "must have a key with several values"),
        (["keep=0.5", "--target", "kl.english <= 1"], "searches keep"),
        (["--target", "kl.english < 1"], "must be a gate such as"),
        (["--target", "kl.englis <= 1"], "did you mean 'kl.english'"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    lrc: Callable[..., Any], recipe: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    ended = lrc("sweep", recipe, *arguments, "--output", tmp_path / "sweep", "-q")
    ended.refuses(2, words)
    assert not (tmp_path / "sweep").exists()


def test_a_folder_of_others_is_refused(
    lrc: Callable[..., Any], recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    ended = lrc("sweep", recipe, "keep=0.5,0.6", "--output", tmp_path / "mine", "-q")
    ended.refuses(1, "was not written by lrc sweep", "notes.txt")


def test_the_page_shows_runs_and_plots(
    lrc: Callable[..., Any], recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    ended = lrc("sweep", recipe, "keep=0.7,0.5", "--output", folder, "-q")
    assert ended.code == 0
    assert "keep=0.5" in ended.out
    page = (folder / "sweep.html").read_text()
    assert "<title>Sweep of out.yaml</title>" in page
    assert page.count("<figure>") == 3
    assert "keep=0.7" in page
    plot = (folder / "sweep.svg").read_text()
    assert plot.startswith("<?xml")
    assert "var(--" not in plot
