"""Statistics of every targeted linear: up through the model for inputs, down for gradients."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from lrc.compressors.calibrate.gradients import GRADIENT_NEEDS, descend_layer, start_at_logits
from lrc.compressors.calibrate.inputs import InputSums, Needs, apply_layer
from lrc.compressors.calibrate.labels import Labels
from lrc.compressors.calibrate.layer_stream import LayerCall, LayerStream
from lrc.compressors.calibrate.states import Chain, Tape
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.memory import to_host
from lrc.compressors.io.progress import OnStep
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.solvers.linalg import tensor_cores
from lrc.compressors.solvers.moments import Moment, Statistics

# Enough tokens a batch to keep matrix products efficient, few enough to keep attention small.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}


def collect(
    architecture: Architecture,
    reader: WeightReader,
    tokens: Tensor,
    needs: Needs,
    journal: Journal,
    *,
    labels: Labels,
    seed: int,
    device: str,
    memory_limit_gib: float,
    on_step: OnStep,
) -> None:
    """Write what the targeted linears' methods need to know to the journal, layer by layer.

    Inputs and gradients are those of the dense model.

    Parameters
    ----------
    tokens : Tensor, shape [n_windows, length]
        Calibration windows, int64.
    needs : mapping of str to collection of str
        Linear -> what to collect; layers without any are only passed through.
    labels, seed
        As for `start_at_logits`.
    on_step : callable
        Told (stage, layers done, layers) after each layer; what it raises stops the work there.

    Raises
    ------
    ModelError
        If hidden states, inputs or gradients are not finite; names the layer.
    """
    work = _Collection(
        architecture, reader, tokens, needs, journal, device, memory_limit_gib, on_step
    )
    with tensor_cores() if device.startswith("cuda") else nullcontext():
        work.run(labels, seed)


def load(journal: Journal, layer: int, name: str) -> Statistics:
    """Return what calibration knows of one linear; empty if it saw no token."""
    up, down = inputs_file(layer), gradients_file(layer)
    if not journal.has(up):
        return Statistics()
    facts = journal.read_facts(up)
    if name not in facts["leaders"]:
        return Statistics()
    known = journal.read_tensors(up, _keys(name, facts["leaders"][name]))
    learnt = journal.read_tensors(down, _keys(name, name)) if journal.has(down) else {}
    return Statistics(
        facts["n_tokens"],
        inputs=_moment(known, "inputs"),
        gradients=_moment(learnt, "gradients"),
        input_mean=known.get("input_mean"),
        input_magnitude=known.get("input_magnitude"),
        row_fisher=learnt.get("row_fisher"),
    )


def inputs_file(layer: int) -> str:
    """Return the journal's name for the input statistics of one decoder layer."""
    return f"statistics/inputs-{layer:04d}.safetensors"


def gradients_file(layer: int) -> str:
    """Return the journal's name for the gradient statistics of one decoder layer."""
    return f"statistics/gradients-{layer:04d}.safetensors"


