"""What tests of runs with several stages have in common."""

import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.errors import Stopped
from lrc.configs.load import load_recipe

Run = Callable[..., tuple[dict[str, Any], Path]]
"""Runs stages on the tiny model and returns the report and the output folder."""

DISK = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
}
"""Device map of the tiny model, with one layer on disk."""


def made_once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any], *, worker: str
) -> Any:
    """Return what `make` returns for a new folder, for which it is called in one process only.

    Processes of pytest-xdist, whose `worker` is not ``master``, share the result by pickling it.
    Nobody may change what is in the folder.
    """
    base = factory.getbasetemp()
    shared = (base if worker == "master" else base.parent) / "made-once"
    shared.mkdir(exist_ok=True)
    folder, result = shared / name, shared / f"{name}.pickle"
    with FileLock(shared / f"{name}.lock"):
        if not result.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process in which `make` has failed
            folder.mkdir()
            made = pickle.dumps(make(folder))
            result.write_bytes(made)
        return pickle.loads(result.read_bytes())


class Stopper:
    """Stops a run after a number of calls with the stage ``heal``."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.calls -= stage == "heal"
        if self.calls == 0 and stage == "heal":
            raise Stopped("stopped by a test")


def tensors_of(output: Path) -> dict[str, Tensor]:
    """Return the tensors of the checkpoint in an output folder."""
    return load_file(output / "checkpoint/model.safetensors")


def dense_with(folder: Path, weights: Mapping[str, Tensor]) -> Any:
    """Return a model in float32, rounded to bfloat16, in which some layers have other weights."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(parameter.bfloat16())
        for name, weight in weights.items():
            dense.get_submodule(name).weight.copy_(weight)
    return dense


def checkpoints_of(
    base: Path, tiny_recipe: Callable[..., Path], stages: Mapping[str, list[dict[str, Any]]]
) -> Callable[[str], Path]:
    """Return a function that compresses ``base/source`` by named stages, once, in float32.

    It returns the folder of the checkpoint.
    """

    def checkpoint(name: str) -> Path:
        output = base / name.replace(", ", "-").replace(" ", "-")
        if not output.exists():
            path = tiny_recipe(base / "source", output, stages=stages[name])
            compress(load_recipe(path, ["model.dtype=float32"]), Machine("cpu"))
        return output / "checkpoint"

    return checkpoint


def changed(before: Path, after: Path) -> set[str]:
    """Return the names of tensors that differ between two checkpoints of the same form."""
    ours, theirs = tensors_of(before), tensors_of(after)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}
