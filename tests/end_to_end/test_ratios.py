"""Dictionaries of several ratios of atoms and coefficients, and the seed of random ones."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import Machine
from lrc.compressors.layers import COMPONENTS
from lrc.compressors.pipeline import compress
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.rate_distortion import energies_file
from lrc.compressors.solvers.dictionary_learning import SOLVERS
from lrc.compressors.solvers.sparse_coding import SparseCode, SparseCodingTask
from lrc.configs.errors import Stopped
from lrc.configs.load import load_recipe

RATIOS = [3, 1.5]
STAGE = {"method": "dictionary", "keep": 0.6, "rounds": 3, "ratio": RATIOS}


@pytest.fixture
def prepared(
    tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> Callable[..., Path]:
    def write(stage: dict[str, Any], name: str = "run") -> Path:
        stages = [{"decompose": stage}]
        return tiny_recipe(tiny_model_folder, tmp_path / name, stages=stages)

    return write


def test_every_ratio_has_a_curve_and_the_allocation_takes_points_of_them(
    prepared: Callable[..., Path], executed: Callable[[Path], Plan], tmp_path: Path
) -> None:
    recipe = load_recipe(prepared(STAGE))

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "compress":
            raise Stopped("requested")

    with pytest.raises(Stopped):
        compress(recipe, Machine(device="cpu", on_step=stop))
    curves = Journal(tmp_path / "run").read_facts(energies_file(0))["curves"]
    compress(recipe, Machine(device="cpu"))
    plan = executed(tmp_path / "run")
    tasks = {task.name: task for task in plan.tasks}
    assert plan.modules()
    assert plan.kept <= 0.6
    for config in plan.modules().values():
        assert ratio_of(config.shape, config.sizes) in RATIOS
    for name, curve in curves.items():
        shape, points = tasks[name].shape, curve["points"]
        runs = {ratio: [p for p in points if fits(shape, p["sizes"], ratio)] for ratio in RATIOS}
        for ratio, run in runs.items():
            steps = [p["sizes"]["nonzeros"] for p in run]
            assert len(set(steps)) > 2, (name, ratio)
            # Largest first; what a ratio shares with another, at a complete basis, comes twice.
            energies = dict(zip(steps, (p["squared_error"] for p in run), strict=True))
            assert all(low <= high for (_, low), (_, high) in pairwise(
                sorted(energies.items(), reverse=True)
            ))  # fmt: skip
        assert sum(len(run) for run in runs.values()) >= len(points)


def fits(shape: tuple[int, int], sizes: dict[str, int], ratio: float) -> bool:
    return dict(COMPONENTS["dictionary"].sizes_at(sizes["nonzeros"], *shape, ratio=ratio)) == sizes


def ratio_of(shape: tuple[int, int], sizes: Any) -> float | None:
    return next((ratio for ratio in RATIOS if fits(shape, dict(sizes), ratio)), None)


def test_several_ratios_given_back_as_a_plan_give_the_same_weights(
    prepared: Callable[..., Path], tmp_path: Path
) -> None:
    compress(load_recipe(prepared(STAGE)), Machine(device="cpu"))
    again = {**STAGE, "allocation": "uniform", "plan": str(tmp_path / "run/plan.json")}
    compress(load_recipe(prepared(again, "again")), Machine(device="cpu"))
    first, second = (
        (tmp_path / run / "checkpoint/model.safetensors").read_bytes() for run in ("run", "again")
    )
    assert first == second


@pytest.mark.parametrize("allocation", ["uniform", "lagrangian"])
def test_random_choices_use_the_seed_of_the_recipe(
    allocation: str, prepared: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    solver, seeds = SOLVERS["cospadi"], []

    def spy(task: SparseCodingTask) -> SparseCode:
        seeds.append(task.seed)
        return solver.solve(task)

    monkeypatch.setitem(SOLVERS, "cospadi", replace(solver, solve=spy))
    stage = {"method": "cospadi", "keep": 0.6, "rounds": 1, "allocation": allocation}
    compress(load_recipe(prepared(stage), ["seed=5"]), Machine(device="cpu"))
    assert set(seeds) == {5}