class _Collection:
    """One run over the calibration windows: up, and down if a method asks for gradients."""

    def __init__(
        self,
        architecture: Architecture,
        reader: WeightReader,
        tokens: Tensor,
        needs: Needs,
        journal: Journal,
        device: str,
        limit_gib: float,
        on_step: OnStep,
    ) -> None:
        self.architecture, self.tokens, self.journal = architecture, tokens, journal
        self.device, self.limit_gib, self.on_step = device, limit_gib, on_step
        self.n_layers = len(architecture.layer_names)
        layer_of = {linear.name: linear.layer for linear in architecture.linears}
        self.needs: list[Needs] = [
            {name: asked for name, asked in needs.items() if layer_of[name] == index}
            for index in range(self.n_layers)
        ]
        self.batch = batch_size(len(tokens), tokens.shape[1], device)
        self.stream = LayerStream(architecture, reader, device=device, dtype=torch.float32)
        self.dtype = next(iter(architecture.stored_parameters().values())).dtype

    def run(self, labels: Labels, seed: int) -> None:
        asked = [i for i, needs in enumerate(self.needs) if _of_gradients(needs)]
        descends = not all(self._known(gradients_file, index) for index in asked)
        ascends = not all(self._known(inputs_file, index) for index in range(self.n_layers))
        if not (ascends or descends):
            return
        with self.stream.around_layers():
            calls = self.stream.trace(self.tokens[: self.batch])
            width = self.stream.embed(self.tokens[:1]).shape[-1]
        shape = (*self.tokens.shape, width)
        states = Chain(self.journal, "states", shape, self.limit_gib, self.device)
        if not descends:
            self._ascend(states, calls, None)
            return
        gradients = Chain(self.journal, "gradients", shape, self.limit_gib, self.device)
        resumed = gradients.resume()
        left = self.n_layers - gradients.done  # layers still to descend
        tape = Tape(self.journal, left, shape, self.dtype, self.limit_gib, self.device)
        self._ascend(states, calls[:left], tape)
        if not resumed:
            start_at_logits(
                self.stream,
                calls[-1],
                states.tensor,
                self.tokens,
                gradients.tensor,
                labels=labels,
                seed=seed,
            )
        del states
        self._descend(gradients, calls, tape, stop=asked[0])

    def _ascend(self, states: Chain, calls: list[LayerCall], tape: Tape | None) -> None:
        # The tape needs every layer's input: with one, a snapshot from half-way is of no use.
        if tape is not None or not states.resume():
            with self.stream.around_layers():
                for start in range(0, len(self.tokens), self.batch):
                    rows = slice(start, start + self.batch)
                    states.tensor[rows] = self.stream.embed(self.tokens[rows])
        for index in range(states.done, len(calls)):
            if tape is not None:
                tape.write(index, states.tensor)
            known = self._known(inputs_file, index)
            sums = apply_layer(
                self.stream,
                self.architecture,
                index,
                calls[index],
                states.tensor,
                self.batch,
                {} if known else self.needs[index],
            )
            if not known:
                self._write_inputs(index, sums)
            states.finish_layer(save=tape is None and index < self.n_layers - 1)
            self.on_step("calibrate", index + 1, self.n_layers)

    def _descend(self, gradients: Chain, calls: list[LayerCall], tape: Tape, stop: int) -> None:
        total = self.n_layers - stop
        for index in range(self.n_layers - 1 - gradients.done, stop - 1, -1):
            known = self._known(gradients_file, index)
            sums = descend_layer(
                self.stream,
                self.architecture,
                index,
                calls[index],
                tape,
                gradients,
                self.batch,
                {} if known else self.needs[index],
            )
            if not known:
                self._write(gradients_file(index), sums, {})
            gradients.finish_layer(save=index > stop)
            self.on_step("gradients", gradients.done, total)

    def _known(self, file: Callable[[int], str], index: int) -> bool:
        """Say whether a layer has nothing left to be asked."""
        return not self.needs[index] or self.journal.has(file(index))

    def _write_inputs(self, index: int, sums: InputSums) -> None:
        facts = {"leaders": sums.leaders, "n_tokens": self.tokens.numel()}
        self._write(inputs_file(index), sums.sums, facts)

    def _write(self, file: str, sums: Mapping[str, Tensor], facts: dict[str, object]) -> None:
        tensors = {key: to_host(total) for key, total in sums.items()}
        # A safetensors file wants at least one tensor.
        self.journal.write_tensors(file, tensors or {"none": torch.zeros(1)}, facts)


def _of_gradients(needs: Needs) -> bool:
    return any(GRADIENT_NEEDS & set(asked) for asked in needs.values())


def _keys(name: str, leader: str) -> dict[str, str]:
    """Map the tensors of a statistics file to what they are for one linear."""
    own = {f"{name}.{what}": what for what in ("image", "gradients", "row_fisher")}
    shared = ("inputs", "diagonal", "input_mean", "input_magnitude")
    return own | {f"{leader}.{what}": what for what in shared}


def _moment(known: Mapping[str, Tensor], full: str) -> Moment | None:
    if "diagonal" not in known or not {full, "image"} & set(known):
        return None
    return Moment(known["diagonal"], full=known.get(full), image=known.get("image"))


def batch_size(n_windows: int, length: int, device: str) -> int:
    """Choose the largest divisor of the number of windows that stays within the token budget.

    A divisor, because the masks recorded in the trace have the batch's shape.
    """
    limit = max(1, BATCH_TOKENS["cuda" if device.startswith("cuda") else "cpu"] // length)
    return max(b for b in range(1, min(limit, n_windows) + 1) if n_windows % b == 0)
