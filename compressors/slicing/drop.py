"""Whole layers left out: the simplest baseline, and always a plain checkpoint."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedConfig

from lrc.compressors.calibrate.states import Chain
from lrc.compressors.calibrate.statistics import batch_size
from lrc.compressors.calibrate.stream import LayerCall, LayerStream, apply
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.method import Budget, Sliced, SliceMethod, Work
from lrc.configs.errors import RecipeError
from lrc.configs.slicing import Drop as DropOptions
from lrc.configs.slicing import SliceBase

N_LAYERS = "num_hidden_layers"


class Drop(SliceMethod):
    """Leave out the layers that change their input least.

    References
    ----------
    .. [1] X. Men et al., "ShortGPT", 2024. https://arxiv.org/abs/2403.03853 (block influence)
    .. [2] J. Song et al., "SLEB", 2024. https://arxiv.org/abs/2402.09025 (verified by perplexity)
    """

    source = "ShortGPT, arXiv:2403.03853; SLEB, arXiv:2402.09025"

    def plan(
        self, architecture: Architecture, options: SliceBase, budget: Budget
    ) -> PreTrainedConfig:
        """Keep as many layers as fit; which ones they are, calibration tells.

        Raises
        ------
        RecipeError
            If nothing or everything would have to go, or the config does not count its layers.
        """
        config: PreTrainedConfig = architecture.model.config
        layers = architecture.layers
        sizes = [_bytes(layer.parameters()) for layer in layers]
        rest = budget.dense_bytes - sum(sizes)
        kept, spent = 0, rest
        # Which layers go is not known yet: of unequal ones the largest must fit.
        for size in sorted(sizes, reverse=True):
            if spent + size > budget.bytes:
                break
            kept, spent = kept + 1, spent + size
        if getattr(config, N_LAYERS, None) != len(layers):
            raise RecipeError(
                [
                    f"{budget.where}: {type(architecture.model).__name__} does not count its "
                    f"{len(layers)} layers as {N_LAYERS}, so none can be left out; take another "
                    "method"
                ]
            )
        if kept == 0:
            least = rest + max(sizes)
            raise RecipeError(
                [
                    f"{budget.where}: leaves {budget.bytes:,} bytes, but one layer and what is "
                    f"around the layers take {least:,} of {budget.dense_bytes:,}; at least "
                    f"{least / budget.dense_bytes:.3f} of the model have to be kept"
                ]
            )
        smaller = deepcopy(config)
        _keep(smaller, range(kept))
        return smaller

    def carry_out(self, work: Work, options: SliceBase, config: PreTrainedConfig) -> Sliced:
        """Find the layers that matter least, and yield the others under their new numbers."""
        assert isinstance(options, DropOptions)
        n_layers, n_kept = len(work.architecture.layers), int(getattr(config, N_LAYERS))
        facts: dict[str, Any] = {}
        if n_kept == n_layers:
            kept = list(range(n_layers))
        elif options.verify == "perplexity":
            kept, facts = _by_perplexity(work, n_kept)
        else:
            influence = block_influence(work)
            order = sorted(range(n_layers), key=lambda layer: influence[layer])
            kept = sorted(order[n_layers - n_kept :])
            facts = {"influence": influence}
        final = deepcopy(work.architecture.model.config)
        _keep(final, kept)
        dropped = [layer for layer in range(n_layers) if layer not in kept]
        return Sliced(final, _renumbered(work, kept), {"dropped": dropped, **facts})


def block_influence(work: Work) -> list[float]:
    """Return for every layer one minus the mean cosine between its input and its output [1]_.

    References
    ----------
    .. [1] Equation 1 of ShortGPT, https://arxiv.org/abs/2403.03853
    """
    stream, tokens, batch = _stream(work)
    states, calls = _embedded(work, stream, tokens, batch, "states")
    found = []
    for index, call in enumerate(calls):
        total = 0.0
        with stream.layer(index) as layer, torch.no_grad():
            for start in range(0, len(tokens), batch):
                rows = slice(start, start + batch)
                x = states.tensor[rows].to(work.device)
                y = apply(layer, call, x)
                total += float(cosine_similarity(x, y, dim=-1).sum(dtype=torch.float64))
                states.tensor[rows] = y
        found.append(1 - total / tokens.numel())
        work.on_step("slice", index + 1, len(calls))
    return found


def _by_perplexity(work: Work, n_kept: int) -> tuple[list[int], dict[str, Any]]:
    """Leave out one layer after the other, each time the one whose absence costs least loss.

    A trial needs the layers behind the one it leaves out, from states that the layers before it
    have made once: half of a forward pass a trial.
    """
    stream, tokens, batch = _stream(work)
    start, calls = _embedded(work, stream, tokens, batch, "states")
    kept, losses = list(range(len(calls))), []
    total = len(calls) - n_kept
    while len(kept) > n_kept:
        reached = start.tensor.clone()
        found: dict[int, float] = {}
        for place, layer in enumerate(kept):
            rest = kept[place + 1 :]
            found[layer] = _loss(stream, tokens, reached, rest, calls, batch)
            _pass(stream, reached, [layer], calls, batch)
        best = min(found, key=lambda layer: found[layer])
        kept.remove(best)
        losses.append(found[best])
        work.on_step("slice", total - (len(kept) - n_kept), total)
    return kept, {"losses": losses}


def _loss(
    stream: LayerStream,
    tokens: Tensor,
    states: Tensor,
    layers: Sequence[int],
    calls: Sequence[LayerCall],
    batch: int,
) -> float:
    """Return the mean loss of a token when `states` go through `layers` and then to the head."""
    states = states.clone()
    _pass(stream, states, layers, calls, batch)
    total = 0.0
    with stream.around_layers(head=True), torch.no_grad():
        for start in range(0, len(tokens), batch):
            rows = tokens[start : start + batch]
            hidden = states[start : start + batch].to(stream.device)
            logits = stream.logits(hidden, rows, calls[-1])[:, :-1].flatten(0, 1)
            labels = rows[:, 1:].reshape(-1).to(stream.device)
            total += float(cross_entropy(logits, labels, reduction="sum"))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


@torch.no_grad()
def _pass(
    stream: LayerStream,
    states: Tensor,
    layers: Sequence[int],
    calls: Sequence[LayerCall],
    batch: int,
) -> None:
    """Send states [n_windows, length, d_model] through layers, in place."""
    for index in layers:
        with stream.layer(index) as layer:
            for start in range(0, len(states), batch):
                rows = slice(start, start + batch)
                states[rows] = apply(layer, calls[index], states[rows].to(stream.device))


def _stream(work: Work) -> tuple[LayerStream, Tensor, int]:
    tokens = work.windows()
    stream = LayerStream(work.architecture, work.reader, device=work.device, dtype=torch.float32)
    return stream, tokens, batch_size(len(tokens), tokens.shape[1], work.device)


def _embedded(
    work: Work, stream: LayerStream, tokens: Tensor, batch: int, name: str
) -> tuple[Chain, list[LayerCall]]:
    """Return what enters the first layer for every window, and how the layers are called."""
    with stream.around_layers():
        calls = stream.trace(tokens[:batch])
        width = stream.embed(tokens[:1]).shape[-1]
        shape = (*tokens.shape, width)
        states = Chain(work.journal, name, shape, work.memory_limit_gib, work.device)
        for start in range(0, len(tokens), batch):
            rows = slice(start, start + batch)
            states.tensor[rows] = stream.embed(tokens[rows])
    return states, calls


def _keep(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Let a config speak of the kept layers only, where it says something of every one."""
    n_layers = int(getattr(config, N_LAYERS))
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == n_layers:
            setattr(config, key, [value[layer] for layer in kept])
    setattr(config, N_LAYERS, len(kept))


def _renumbered(work: Work, kept: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    names = work.architecture.layer_names
    new = {names[old]: names[number] for number, old in enumerate(kept)}
    for name in work.architecture.stored_parameters():
        layer = next((each for each in names if name.startswith(f"{each}.")), None)
        if layer is None:
            yield name, work.reader.read(name)
        elif layer in new:
            yield new[layer] + name.removeprefix(layer), work.reader.read(name)


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
