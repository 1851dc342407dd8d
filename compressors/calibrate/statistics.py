"""Input second moments of every targeted linear, one decoder layer at a time."""

from collections.abc import Collection

import torch
from torch import Tensor

from lrc.compressors.calibrate.states import HiddenStates
from lrc.compressors.calibrate.stream import LayerCall, LayerStream, apply, watch_inputs
from lrc.compressors.decompose import Moment, Statistics
from lrc.compressors.journal import Journal
from lrc.compressors.linalg import add_second_moment_
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.progress import OnStep
from lrc.configs.errors import ModelError

# Enough tokens a batch to keep matrix products efficient, few enough to keep attention small.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


def collect(
    architecture: Architecture,
    reader: WeightReader,
    tokens: Tensor,
    targets: Collection[str],
    journal: Journal,
    *,
    device: str,
    memory_limit_gib: float,
    on_step: OnStep,
) -> None:
    """Write the input second moments of the targeted linears to the journal, layer by layer.

    Inputs are those of the dense model. Linears that are given the same tensor (query, key and
    value; gate and up) share one matrix.

    Parameters
    ----------
    tokens : Tensor, shape [n_windows, length]
        Calibration windows, int64.
    targets : collection of str
        Names of the linears to watch; layers without any are only passed through.
    on_step : callable
        Told (stage, layers done, layers) after each layer; what it raises stops the work there.

    Raises
    ------
    ModelError
        If hidden states or inputs are not finite; names the layer.
    """
    n_layers = len(architecture.layer_names)
    if all(journal.has(statistics_file(index)) for index in range(n_layers)):
        return
    batch = _batch_size(len(tokens), tokens.shape[1], device)
    stream = LayerStream(architecture, reader, device=device, dtype=torch.float32)
    with stream.around_layers():
        calls = stream.trace(tokens[:batch])
        first = stream.embed(tokens[:batch])
        shape = (len(tokens), tokens.shape[1], first.shape[-1])
        states = HiddenStates(journal, shape, memory_limit_gib, device)
        if not states.resume():
            for start in range(0, len(tokens), batch):
                states.tensor[start : start + batch] = stream.embed(tokens[start : start + batch])
    for index in range(states.next_layer, n_layers):
        wanted = {name for name in targets if name in _members(calls[index])}
        known = journal.has(statistics_file(index))
        moments = _apply_layer(
            stream,
            architecture,
            index,
            calls[index],
            states.tensor,
            batch,
            set() if known else wanted,
        )
        if not known:
            _write(journal, index, calls[index], moments, n_tokens=tokens.numel())
        states.finish_layer(index, last=index == n_layers - 1)
        on_step("calibrate", index + 1, n_layers)


def load(journal: Journal, layer: int, name: str) -> Statistics:
    """Return what calibration knows of one linear; empty if it saw no token."""
    file = statistics_file(layer)
    facts = journal.read_facts(file)
    leader = facts["leaders"].get(name)
    if leader is None:
        return Statistics()
    return Statistics(facts["n_tokens"], Moment.of(journal.read_tensor(file, leader)))


def statistics_file(layer: int) -> str:
    """Return the journal's name for the statistics of one decoder layer."""
    return f"statistics/layer-{layer:04d}.safetensors"


@torch.no_grad()
def _apply_layer(
    stream: LayerStream,
    architecture: Architecture,
    index: int,
    call: LayerCall,
    hidden: Tensor,
    batch: int,
    wanted: set[str],
) -> dict[str, Tensor]:
    """Replace the hidden states by the layer's output; return leader -> H, summed over tokens."""
    leaders = {group[0] for group in call.groups if wanted.intersection(group)}
    moments: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        if name not in moments:
            moments[name] = x.new_zeros(x.shape[-1], x.shape[-1], dtype=torch.float32)
        add_second_moment_(moments[name], x)

    layer_name = architecture.layer_names[index]
    with stream.layer(index) as layer, watch_inputs(layer, layer_name, sorted(leaders), see):
        for start in range(0, len(hidden), batch):
            rows = slice(start, start + batch)
            out = apply(layer, call, hidden[rows].to(stream.device))
            hidden[rows] = out
    for name, H in moments.items():
        if not bool(torch.isfinite(H).all()):
            raise ModelError(
                f"model: the inputs of {name} are not finite on the calibration text; "
                "the weights before it overflow: check the source model"
            )
    if not bool(torch.isfinite(hidden).all()):
        raise ModelError(
            f"model: the output of {layer_name} is not finite on the calibration text; "
            "its weights are damaged or overflow: check the source model"
        )
    return moments


def _members(call: LayerCall) -> set[str]:
    return {name for group in call.groups for name in group}


def _write(
    journal: Journal, index: int, call: LayerCall, moments: dict[str, Tensor], *, n_tokens: int
) -> None:
    leaders = {name: group[0] for group in call.groups if group[0] in moments for name in group}
    tensors = {name: H.cpu() for name, H in moments.items()}
    if not tensors:  # a safetensors file wants at least one tensor
        tensors = {"none": torch.zeros(1)}
    facts = {"leaders": leaders, "n_tokens": n_tokens}
    journal.write_tensors(statistics_file(index), tensors, facts)


def _batch_size(n_windows: int, length: int, device: str) -> int:
    """Choose the largest divisor of the number of windows that stays within the token budget.

    A divisor, because the masks recorded in the trace have the batch's shape.
    """
    limit = max(1, BATCH_TOKENS["cuda" if device.startswith("cuda") else "cpu"] // length)
    return max(b for b in range(1, min(limit, n_windows) + 1) if n_windows % b == 0)
