"""`measure: latency` from the recipe to the report, with times that are made up."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lrc.compressors.io.machine import Machine
from lrc.compressors.latency import product_timing
from lrc.compressors.latency.latency_table import DENSE, LatencyTable, Product
from lrc.compressors.latency.product_timing import device_name
from lrc.compressors.latency.time_curve import TimeCurve
from lrc.compressors.layers import CompressedLinear
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.compressors.stages import measured_times
from lrc.configs.errors import OutputError, Stopped
from lrc.configs.load import load_recipe

STAGE = {
    "method": "mixed",
    "components": ["low_rank", "sparse"],
    "schemes": ["int8", "int4-g16"],
    "lm_head": "int8",
    "keep": 0.6,
    "measure": "latency",
}


def made_up(products: Iterable[Product], **given: Any) -> LatencyTable:
    """Return times in which sparse matrices are slow, and all others as fast as they are small."""
    speed = {"sparse": 5.0, "low_rank": 1.0, "dense": 0.3}
    found: dict[Any, dict[int, int]] = {}
    for product in products:
        (d_out, d_in), form = product.shape, product.form
        share = speed[form.split(" ")[0]] * (1 + product.size / min(d_out, d_in)) / 2
        time = 10 * d_out * d_in * (1 if form == DENSE else share)
        found.setdefault(product.key, {})[product.size] = round(time)
    return LatencyTable(
        device=device_name(given["device"]),
        dtype=str(given["dtype"]).removeprefix("torch."),
        rows=given["rows"],
        threads=torch.get_num_threads(),
        versions={},
        curves={
            key: TimeCurve(tuple(sorted(each)), tuple(each[size] for size in sorted(each)))
            for key, each in found.items()
        },
    )


@pytest.fixture
def recipe(tiny_model_folder: Path, tiny_recipe: Callable[..., Path], output: Path) -> Path:
    return tiny_recipe(tiny_model_folder, output, stages=[{"decompose": STAGE}])


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make up times instead of measuring them; return how many products each time."""
    counts: list[int] = []

    def fake(products: Iterable[Product], **given: Any) -> LatencyTable:
        listed = list(products)
        counts.append(len(listed))
        return made_up(listed, **given)

    monkeypatch.setattr(measured_times, "measure_table", fake)
    monkeypatch.setattr(product_timing, "measure_table", fake)
    return counts


def check_report(report: dict[str, Any]) -> None:
    times = report["latency"]
    assert times["ratio"] == times["seconds"] / times["dense_seconds"]
    assert 0.5 < times["ratio"] <= 0.6
    assert (times["dtype"], times["rows"]) == ("float32", 1)
    linears = [m for m in report["layers"] if m["name"] != "lm_head"]
    assert sum(form["weights"] for form in times["forms"]) == len(linears)
    assert not any("sparse" in form["form"] for form in times["forms"])
    assert times["slower_forms"]["sparse"] == len(linears)
    assert {form["form"] for form in times["forms"]} & {"dense int8", "dense int4-g16"}


def test_times_are_measured_once_and_a_stopped_run_continues(
    recipe: Path, output: Path, measurements: list[int]
) -> None:
    seen: list[str] = []

    def stop(stage: str, done: int, total: int) -> None:
        seen.append(stage)
        if stage == "calibrate":
            raise Stopped("requested")

    for _ in range(2):
        with pytest.raises(Stopped):
            compress(load_recipe(recipe), Machine(device="cpu", on_step=stop))
    report = compress(load_recipe(recipe), Machine(device="cpu"))
    assert len(measurements) == 1
    check_report(report)
    assert report["timing"]["seconds"]["latency"] >= 0
    written = json.loads((output / "checkpoint/lrc/plan.json").read_text())
    plan = Plan.from_json(written)
    assert plan.times is not None
    assert not plan.unmeasured
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoint", dtype=torch.float32)
    assert bool(torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all())


def test_integers_alone_are_not_saved_in_the_format_that_is_expanded(
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    output: Path,
    measurements: list[int],
) -> None:
    stage = {key: STAGE[key] for key in ("method", "schemes", "keep", "measure")}
    stages = [{"decompose": {**stage, "components": ["dense"]}}]
    compress(load_recipe(tiny_recipe(tiny_model_folder, output, stages=stages)), Machine("cpu"))
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoint", dtype=torch.float32)
    linears = [each for each in model.modules() if isinstance(each, CompressedLinear)]
    assert {each.config.types for each in linears} == {"dense"}
    assert all(fast.entry is not None for each in linears for fast in each.components)


