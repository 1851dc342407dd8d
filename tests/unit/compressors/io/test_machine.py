"""The device of a run: checked at once, and current wherever work is done on it."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lrc.cli import evaluate, generate, whole_models
from lrc.compressors import pipeline
from lrc.compressors.io import machine
from lrc.compressors.io.gpu_allocator import ALLOCATOR_SETTINGS, use_expandable_segments
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.errors import RecipeError
from lrc.configs.load import load_recipe
from lrc.configs.recipe import Evaluate, Perplexity


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend that torch sees a number of GPUs."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(
    "name",
    [
        *("gpu", "mps", "meta", "xpu", "CUDA", "cpu:0", "", "0", "1", " cuda", "cuda\n"),
        *("cuda:", "cuda:-1", "cuda:01", "cuda:1.0", "cuda:٣", "cuda:7", "cuda:99999"),
    ],
)
def test_what_is_no_device_of_this_machine_is_refused(
    gpus: Callable[[int], None], name: str, count: int
) -> None:
    gpus(count)
    with pytest.raises(RecipeError) as refused:
        Machine(name)
    (problem,) = refused.value.problems
    assert (problem.code, problem.where) == ("unknown-device", "--device")
    assert name.strip() in problem.message


@pytest.mark.parametrize(
    ("name", "count", "chosen"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:0", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
        ("cuda", 0, None),
        ("cuda:0", 0, None),
        ("cuda:1", 1, None),
    ],
)
def test_a_device_must_exist(
    gpus: Callable[[int], None], name: str, count: int, chosen: str | None
) -> None:
    gpus(count)
    if chosen is None:
        with pytest.raises(RecipeError):
            Machine(name)
    else:
        assert Machine(name).chosen == chosen


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1"])
def test_the_requested_device_is_made_current(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    gpus(2)
    current = ["cuda:0"]

    @contextmanager
    def device(requested: str) -> Iterator[None]:
        current.append(requested)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    with Machine(name).current():
        assert current[1:] == ([] if name == "cpu" else [name])
    assert current == ["cuda:0"]


@pytest.mark.parametrize("command", ["compress", "measure", "profile", "eval", "generate"])
def test_every_command_works_with_its_device_current(
    command: str,
    tiny_model_folder: Path,
    tiny_text: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside, loads = [False], []

    @contextmanager
    def current(self: Machine) -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    monkeypatch.setattr(Machine, "current", current)
    load = whole_models.load_model

    def loading(*arguments: Any, **options: Any) -> Any:
        loads.append(inside[-1])
        return load(*arguments, **options)

    for module in (whole_models, generate):
        monkeypatch.setattr(module, "load_model", loading)

    def on_step(stage: str, done: int, total: int) -> None:
        loads.append(inside[-1])

    recipe = load_recipe(tiny_recipe(tiny_model_folder, tmp_path / "out"))
    machine = Machine("cpu", on_step=on_step)
    if command == "eval":
        texts = Evaluate(perplexity=[Perplexity(source=str(tiny_text), window=32, windows=1)])
        evaluate.run([str(tiny_model_folder)], texts, machine, seed=0)
    elif command == "generate":
        generate.run([str(tiny_model_folder)], "A", tokens=1, device="cpu")
    elif command == "profile":
        pipeline.profile(recipe, 1, machine)
    else:
        getattr(pipeline, command)(recipe, machine)
    assert loads
    assert all(loads)
    assert inside == [False]


def test_no_function_asks_for_the_current_device() -> None:
    """Calls that mean the current device unless they are given one are given one."""
    root = Path(inspect.getfile(pipeline)).parent
    implicit = (
        "cuda.synchronize()",
        "max_memory_allocated()",
        "get_device_name()",
        "mem_get_info()",
    )
    implicit += ("current_stream()", "cuda.Stream()", '.to("cuda")', ".cuda()", "current_device()")
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [call for call in implicit if call in text], path


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("method", ["gptq", "cospadi"])
def test_the_second_gpu_does_all_the_work_and_gives_the_same_result(
    method: str, tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Both methods record CUDA graphs."""
    stages = {
        "gptq": [{"quantize": {"method": "gptq", "bits": 4, "group_size": 16}}],
        "cospadi": [{"decompose": {"method": "cospadi", "keep": 0.6, "rounds": 1}}],
    }
    weights = []
    for device in ("cuda:0", "cuda:1"):
        used = torch.cuda.memory_stats(0).get("allocation.all.allocated", 0)
        output = tmp_path / device[-1]
        recipe = tiny_recipe(tiny_model_folder, output, stages=stages[method])
        report = compress(load_recipe(recipe), Machine(device))
        weights.append((output / "checkpoint/model.safetensors").read_bytes())
        assert report["memory"]["peak_gpu_bytes"] > 0
        if device == "cuda:1":
            assert torch.cuda.memory_stats(0).get("allocation.all.allocated", 0) == used
    assert weights[0] == weights[1]
    assert torch.cuda.current_device() == 0


def test_a_stage_inside_another_counts_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [0.0]
    for name in ("monotonic", "process_time"):
        monkeypatch.setattr(machine.time, name, lambda: now[0])
    clock = machine.Clock(Journal(tmp_path), keep=False)
    with clock("allocate"):
        now[0] += 1
        for _ in range(2):
            with clock("convert"):
                now[0] += 10
                with clock("slice"):
                    now[0] += 100
        now[0] += 2
    assert clock.seconds == clock.cpu_seconds == {"slice": 200, "convert": 20, "allocate": 3}


@pytest.mark.parametrize("name", sorted(ALLOCATOR_SETTINGS))
def test_the_allocator_of_a_gpu_is_set_unless_the_user_does(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", settings)
    with Machine("cpu").current():
        assert settings == {}
    use_expandable_segments()
    assert settings == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    settings.clear()
    settings[name] = "backend:native"
    use_expandable_segments()
    assert settings == {name: "backend:native"}
