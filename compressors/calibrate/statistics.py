"""Collect statistics of targeted linear layers: of inputs forward, of output gradients backward."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self

import torch
from torch import Tensor

from lrc.compressors.calibrate import statistic_table as table
from lrc.compressors.calibrate.activation_cache import (
    ActivationCache,
    allocate_checkpoints,
    copy_states,
)
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_passes import (
    backward_head,
    backward_layer,
    forward_layer,
)
from lrc.compressors.calibrate.encoder_decoder_executor import executor_of
from lrc.compressors.calibrate.layer_executor import LayerExecutor
from lrc.compressors.calibrate.statistic_table import Required
from lrc.compressors.calibrate.symmetric_storage import (
    pack_symmetric,
    packed_numbers,
    unpack_symmetric,
)
from lrc.compressors.io.background_writes import BackgroundWrites
from lrc.compressors.io.device_copies import to_host
from lrc.compressors.io.journal import Journal
from lrc.compressors.solvers.linalg import tensor_cores
from lrc.compressors.solvers.moments import Statistics, needed_tokens

INPUTS, GRADIENTS = 0, 1  # indices of `statistics_files`
COLUMN = ".column"
"""Ending of the name of what `pack_symmetric` stores apart."""


def collect(context: CalibrationContext, required: Required) -> None:
    """Write the required statistics of the dense model's linears to the journal, layer by layer.

    `required` maps linears to the statistics to collect; layers without any are only passed
    through. Hidden states, inputs or gradients that are not finite raise a `ModelError` that names
    the layer.
    """
    collect_together(context, [(context.journal, required)])


def collect_together(
    context: CalibrationContext, wanted: Sequence[tuple[Journal, Required]]
) -> None:
    """Write what several runs require, each to a journal, in one pass.

    The files are those of separate calls of `collect`. Snapshots are in the journal of the context,
    which must be one for these requirements. Runs with ``capped_inputs`` need a pass of their own,
    and so do all runs of a model with experts, whose tokens are weighted as the run requires.
    """
    variants = [Variant.of(context, *each) for each in wanted]
    with tensor_cores(context.device):
        Collector(context, variants).run()


def load(
    journal: Journal, layer: int, name: str, device: str = "cpu", *, with_inputs: bool = True
) -> Statistics:
    """Return the statistics of one linear on a device; empty if none were collected.

    Those of an expert with fewer tokens than `needed_tokens` have the number of tokens only.
    Without `with_inputs`, the second moment of its inputs is left out, unless the number of tokens
    depends on whether there is one, as for experts and encoder-decoder models.
    """
    inputs, gradients = statistics_files(layer)
    facts = journal.read_facts(inputs) if journal.has(inputs) else {"leaders": {}}
    leader = facts["leaders"].get(name)
    if leader is None:
        return Statistics()
    n_routed, needed = facts["routed"].get(name, (None, 0))
    if n_routed is not None and n_routed < needed:
        return Statistics(n_routed)
    n_own = facts.get("received", {}).get(name, n_routed)

    def read(file: str, sums: Mapping[str, str]) -> dict[str, Tensor]:
        columns = {f"{stored}{COLUMN}": f"{key}{COLUMN}" for stored, key in sums.items()}
        found = journal.read_tensors(file, {**sums, **columns}, device)
        for key in [key for key in found if table.is_symmetric(key)]:
            column = found.pop(f"{key}{COLUMN}", found[key][:0])
            found[key] = unpack_symmetric(found[key], column)
        return found

    sums = table.sum_names(table.FORWARD, name, leader)
    if not with_inputs and n_own is None:
        sums = {stored: key for stored, key in sums.items() if key not in ("inputs", "image")}
    forward, backward = read(inputs, sums), dict[str, Tensor]()
    if journal.has(gradients):
        backward = read(gradients, table.sum_names(table.BACKWARD, name, leader))
    return table.build_statistics(facts["n_tokens"], forward, backward, n_own)


def routed_tokens(journal: Journal, layer: int) -> dict[str, tuple[int, int]]:
    """Return for each linear of an expert how many tokens it received, and how many it needs."""
    inputs, _ = statistics_files(layer)
    if not journal.has(inputs):
        return {}
    return {name: tuple(pair) for name, pair in journal.read_facts(inputs)["routed"].items()}


def expert_tokens(journal: Journal, layers: Iterable[int]) -> dict[str, tuple[int, int]]:
    """Return `routed_tokens` of several layers."""
    return {name: pair for layer in layers for name, pair in routed_tokens(journal, layer).items()}


def statistics_files(layer: int) -> tuple[str, str]:
    """Return the journal's names for the input and the gradient statistics of a decoder layer."""
    return (
        f"statistics/inputs-{layer:04d}.safetensors",
        f"statistics/gradients-{layer:04d}.safetensors",
    )


