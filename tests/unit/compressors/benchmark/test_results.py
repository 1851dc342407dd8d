"""The numbers of a report follow from the seconds that were measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lrc.compressors.benchmark.fast_paths import SlowForm
from lrc.compressors.benchmark.grid import Mode, Point, Settings
from lrc.compressors.benchmark.loading import Loading
from lrc.compressors.benchmark.measure import IN_TURN, Measured, Samples
from lrc.compressors.benchmark.measured_models import Target
from lrc.compressors.benchmark.results import SCHEMA, Slower, failures, results_json, slower_models

SETTINGS = Settings((Mode.EAGER,), (2,), (100,), tokens=10, repeats=3)
POINT = Point(Mode.EAGER, 2, 100, 10)


def target(name: str) -> Target:
    return Target(name, Path(name), 512, None, 1000, None)  # type: ignore[arg-type]


def report(slots: list[Samples], *, dense: bool = True, together: bool = True) -> dict[str, Any]:
    """Return the report of models of which the first is measured again at the end."""
    count = len(slots) - dense
    measured = Measured(
        order=[*range(count), *[0] * dense],
        points=[POINT],
        loading={slot: Loading(0.5, 4000, 5000, 6000) for slot in range(count)},
        samples={(slot, POINT): each for slot, each in enumerate(slots)},
        together=together,
        slow={count - 1: [SlowForm("dense int4", "needs Triton", ("q", "k"))]},
    )
    targets = [target(name) for name in ("dense", "a", "b")[:count]]
    return results_json(
        measured,
        targets,
        SETTINGS,
        device="cpu",
        dtype=torch.bfloat16,
        dense=dense,
        notes=["first"],
    )


DENSE = Samples([1.0, 2.0, 1.0], [0.1, 0.2, 0.1], peak_bytes=7000)
AGAIN = Samples([1.0, 2.0, 1.02], [0.1, 0.2, 0.1], peak_bytes=7000)
HALF = Samples([2.0, 4.0, 2.02], [0.05, 0.1, 0.05], peak_bytes=3000)


def test_speeds_count_the_tokens_of_the_whole_batch() -> None:
    first, model, again = report([DENSE, HALF, AGAIN])["results"]
    assert (first["prefill"]["median"], first["decode"]["median"]) == (200, 200)
    assert (first["prefill"]["ratio"], first["prefill"]["verdict"]) == (None, None)
    assert model["prefill"]["ratio"] == pytest.approx(0.5)
    assert model["decode"]["ratio"] == pytest.approx(2)
    assert [model[phase]["verdict"] for phase in ("prefill", "decode")] == ["slower", "faster"]
    assert (again["model"], again["repeated"], again["prefill"]["verdict"]) == ("dense", True, None)
    assert again["prefill"]["ratio"] == pytest.approx(1)
    assert [each["rounds"] for each in (first, model, again)] == [3, 3, 3]


def test_noise_is_the_difference_of_the_two_dense_results() -> None:
    again = Samples([1.25, 2.5, 1.25], [0.1, 0.2, 0.1])
    found = report([DENSE, Samples([1.2, 2.4, 1.2], [0.2, 0.4, 0.2]), again])
    assert found["noise"][0]["prefill"] == pytest.approx(0.2)
    assert found["noise"][0]["decode"] == 0
    model = found["results"][1]
    assert [model[phase]["verdict"] for phase in ("prefill", "decode")] == ["equal", "slower"]
    place = "decode (eager, batch 2, prompt 100) 0.50x"
    assert slower_models(found) == [Slower("a", (place,), compared=2)]


def test_a_failure_is_reported_with_its_reason_and_the_others_survive() -> None:
    broken = Samples([1.0], [0.1], peak_bytes=1, failed="RuntimeError: no kernel")
    found = report([DENSE, broken, HALF, AGAIN])
    failed, model = found["results"][1:3]
    assert (failed["prefill"], failed["decode"]) == (None, None)
    assert failed["failed"] == "RuntimeError: no kernel"
    assert model["decode"]["ratio"] == pytest.approx(2)
    assert failures(found) == [
        "a: not measured (eager, batch 2, prompt 100): RuntimeError: no kernel"
    ]


def test_without_a_dense_result_there_are_no_ratios() -> None:
    broken = Samples(failed="out of memory")
    for found in (report([broken, HALF, broken]), report([DENSE, HALF], dense=False)):
        ratios = [each[p]["ratio"] for each in found["results"] for p in ("prefill", "decode")
                  if each[p]]  # fmt: skip
        assert set(ratios) == {None}
        assert slower_models(found) == []
    assert report([DENSE, HALF], dense=False)["against"] is None


def test_models_that_were_loaded_in_turn_are_noted() -> None:
    found = report([DENSE, HALF, AGAIN], together=False)
    assert found["notes"] == ["first", IN_TURN]
    assert found["settings"]["together"] is False


def test_weights_without_a_fast_path_are_listed_per_model() -> None:
    dense, model = report([DENSE, HALF, AGAIN])["models"]
    assert dense["slow_forms"] == []
    found = {"form": "dense int4", "layers": 2, "example": "q", "reason": "needs Triton"}
    assert model["slow_forms"] == [found]


def paths(value: Any, prefix: str = "") -> set[str]:
    if isinstance(value, list):
        return {found for each in value for found in paths(each, f"{prefix}[]")}
    if isinstance(value, dict) and prefix not in ("environment",):
        return {
            found
            for key, each in value.items()
            for found in paths(each, f"{prefix}.{key}" if prefix else key)
        }
    return {prefix}


def test_every_key_is_documented() -> None:
    documented = set()
    for key in SCHEMA:
        stem, _, names = key.partition("{")
        documented |= {stem + name for name in names.rstrip("}").split(",")} if names else {key}
    found = report([DENSE, HALF, AGAIN])
    json.dumps(found, allow_nan=False)
    shown = {path.removesuffix("[]") for path in paths(found)}
    for phase in ("prefill", "decode"):
        shown = {path.replace(f"results[].{phase}.", "results[].PHASE.") for path in shown}
    parents = {"results[].prefill", "results[].decode"}
    assert shown | parents == documented
