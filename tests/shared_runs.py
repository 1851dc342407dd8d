"""What tests of runs with several stages have in common."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lrc.configs.errors import Stopped

Run = Callable[..., tuple[dict[str, Any], Path]]
"""Runs stages on the tiny model and returns the report and the output folder."""


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


def changed(before: Path, after: Path) -> set[str]:
    """Return the names of tensors that differ between two checkpoints of the same form."""
    ours, theirs = tensors_of(before), tensors_of(after)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in ours)
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}