def test_a_damaged_table_of_a_run_is_one_error(
    recipe: Path, output: Path, measurements: list[int]
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        raise Stopped("requested")

    with pytest.raises(Stopped):
        compress(load_recipe(recipe), Machine(device="cpu", on_step=stop))
    path = output / "work" / measured_times.TIMES
    path.write_text('{"version": 1}')
    with pytest.raises(OutputError, match="is not a latency table; delete it and run the same"):
        compress(load_recipe(recipe), Machine(device="cpu"))
    path.unlink()
    check_report(compress(load_recipe(recipe), Machine(device="cpu")))


def test_a_table_makes_plan_and_run_independent_of_the_machine(
    lrc, recipe: Path, output: Path, tmp_path: Path, measurements: list[int]
) -> None:
    table, override = tmp_path / "times.json", "stages.0.decompose.latency_table="
    ended = lrc("latency", recipe, "--output", table, "--device", "cpu", "-q")
    assert ended.code == 0, ended.err
    assert "relative to dense" in ended.out
    assert len(measurements) == 1
    values = json.loads(table.read_text())
    assert values["device"] == device_name("cpu")
    values["device"] = "another machine"  # which is fine
    table.write_text(json.dumps(values))

    planned = lrc("plan", recipe, f"{override}{table}")
    assert planned.code == 0, planned.err
    assert "another machine" in planned.out.replace("\n", " ")
    assert "never faster than dense" in planned.out
    found = json.loads(lrc("plan", recipe, f"{override}{table}", "--json").out)
    assert found["predicted_times"]["ratio"] == pytest.approx(0.6, abs=0.001)
    assert found["predicted_times"]["head_seconds"] < found["predicted_times"]["head_dense_seconds"]
    assert found["products_to_measure"] == 0

    ended = lrc("compress", recipe, f"{override}{table}", "--json", "-q")
    assert ended.code == 0, ended.err
    check_report(json.loads(ended.out))
    assert len(measurements) == 1
    values["entries"][0]["nanoseconds"] = [1]
    table.write_text(json.dumps(values))
    ended = lrc("compress", recipe, f"{override}{table}", "-q")
    assert ended.code == 1
    assert "holds a run that differs in latency_table" in ended.err.replace("\n", " ")


def test_a_plan_without_times_says_what_would_be_measured(
    lrc, recipe: Path, measurements: list[int]
) -> None:
    ended = lrc("plan", recipe)
    assert ended.code == 0, ended.err
    words = " ".join(ended.out.split())
    assert "first measures" in words
    assert "lrc latency" in words
    assert "allocator will choose" not in words
    assert json.loads(lrc("plan", recipe, "--json").out)["products_to_measure"] > 10
    assert measurements == []


def test_what_is_measured_suffices_for_the_plan(
    lrc, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only test that measures; how fast the products are decides about the plan."""
    monkeypatch.setattr(product_timing, "CACHES", {"cpu": 1})
    monkeypatch.setattr(product_timing, "SECONDS", 0.0)
    table = tmp_path / "times.json"
    small = ["stages.0.decompose.components=[low_rank]", "stages.0.decompose.schemes=[int8]"]
    ended = lrc("latency", recipe, *small, "-o", table, "--dtype", "bfloat16", "--json", "-q")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == json.loads(table.read_text())
    assert json.loads(ended.out)["dtype"] == "bfloat16"
    planned = lrc("plan", recipe, *small, f"stages.0.decompose.latency_table={table}")
    assert planned.code == 0 or "of the time, the cost of the cheapest" in planned.err


def test_bench_shows_the_predicted_speed(
    lrc, recipe: Path, output: Path, measurements: list[int]
) -> None:
    compress(load_recipe(recipe), Machine(device="cpu"))
    small = ("--prompt", 16, "--tokens", 4, "--repeats", 2)
    ended = lrc("bench", output / "checkpoint", *small, "--batch", 1, "--batch", 2, "--json", "-q")
    assert ended.code == 0, ended.err
    found = {
        (each["batch"], each["model"] == str(output / "checkpoint")): each["predicted_ratio"]
        for each in json.loads(ended.out)["results"]
    }
    assert found[1, True] > 1
    assert (found[1, False], found[2, True], found[2, False]) == (None, None, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--output: missing"),
        (("-o", "{recipe}"), "exists already"),
        (("-o", "t.json", "--dtype", "int8"), "--dtype: must be float32"),
        (("stages.0.decompose.measure=bits", "-o", "t.json"), "the recipe has none"),
    ],
)
def test_wrong_usage_is_one_error(
    lrc, recipe: Path, arguments: tuple[str, ...], words: str
) -> None:
    given = [each.format(recipe=recipe) for each in arguments]
    ended = lrc("latency", recipe, *given)
    assert ended.code == 2
    assert words in ended.err.replace("\n", " ")


def test_a_file_that_cannot_be_written_costs_no_measurement(
    lrc, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrc.compressors.latency.product_timing.measure_table", None)
    ended = lrc("latency", recipe, "-o", recipe / "below.json", "-q")
    ended.refuses(1, "cannot be written", where=str(recipe / "below.json"))
