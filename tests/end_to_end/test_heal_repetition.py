"""Runs of `heal` can be repeated: after interruptions, from a seed, or for a lost checkpoint."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.heal_stages import BLOCK, DISTILL, INT4, MIXED, STORED
from tests.shared_runs import Run, Stopper, changed

from lrc.compressors.heal import work
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.errors import Stopped
from lrc.configs.load import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

MOVING = {"train": "values", "support": "moving", "rate": 0.05}
CHAINS: dict[str, list[dict[str, Any]]] = {
    "fixed": [MIXED[0], {"heal": {**BLOCK, "parts": "separate"}}, {"heal": DISTILL}],
    "moving": [
        *STORED["sparse"],
        {"heal": {**BLOCK, "parts": "separate", **MOVING}},
        {"heal": {**DISTILL, **MOVING}},
    ],
    "preconditioned": [
        *STORED["pivoted_low_rank"],
        {"heal": {**BLOCK, "parts": "separate", "precondition": True}},
        {"heal": {**DISTILL, "precondition": True}},
    ],
}


@pytest.mark.parametrize(
    ("chain", "snapshots"), [("fixed", 0.0), ("preconditioned", 1e9), ("moving", 0.0)]
)
def test_an_interrupted_run_ends_with_the_same_bytes(
    run_stages: Run,
    tiny_model_folder: Path,
    tiny_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chain: str,
    snapshots: float,
) -> None:
    monkeypatch.setattr(work, "SNAPSHOT_SECONDS", snapshots)
    stages = CHAINS[chain]
    _, undisturbed = run_stages(*stages)
    recipe = load_recipe(tiny_recipe(tiny_model_folder, tmp_path / "run", stages=stages))
    for calls in (1, 1, 1, 7, 11, 5):  # in both layers of the first, and in the second
        with pytest.raises(Stopped):
            compress(recipe, Machine(on_step=Stopper(calls)))
    report = compress(recipe)
    assert changed(undisturbed, tmp_path / "run") == set()
    plans = [
        (output / "checkpoint/lrc/plan.json").read_text()
        for output in (undisturbed, tmp_path / "run")
    ]
    assert plans[0] == plans[1]
    assert [each["kept"] for each in report["training"]] == [True, True]
    left = {path.name for path in (tmp_path / "run/work").iterdir()}
    assert not any("heal" in name for name in left)


def test_preconditioning_changes_all_steps(run_stages: Run) -> None:
    """Both of the whole model and of a part, where the names of parameters have a prefix."""
    form, block, distill = CHAINS["preconditioned"]
    ours, _ = run_stages(form, block, distill)
    theirs, _ = run_stages(form, {"heal": {**BLOCK, "parts": "separate"}})
    pairs = [[each["training"][0]["layers"][0]["fits"][0] for each in (ours, theirs)]]
    pairs.append(
        [run_stages(form, each)[0]["training"][0] for each in (distill, {"heal": DISTILL})]
    )
    for fits in pairs:
        (start, *losses), (same_start, *others) = (fit["losses"] for fit in fits)
        assert start == same_start
        assert all(loss != other for loss, other in zip(losses, others, strict=True))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    run_stages: Run, tiny_model_folder: Path, tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    _, first = run_stages(INT4, {"heal": DISTILL})
    stages = [INT4, {"heal": DISTILL}]
    for seed, same in ((0, True), (1, False)):
        output = tmp_path / f"run-{seed}"
        compress(load_recipe(tiny_recipe(tiny_model_folder, output, stages=stages, seed=seed)))
        assert (changed(first, output) == set()) == same


def test_a_checkpoint_that_is_deleted_is_made_again(run_stages: Run, tmp_path: Path) -> None:
    _, first = run_stages(INT4, {"heal": DISTILL})
    output = tmp_path / "run"
    shutil.copytree(first, output)
    shutil.rmtree(output / "checkpoint")
    (output / "report.json").unlink()
    recipe = first.with_name("run.yaml").read_text().replace(str(first), str(output))
    (tmp_path / "run.yaml").write_text(recipe)
    compress(load_recipe(tmp_path / "run.yaml"))
    assert changed(first, output) == set()
