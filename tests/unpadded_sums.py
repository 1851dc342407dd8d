"""Statistics of padded texts, and the same sums over the texts without padding, by autograd."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.calibrate.calibration_context import CalibrationContext, Labels
from lrc.compressors.calibrate.layer_check import build_checked
from lrc.compressors.io.journal import Journal
from lrc.compressors.models.source import locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.solvers.moments import Statistics
from lrc.configs.recipe import Model

EVERYTHING = frozenset(
    {"inputs", "gradients", "input_mean", "input_magnitude", "row_fisher", "whole_inputs"}
    | {"whole_gradients"}
)
Sums = dict[str, dict[str, Tensor]]
"""Name of a linear -> key -> sum over all tokens."""


def padded_context(
    folder: Path, output: Path, read: Callable[[Any], Any], labels: Labels
) -> CalibrationContext:
    """Return a context with the padded texts that `read` returns for a model."""
    architecture = build_checked(locate(Model(path=str(folder), dtype="float32")))
    journal = Journal(output)
    journal.work.mkdir(parents=True)
    found = read(architecture.model)
    return CalibrationContext(
        architecture,
        WeightReader(folder, architecture),
        lambda: found.tokens,
        journal,
        device="cpu",
        memory_limit_gib=1.0,
        seed=0,
        on_step=lambda *_: None,
        labels=labels,
        sentences=lambda: found,
    )


def one_by_one(model: Any, names: list[str], count: int, loss: Callable[[int], Tensor]) -> Sums:
    """Sum inputs, gradients and Fisher information of the losses of `count` unpadded examples."""
    sums: dict[str, dict[str, Any]] = {name: {} for name in names}

    def add(name: str, key: str, value: Tensor) -> None:
        sums[name][key] = sums[name].get(key, 0) + value.double()

    def see(name: str, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0].detach()[0]
        add(name, "inputs", x.T @ x)
        add(name, "input_mean", x.sum(0))
        add(name, "input_magnitude", x.abs().sum(0))
        add(name, "n_tokens", torch.tensor(len(x)))
        y.register_hook(lambda g: add(name, "gradients", g[0].T @ g[0]))

    weights = [model.get_submodule(name).weight for name in names]
    for row in range(count):
        hooks = [
            model.get_submodule(name).register_forward_hook(partial(see, name)) for name in names
        ]
        gradients = torch.autograd.grad(loss(row), weights)
        for hook in hooks:
            hook.remove()
        for name, gradient in zip(names, gradients, strict=True):
            add(name, "row_fisher", gradient.square().sum(dim=1))
    return sums


def assert_close(found: Tensor | None, expected: Tensor, key: str) -> None:
    assert found is not None, key
    scale = expected.abs().max()
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=1e-4, atol=2e-5)


def assert_same_sums(found: Statistics, expected: dict[str, Tensor], scale: float = 1.0) -> None:
    """Compare all sums of a linear; `scale` is that of the moment of its inputs."""
    assert found.inputs is not None
    assert found.gradients is not None
    assert_close(found.inputs.full, expected["inputs"] * scale, "inputs")
    assert_close(found.gradients.full, expected["gradients"], "gradients")
    for key in ("row_fisher", "input_mean", "input_magnitude"):
        assert_close(getattr(found, key), expected[key], key)
