"""A run that is killed at any moment continues, and ends with the bytes of an undisturbed one.

Runs are forked from this process, which has paid for the imports and calculates on one thread: a
forked OpenMP would hang on two.
"""

import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import RLock
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from lrc.compressors import session
from lrc.compressors.calibrate import activation_cache
from lrc.compressors.corpus.documents import read_documents
from lrc.compressors.estimates.machine_rates import measure_rates
from lrc.compressors.io import background_writes
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.errors import OutputError, Stopped
from lrc.configs.load import load_recipe

# Newer Pythons warn of any fork with threads; those of torch are idle.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

KILLS = [
    ("recommended", 12),
    pytest.param("recommended", 20, marks=pytest.mark.robustness),
    ("allocated", 6),
]
LAYERS = 3
DIFFERENT_EACH_TIME = {"lrc/report.json", "README.md"}  # they contain times and peaks
CHAT = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Calculate on one thread, and save the hidden states after every layer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # Once, and not in every child.
    measure_rates("cpu", torch.float32, tmp_path_factory.getbasetemp())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_cache, "SNAPSHOT_SECONDS", 0.0)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def new_recipe(
    write_recipe: Callable[..., Path],
    tiny_llama: Callable[..., Any],
    make_tokenizer: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Write a recipe for a Llama of three layers into a new folder; keywords replace its keys."""
    source = tmp_path_factory.mktemp("source")
    tiny_llama(num_hidden_layers=LAYERS).save_pretrained(source)
    make_tokenizer(chat_template=CHAT).save_pretrained(source)

    def write(**changes: Any) -> Path:
        return write_recipe(tmp_path_factory.mktemp("resume"), source, **changes)

    return write


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a short text, which is read quickly."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(islice(read_documents("python-docs", part="calibration"), 3)))
    return str(path)


@dataclass(frozen=True)
class Undisturbed:
    """A recipe, and the results of an undisturbed run of it."""

    recipe: Path
    files: dict[str, bytes]
    work: set[str]
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(new_recipe: Callable[..., Path], text: str) -> Undisturbed:
    perplexity = [{"source": text, "window": 32, "windows": 2}]
    return finished(
        new_recipe(
            calibration={"source": text, "samples": 4, "length": 32},
            evaluate={"perplexity": perplexity, "baselines": ["int4-g16", "sparse"]},
        )
    )


@pytest.fixture(scope="module")
def recommended(new_recipe: Callable[..., Path], text: str) -> Undisturbed:
    """Run a recipe with all steps: forward and backward pass, allocation, compensation."""
    perplexity = [{"source": text, "window": 32, "windows": 2}]
    return finished(
        new_recipe(
            calibration={"source": text, "samples": 4, "length": 32},
            stages=[{"decompose": {"method": "kfac", "keep": 0.6, "compensate": {}}}],
            evaluate={"perplexity": perplexity, "baselines": []},
        )
    )


@pytest.fixture(scope="module")
def allocated(new_recipe: Callable[..., Path], text: str) -> Undisturbed:
    """Run a recipe whose ranks depend on singular values, and whose layers share a factor."""
    stage = {"method": "basis-sharing", "keep": 0.6, "allocation": "lagrangian"}
    return finished(
        new_recipe(
            calibration={"source": text, "samples": 4, "length": 32},
            stages=[{"decompose": stage}],
        )
    )


@pytest.fixture(scope="module")
def grouped(new_recipe: Callable[..., Path], text: str) -> Undisturbed:
    """Run a recipe whose layers share dictionaries, with sizes that depend on losses."""
    stage = {"method": "cospadi", "keep": 0.6, "rounds": 1, "layers_per_group": 2}
    return finished(
        new_recipe(
            calibration={"source": text, "samples": 4, "length": 32},
            stages=[{"decompose": {**stage, "allocation": "lagrangian"}}],
        )
    )


def finished(recipe: Path) -> Undisturbed:
    run = recipe.with_name("run")
    finish(recipe)  # late imports and first reads from the disk take time once
    shutil.rmtree(run)
    seconds = finish(recipe)
    return Undisturbed(recipe, checkpoint_of(run), work_of(run), seconds)


def start(recipe: Path, before: Callable[[], None] = lambda: None) -> int:
    """Fork a process that runs a recipe; return its id."""
    child = os.fork()
    return child if child else _run(recipe, before)


def _run(recipe: Path, before: Callable[[], None]) -> NoReturn:
    status = 1
    try:
        signal.alarm(60)
        torch.set_num_threads(1)  # torch creates its pool again, before threads load weights
        tqdm.set_lock(RLock())  # the default is shared, and a killed process may hold it
        before()
        compress(load_recipe(recipe), Machine(device="cpu"))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # without the handlers of pytest


def finish(recipe: Path) -> float:
    """Run a recipe to its end; return the seconds that took."""
    begun = time.monotonic()
    assert not was_killed(start(recipe))
    return time.monotonic() - begun


def was_killed(child: int) -> bool:
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def checkpoint_of(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoint"
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert set(files) >= DIFFERENT_EACH_TIME
    return {name: data for name, data in files.items() if name not in DIFFERENT_EACH_TIME}


def work_of(run: Path) -> set[str]:
    """Return the names in the output folder, without those in the checkpoint."""
    names = {str(f.relative_to(run)) for f in run.rglob("*")}
    return {name for name in names if not name.startswith("checkpoint/")}


def stage_of(run: Path) -> str:
    """Return the stage in which a run was killed, from its files."""
    work = run / "work"
    marks = {
        "reported": run / "report.json",
        "evaluating": run / "checkpoint",
        "saving": run / ".checkpoint.partial",
        "compressing": work / "compressed",
        "allocating": work / "energies",
        "calibrating": work / "statistics",
        "windows": work / "windows.safetensors",
        "claimed": work / "run.json",
    }
    return next((stage for stage, path in marks.items() if path.exists()), "preparing")


@pytest.mark.quiet
@pytest.mark.parametrize(("case", "least"), KILLS)
def test_kills_at_random_moments_give_equal_checkpoints(case, least, request):
    undisturbed: Undisturbed = request.getfixturevalue(case)
    run = undisturbed.recipe.with_name("run")
    random_ = random.Random(0)
    stages, seconds, kills, attempts = set(), undisturbed.seconds, 0, 0
    # A run of a second may spend little time in some stages: then there are more kills.
    while kills < least or len(stages) < min(4, least // 2):
        attempts += 1
        assert attempts < 4 * least, f"{kills} kills, in the stages {stages}"
        shutil.rmtree(run, ignore_errors=True)
        child = start(undisturbed.recipe)
        # One moment of each equal part of a run, in turn.
        time.sleep((kills % least + random_.random()) / least * seconds)
        os.kill(child, signal.SIGKILL)
        if not was_killed(child):
            seconds *= 0.8  # the machine has become quicker
            continue
        kills += 1
        stages.add(stage_of(run))
        seconds = max(seconds, finish(undisturbed.recipe))  # or slower
        assert checkpoint_of(run) == undisturbed.files
        assert work_of(run) == undisturbed.work


@pytest.mark.parametrize(
    "case",
    [
        "recommended",
        *(
            pytest.param(case, marks=pytest.mark.robustness)
            for case in ("undisturbed", "allocated", "grouped")
        ),
    ],
)
def test_a_run_that_is_killed_after_every_file_it_writes_gives_the_same_checkpoint(case, request):
    """Files get their names by `os.replace`: kill right after each new name.

    In one case, results are written in the background, as on a GPU.
    """
    undisturbed: Undisturbed = request.getfixturevalue(case)
    run, replace = undisturbed.recipe.with_name("run"), os.replace
    log = undisturbed.recipe.with_name("published")
    log.write_text("work/seconds.json\n")  # rewritten by every stage

    def kill_after(partial: Path, final: Path) -> None:
        replace(partial, final)
        name = str(final.relative_to(run))
        if name not in log.read_text().split():
            log.write_text(f"{log.read_text()}{name}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def before() -> None:
        os.replace = kill_after  # type: ignore[assignment]
        if case == "recommended":
            background_writes.DEVICE_TYPES = {"cpu"}
            background_writes.THREADS = 1  # two might publish a file each before the kill

    shutil.rmtree(run, ignore_errors=True)
    kills = 0
    while was_killed(start(undisturbed.recipe, before)):
        kills += 1
    published = log.read_text().split()
    assert kills == len(published) - 1
    assert {"checkpoint", "report.json", "work/plan.json"} <= {*published}
    kinds = {"statistics/inputs", "compressed/layer"}
    if case == "recommended":
        kinds |= {"statistics/gradients", "energies/layer"}
    for kind in kinds:
        assert {f"work/{kind}-{n:04d}.safetensors" for n in range(LAYERS)} <= {*published}
    assert ("work/energies/layer-0000.safetensors" in published) == (case != "undisturbed")
    chain = "gradients" if case == "recommended" else "states"
    assert f"work/{chain}-0001.f32" in published
    plain = {f"work/evaluation-{name}.json" for name in ("int4-g16", "sparse")}
    assert plain & {*published} == (plain if case == "undisturbed" else set())
    assert checkpoint_of(run) == undisturbed.files
    assert work_of(run) == undisturbed.work


def test_deleted_results_are_computed_again(recommended):
    """A deleted checkpoint, and a file that an error has called damaged."""
    run = recommended.recipe.with_name("run")
    shutil.rmtree(run, ignore_errors=True)
    finish(recommended.recipe)
    shutil.rmtree(run / "checkpoint")
    finish(recommended.recipe)
    assert checkpoint_of(run) == recommended.files

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("compress", 1):
            raise Stopped("requested")

    shutil.rmtree(run)
    with pytest.raises(Stopped):
        compress(load_recipe(recommended.recipe), Machine(device="cpu", on_step=stop))
    assert not (run / "work/statistics/inputs-0000.safetensors").exists()  # its layer is compressed
    damaged = run / "work/statistics/gradients-0002.safetensors"
    damaged.write_bytes(b"")
    with pytest.raises(OutputError, match=r"gradients-0002.safetensors: is damaged .* delete it"):
        compress(load_recipe(recommended.recipe), Machine(device="cpu"))
    damaged.unlink()
    finish(recommended.recipe)
    assert checkpoint_of(run) == recommended.files
    assert work_of(run) == recommended.work


def test_a_stopped_run_continues_with_the_layer_after(new_recipe):
    recipe = load_recipe(new_recipe())
    seen: list[tuple[str, int]] = []

    def stop_after(*place: Any) -> Callable[[str, int, int], None]:
        def on_step(stage: str, done: int, total: int) -> None:
            seen.append((stage, done))
            if (stage, done) == place:
                raise Stopped("requested")

        return on_step

    for place in (("calibrate", 2), ("compress", 2)):
        with pytest.raises(Stopped):
            compress(recipe, Machine(device="cpu", on_step=stop_after(*place)))
    compress(recipe, Machine(device="cpu", on_step=stop_after()))
    assert seen == [
        *(("calibrate", n) for n in (1, 2, 3)),
        *(("compress", n) for n in (1, 2)),
        *(("compress", n) for n in (1, 2, 3)),  # layers that are done are counted, not redone
    ]


def test_states_on_disk_give_the_same_weights(new_recipe, text):
    on_disk = []

    def look(stage: str, done: int, total: int) -> None:
        if stage == "calibrate":
            on_disk.append((Path(recipe.recipe.output) / "work/states.live").is_file())

    weights = []
    for limit in (1.0, 1e-9):
        calibration = {"source": text, "samples": 4, "length": 32}
        recipe = load_recipe(new_recipe(calibration={**calibration, "memory_limit_gib": limit}))
        compress(recipe, Machine(device="cpu", on_step=look))
        weights.append((Path(recipe.recipe.output) / "checkpoint/model.safetensors").read_bytes())
        assert not list(Path(recipe.recipe.output).glob("work/*states*"))
    assert on_disk == [False] * LAYERS + [True] * LAYERS
    assert weights[0] == weights[1]


def test_text_sampled_from_the_model_is_the_same_twice(new_recipe, monkeypatch):
    results, warnings = [], []
    for seed, free in ((0, 10**12), (0, 1000), (1, 10**12)):
        monkeypatch.setattr(session, "free_memory", lambda device, free=free: free)
        recipe = new_recipe(calibration={"source": "self", "samples": 4, "length": 24}, seed=seed)
        report = compress(load_recipe(recipe), Machine(device="cpu", on_warning=warnings.append))
        assert report["calibration"]["source"] == "self"
        assert report["calibration"]["tokens"] == 4 * 24
        weights = (recipe.with_name("run") / "checkpoint/model.safetensors").read_bytes()
        results.append((report["calibration"]["tokens_sha256"], weights))
    assert results[0] == results[1]  # the second layer by layer
    assert [text for text in warnings if "its layers are read once per token" in text]
    assert results[0][0] != results[2][0]
    assert results[0][1] != results[2][1]


def test_chat_calibration_sees_the_template(new_recipe, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "bot", "content": "."},
            ]
        }
        for i in range(60)
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    calibration = {"source": str(file), "chat_template": True, "samples": 6, "length": 48}
    recipe = new_recipe(calibration=calibration)
    compress(load_recipe(recipe), Machine(device="cpu"))
    tokens = load_file(recipe.with_name("run") / "work/windows.safetensors")["tokens"]
    assert tokens.shape == (6, 48)
    for special in (0, 1):  # <s> and </s>, which only the template puts there
        assert bool((tokens == special).any(dim=1).all())