@dataclass(frozen=True)
class Variant:
    """What one run requires, and the journal that it is written to."""

    journal: Journal
    required: Sequence[Required]
    """By layer."""

    @classmethod
    def of(cls, context: CalibrationContext, journal: Journal, required: Required) -> Self:
        """Sort the required statistics of the linears in `context` by layer."""
        layer_of = {linear.name: linear.layer for linear in context.architecture.linears}
        by_layer: list[dict[str, Collection[str]]] = [{} for _ in context.architecture.layer_names]
        for name, names in required.items():
            if names:
                by_layer[layer_of[name]][name] = names
        return cls(journal, by_layer)

    def missing(self, layer: int, side: int) -> Required:
        """Return the statistics of a layer that one side of it still lacks."""
        done = self.journal.has(statistics_files(layer)[side])
        return {} if done else self.required[layer]


@dataclass(frozen=True)
class Collector:
    """One run over the calibration windows: forward, and backward if gradients are required."""

    context: CalibrationContext
    variants: Sequence[Variant]

    @cached_property
    def executor(self) -> LayerExecutor:
        """Applies the layers; traces the model at the first use."""
        return executor_of(self.context)

    def run(self) -> None:
        """Collect everything that is missing, and continue from a snapshot if there is one."""
        n_layers = len(self.context.architecture.layer_names)
        differentiated = [index for index in range(n_layers) if self.differentiates(index)]
        backward = any(self._missing(index, GRADIENTS) for index in differentiated)
        forward = any(self._missing(index, INPUTS) for index in range(n_layers))
        if not (forward or backward):
            return
        shape = self.executor.shape
        first = self.executor.numbers[0] if self.executor.numbers else 0
        states = ActivationCache(self.context, "states", shape, first)
        if not backward:
            # Only a run without backward pass can resume from saved hidden states; a backward pass
            # needs the input of every layer.
            if not states.resume():
                self.executor.embed_(states.tensor)
            self.forward(states, states.done, n_layers, [], save=True)
            return
        gradients = ActivationCache(self.context, "gradients", shape, first)
        resumed = gradients.resume()
        left = n_layers - gradients.done  # layers that the backward pass still has to process
        checkpoints = allocate_checkpoints(self.context, left, shape)
        self.executor.embed_(states.tensor)
        self.forward(states, 0, left, checkpoints)
        if not resumed:
            backward_head(self.executor, states.tensor, gradients.tensor)
        del states
        self.backward(gradients, left, differentiated[0], checkpoints, save=True)

    def forward(
        self,
        states: ActivationCache,
        start: int,
        stop: int,
        checkpoints: Sequence[Tensor],
        *,
        sums: bool = True,
        save: bool = False,
    ) -> None:
        """Replace the states at layer `start` by those at layer `stop`.

        Parameters
        ----------
        states : ActivationCache
        start, stop : int
        checkpoints : sequence of Tensor
            To be filled with the inputs of these layers; may be empty.
        sums : bool
            Whether to write the statistics of these layers that are missing.
        save : bool
            Whether to save the states from time to time.
        """
        with BackgroundWrites(self.context.device) as writes:
            for index in range(start, stop):
                if checkpoints:
                    copy_states(checkpoints[index - start], states.tensor)
                self._forward_layer(index, states, writes, sums=sums, save=save)

    def _forward_layer(
        self,
        index: int,
        states: ActivationCache,
        writes: BackgroundWrites,
        *,
        sums: bool,
        save: bool,
    ) -> None:
        n_layers = len(self.context.architecture.layer_names)
        required = [each.missing(index, INPUTS) if sums else {} for each in self.variants]
        found, n_tokens = forward_layer(self.executor, index, states.tensor, required)
        groups = self.executor.calls[index].groups
        for variant, names, totals in zip(self.variants, required, found, strict=True):
            if names and self.context.processes.last:
                leaders = {n: group[0] for group in groups for n in group if n in names}
                facts = {"leaders": leaders, "n_tokens": self.executor.n_tokens}
                facts["routed"] = self._routed(index, names, n_tokens)
                if self.context.architecture.kind.translates:
                    facts["received"] = {name: n_tokens[leaders[name]] for name in leaders}
                _write(writes, variant.journal, statistics_files(index)[INPUTS], totals, facts)
        states.finish_layer(save=save and index < n_layers - 1, before=writes.finish)
        self.context.on_step("calibrate", index + 1, n_layers)

    def backward(
        self,
        gradients: ActivationCache,
        start: int,
        stop: int,
        checkpoints: Sequence[Tensor],
        *,
        first: int = 0,
        sums: bool = True,
        save: bool = False,
    ) -> None:
        """Replace the gradients at the input of layer `start` by those at the earlier `stop`.

        Parameters
        ----------
        gradients : ActivationCache
        start, stop : int
        checkpoints : sequence of Tensor
            The inputs of layer `first` and those after it.
        sums, save : bool
            As of `forward`.
        """
        n_layers = len(self.context.architecture.layer_names)
        with BackgroundWrites(self.context.device) as writes:
            for index in range(start - 1, stop - 1, -1):
                required = [
                    each.missing(index, GRADIENTS) if sums else {} for each in self.variants
                ]
                found = backward_layer(
                    self.executor, index, checkpoints[index - first], gradients.tensor, required
                )
                for variant, names, totals in zip(self.variants, required, found, strict=True):
                    if names and self.context.processes.last:
                        file = statistics_files(index)[GRADIENTS]
                        _write(writes, variant.journal, file, totals, {})
                gradients.finish_layer(save=save and index > stop, before=writes.finish)
                self.context.on_step("gradients", n_layers - index, n_layers - stop)

    def _routed(
        self, layer: int, required: Required, n_tokens: Mapping[str, int]
    ) -> dict[str, list[int]]:
        """Return the number of tokens that each linear of an expert received, and that it needs."""
        linears = self.executor.linears(layer)
        return {
            name: [n_tokens[name], needed_tokens(linears[name].d_in)]
            for name in required
            if linears[name].expert is not None
        }

    def _missing(self, layer: int, side: int) -> bool:
        return any(each.missing(layer, side) for each in self.variants)

    def differentiates(self, layer: int) -> bool:
        """Return whether statistics of gradients are required of a layer."""
        required = (names for each in self.variants for names in each.required[layer].values())
        return any({*table.BACKWARD} & {*names} for names in required)


def _write(
    writes: BackgroundWrites,
    journal: Journal,
    file: str,
    sums: Mapping[str, Tensor],
    facts: dict[str, Any],
) -> None:
    symmetric = {key for key in sums if table.is_symmetric(key.rpartition(".")[2])}

    def prepare() -> Callable[[], None]:
        tensors = {}
        for key, total in sums.items():
            stored, column = pack_symmetric(total) if key in symmetric else (total, total[:0])
            tensors[key] = to_host(stored)
            if column.numel():
                tensors[f"{key}{COLUMN}"] = to_host(column)
        # A safetensors file needs at least one tensor.
        return partial(journal.write_tensors, file, tensors or {"none": torch.zeros(1)}, facts)

    n_bytes = sum(
        x.itemsize * (packed_numbers(len(x)) if key in symmetric else x.numel())
        for key, x in sums.items()
    )
    writes.add(n_bytes, prepare)
