"""Whole layers left out: the simplest baseline, and always a plain checkpoint."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedConfig

from lrc.compressors.calibrate.layer_stream import apply
from lrc.compressors.calibrate.states import GIB, Chain
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.layer_sweep import Ascent
from lrc.compressors.slicing.slice_method import Budget, Sliced, SliceMethod, Work
from lrc.configs.errors import ModelError, RecipeError
from lrc.configs.slice import Drop as DropOptions
from lrc.configs.slice import SliceBase

N_LAYERS = "num_hidden_layers"
FLOAT32 = 4  # bytes


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
        shapes = [{n: p.shape for n, p in layer.named_parameters()} for layer in layers]
        if any(each != shapes[0] for each in shapes):
            raise RecipeError(
                [
                    f"{budget.where}: the layers of {type(architecture.model).__name__} are not "
                    "all of the same shapes, so what is left cannot be planned before it is known "
                    "which of them go; take another method"
                ]
            )
        sizes = [_bytes(layer.parameters()) for layer in layers]
        rest = budget.dense_bytes - sum(sizes)
        kept = max(0, min(len(layers), (budget.bytes - rest) // sizes[0]))
        if getattr(config, N_LAYERS, None) != len(layers):
            raise RecipeError(
                [
                    f"{budget.where}: {type(architecture.model).__name__} does not count its "
                    f"{len(layers)} layers as {N_LAYERS}, so none can be left out; take another "
                    "method"
                ]
            )
        if kept == 0:
            least = rest + sizes[0]
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

    def passes(self, options: SliceBase, config: PreTrainedConfig) -> float:
        """Count half a pass a trial, of about as many trials a layer that goes as are kept."""
        assert isinstance(options, DropOptions)
        if options.criterion == "influence":
            return 1.0
        kept = int(getattr(config, N_LAYERS))
        return kept / 2 * max(1.0, kept * (1 / (options.keep or 0.8) - 1))

    def carry_out(self, work: Work, options: SliceBase, config: PreTrainedConfig) -> Sliced:
        """Find the layers that matter least, and yield the others under their new numbers."""
        assert isinstance(options, DropOptions)
        n_layers, n_kept = len(work.architecture.layers), int(getattr(config, N_LAYERS))
        facts: dict[str, Any] = {}
        if n_kept == n_layers:
            kept = list(range(n_layers))
        elif options.criterion == "perplexity":
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
    tokens = work.windows()
    up = Ascent.begin(work, tokens)
    names, found = work.architecture.layer_names, []
    for index, call in enumerate(up.calls):
        total = 0.0
        with up.stream.layer(index) as layer, torch.no_grad():
            for rows in up.rows():
                x = up.states[rows].to(work.device)
                y = apply(layer, call, x)
                total += float(cosine_similarity(x, y, dim=-1).sum(dtype=torch.float64))
                up.states[rows] = y
        found.append(_finite(1 - total / tokens.numel(), names[index]))
        work.on_step("slice", index + 1, len(up.calls))
    return found


def _by_perplexity(work: Work, n_kept: int) -> tuple[list[int], dict[str, Any]]:
    """Leave out one layer after the other, each time the one whose absence costs least loss.

    A trial needs the layers behind the one it leaves out, from states that the layers before it
    have made once: half of a forward pass a trial. Layers are asked for over and over: they stay
    resident where the memory limit allows.
    """
    tokens = work.windows()
    if tokens.shape[1] < 2:
        raise RecipeError(
            ["calibration.length: must be at least 2 with verify: perplexity, got 1; raise it"]
        )
    up = Ascent.begin(work, tokens)
    stream, calls = up.stream, up.calls
    shape = (tokens.shape[0], tokens.shape[1], up.states.shape[-1])
    reached, states = (
        Chain(work.journal, name, shape, work.memory_limit_gib, work.device).tensor
        for name in ("dense", "prefix")
    )
    kept, losses = list(range(len(calls))), []
    trials, done = sum(range(n_kept + 1, len(calls) + 1)), 0
    with ExitStack() as held:
        held.enter_context(stream.around_layers(head=True))
        layers = work.architecture.layers
        near = FLOAT32 * sum(p.numel() for layer in layers for p in layer.parameters())
        resident = near <= work.memory_limit_gib * GIB
        for index in kept if resident else []:
            held.enter_context(stream.layer(index))

        def visit(index: int) -> AbstractContextManager[nn.Module]:
            return nullcontext(layers[index]) if resident else stream.layer(index)

        def advance(states: Tensor, indices: Sequence[int]) -> None:
            for index in indices:
                with visit(index) as layer:
                    for rows in up.rows():
                        x = states[rows].to(work.device)
                        states[rows] = apply(layer, calls[index], x)

        while len(kept) > n_kept:
            reached.copy_(up.states)
            found: dict[int, float] = {}
            for place, layer in enumerate(kept):
                states.copy_(reached)
                with torch.no_grad():
                    advance(states, kept[place + 1 :])
                    loss = _loss(up, states, tokens)
                    found[layer] = _finite(loss, work.architecture.layer_names[layer])
                    advance(reached, [layer])
                done += 1
                work.on_step("slice", done, trials)
            best = min(found, key=lambda layer: found[layer])
            kept.remove(best)
            losses.append(found[best])
    return kept, {"losses": losses}


def _loss(up: Ascent, states: Tensor, tokens: Tensor) -> float:
    """Return the mean loss of a token behind the last layer's output `states`."""
    total = 0.0
    for rows in up.rows():
        hidden = states[rows].to(up.stream.device)
        logits = up.stream.logits(hidden, tokens[rows], up.calls[-1])[:, :-1].flatten(0, 1)
        labels = tokens[rows, 1:].reshape(-1).to(up.stream.device)
        total += float(cross_entropy(logits, labels, reduction="sum"))
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def _finite(value: float, layer: str) -> float:
    if not isfinite(value):
        raise ModelError(
            f"model: its states are not finite around {layer} on the calibration text; its weights "
            "are damaged or overflow: check the source model"
        )
    return value


def _keep(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Let a config speak of the kept layers only, where it says something of every one."""
    n_layers = int(getattr(config, N_LAYERS))
    for key, value in config.to_dict().items():
        if key.endswith("_token_id") or key == "architectures":  # of no layer
            continue
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
