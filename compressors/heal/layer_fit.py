"""Fit one compressed decoder layer to the outputs of the dense one."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.calibrate.layer_executor import ForwardEnded
from lrc.compressors.heal.budget import Budget
from lrc.compressors.heal.descent import Descent
from lrc.compressors.heal.parameters import TrainedParameters
from lrc.compressors.heal.repeatable import RepeatableGradients
from lrc.compressors.heal.schedule import batch_rows
from lrc.compressors.layers import CompressedLinear
from lrc.compressors.solvers.moments import token_weights
from lrc.configs.heal import Block

Apply = Callable[[Tensor, nn.Module], Tensor]
"""Maps hidden states [n, length, d_model] through a layer."""


@dataclass(frozen=True)
class LayerData:
    """Hidden states [n_windows, length, d_model] of all windows; the held-out ones come first."""

    dense: Tensor
    """Inputs of the layer in the dense model."""
    compressed: Tensor
    """Inputs in the compressed one."""
    targets: Tensor
    """Outputs of the dense layer in the dense model."""
    n_held_out: int
    together: int
    """Windows that are computed at the same time; divides all numbers of windows."""


@dataclass(frozen=True)
class Part:
    """What is trained at a time."""

    child: str | None
    """Name of the child whose output is fitted; None for the output of the layer."""
    parameters: tuple[str, ...]
    """Names within the layer."""


def find_parts(
    apply: Apply, hidden: Tensor, layer: nn.Module, trainable: Sequence[str], *, separate: bool
) -> list[Part]:
    """Divide the parameters of a layer between its blocks, in the order of their execution.

    Blocks are the children with compressed layers, such as attention and MLP. A norm belongs to the
    block that is called after it. The last part is fitted to the output of the layer.
    """
    children = dict(layer.named_children())
    order = _order(apply, hidden, layer) if separate else []
    blocks = [name for name in order if _is_compressed(children[name])]
    # Linear layers that follow each other, as the MLP of OPT does, are one block.
    blocks = [
        name
        for name, following in zip_longest(blocks, blocks[1:])
        if following is None
        or not isinstance(children[name], CompressedLinear)
        or not isinstance(children[following], CompressedLinear)
    ]
    if len(blocks) < 2:
        return [Part(None, tuple(trainable))]
    found: dict[str, list[str]] = {name: [] for name in blocks}
    for name in trainable:
        child = name.partition(".")[0]
        place = order.index(child) if child in order else len(order)
        after = [block for block in blocks if order.index(block) >= place]
        found[after[0] if after else blocks[-1]].append(name)
    parts = [Part(name, tuple(names)) for name, names in found.items()]
    parts[-1] = Part(None, parts[-1].parameters)
    return [part for part in parts if part.parameters]


def _is_compressed(module: nn.Module) -> bool:
    return any(isinstance(each, CompressedLinear) for each in module.modules())


@torch.no_grad()
def _order(apply: Apply, hidden: Tensor, layer: nn.Module) -> list[str]:
    """Return the children of a layer in the order in which they are called first."""
    called: dict[str, None] = {}
    hooks = [
        child.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name, child in layer.named_children()
    ]
    try:
        apply(hidden, layer)
    finally:
        for hook in hooks:
            hook.remove()
    return [*called]


def output(apply: Apply, hidden: Tensor, layer: nn.Module, child: str | None) -> Tensor:
    """Return the output of a layer, or of one of its children inside it."""
    if child is None:
        return apply(hidden, layer)
    seen: list[Tensor] = []

    def see(_: nn.Module, __: object, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)
        raise ForwardEnded

    with layer.get_submodule(child).register_forward_hook(see), suppress(ForwardEnded):
        apply(hidden, layer)
    return seen[0]


def squares(found: Tensor, target: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the squared error and the squared target, summed over tokens.

    Tokens with massive activations count no more than `token_weights` lets them.
    """
    found, target = found.reshape(-1, found.shape[-1]), target.reshape(-1, target.shape[-1])
    weights = token_weights(target, length)
    error = (weights * (found - target).square()).sum()
    return error, (weights * target.square()).sum()


class LayerFit:
    """The fit of one part of a layer.

    Parameters
    ----------
    apply : Apply
    dense, compressed : nn.Module
        The layer as it was and as it is, in float32.
    part : Part
    data : LayerData
    """

    def __init__(
        self, apply: Apply, dense: nn.Module, compressed: nn.Module, part: Part, data: LayerData
    ) -> None:
        self._apply, self._data, self._part = apply, data, part
        self._dense, self._compressed = dense, compressed

    def run(
        self, trained: TrainedParameters, options: Block, *, budget: Budget, seed: int
    ) -> Descent:
        """Train, and leave the best values in the layer."""
        descent = Descent(trained, budget=budget, rate=options.rate)
        first = self.held_out_error(trained)
        descent.judge(first)
        n_windows = len(self._data.dense) - self._data.n_held_out
        from_dense = round(options.mix * options.batch)
        parameters = [*trained.parameters.values()]
        repeatable = RepeatableGradients(parameters, parameters[0].device)
        while descent.done < descent.steps and first > 0:
            rows = batch_rows(descent.done, n_windows=n_windows, batch=options.batch, seed=seed)
            rows = rows + self._data.n_held_out
            mixed = torch.arange(options.batch) < from_dense
            together = self._data.together
            for part, dense in zip(rows.split(together), mixed.split(together), strict=True):
                # The size of the first error makes gradients independent of the layer's scale.
                size = first * len(rows) / len(part)
                repeatable(partial(self._add_gradients, trained, part, dense, size))
            descent.update_()
            if descent.is_judged:
                descent.judge(self.held_out_error(trained))
        trained.set_(descent.best)
        for parameter in trained.parameters.values():
            parameter.requires_grad_(False)
        return descent

    @torch.no_grad()
    def held_out_error(self, trained: TrainedParameters) -> float:
        """Return the relative error on held-out windows, with values as they would be stored."""
        error = whole = 0.0
        with trained.as_stored():
            for rows in torch.arange(self._data.n_held_out).split(self._data.together):
                found, target = self._outputs(rows, self._data.compressed[rows])
                parts = squares(found, target, self._data.dense.shape[1])
                error, whole = error + float(parts[0]), whole + float(parts[1])
        return error / whole if whole else 0.0

    def _add_gradients(
        self, trained: TrainedParameters, rows: Tensor, from_dense: Tensor, size: float
    ) -> None:
        trained.clear_copies_()
        (self._error(rows, from_dense) / size).backward()
        trained.collect_gradients_()

    def _error(self, rows: Tensor, from_dense: Tensor) -> Tensor:
        """Return the relative error on windows, of which some have inputs of the dense model."""
        inputs = self._data.compressed[rows]
        # One of the two may be on the GPU, and the other not, if it had no room for both.
        inputs[from_dense] = self._data.dense[rows[from_dense]].to(inputs.device)
        found, target = self._outputs(rows, inputs)
        error, whole = squares(found, target, self._data.dense.shape[1])
        return error / whole.clamp_min(torch.finfo(whole.dtype).tiny)

    def _outputs(self, rows: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        child = self._part.child
        if child is None:
            target = self._data.targets[rows]
        else:
            with torch.no_grad():
                target = output(self._apply, self._data.dense[rows], self._dense, child)
        found = output(self._apply, inputs, self._compressed, child)
        return found, target.to(found.device)
