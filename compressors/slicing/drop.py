"""Remove whole decoder layers, which always leaves a plain checkpoint."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedConfig

from lrc.compressors.calibrate.activation_cache import ActivationCache
from lrc.compressors.calibrate.calibration_context import CalibrationContext, check_finite
from lrc.compressors.calibrate.layer_check import differing_layer
from lrc.compressors.calibrate.layer_executor import LayerExecutor
from lrc.compressors.io.device_copies import copy_, on_device
from lrc.compressors.models.architecture import Architecture, describe
from lrc.compressors.slicing.layout import skeleton
from lrc.compressors.slicing.slice_method import Budget, SlicedModel, SliceMethod
from lrc.configs.errors import RecipeError
from lrc.configs.size import GIB
from lrc.configs.slice import Drop as Options

N_LAYERS = "num_hidden_layers"


class Drop(SliceMethod[Options]):
    """Remove the layers that change their input least, or whose removal costs least perplexity.

    References
    ----------
    .. [1] X. Men et al., "ShortGPT", 2024. https://arxiv.org/abs/2403.03853 (block influence)
    .. [2] J. Song et al., "SLEB", 2024. https://arxiv.org/abs/2402.09025 (perplexity)
    """

    def plan(
        self, architecture: Architecture, options: Options, budget: Budget
    ) -> PreTrainedConfig:
        """Return a config with as many layers as fit the budget; calibration chooses which."""
        config: PreTrainedConfig = architecture.model.config
        layers, kind = architecture.layers, type(architecture.model).__name__
        shapes = [{n: p.shape for n, p in layer.named_parameters()} for layer in layers]
        if any(each != shapes[0] for each in shapes):
            raise budget.refusal(
                f"the layers of {kind} differ in shape, so the size of the result depends on which "
                "ones calibration removes; use another method"
            )
        layer_bytes = sum(p.numel() * p.element_size() for p in layers[0].parameters())
        rest = budget.dense_bytes - len(layers) * layer_bytes
        kept = max(0, min(len(layers), (budget.bytes - rest) // layer_bytes))
        if getattr(config, N_LAYERS, None) != len(layers):
            raise budget.refusal(
                f"the config of {kind} does not give its {len(layers)} layers as {N_LAYERS}, so "
                "none can be removed; use another method"
            )
        if kept == 0:
            raise budget.too_small(
                rest + layer_bytes, "one layer and everything outside the layers"
            )
        # Calibration chooses the layers; these shift all positions from the first on, one or most.
        for start in sorted({0, min(1, len(layers) - kept), len(layers) - kept}, reverse=True):
            smaller, chosen = deepcopy(config), range(start, start + kept)
            try:
                _keep_layers_(smaller, chosen)
            except NotImplementedError as error:  # a derived key
                raise budget.refusal(
                    f"the config of {kind} does not let {N_LAYERS} be changed; use another method"
                ) from error
            fewer = describe(skeleton(architecture, smaller))
            if len(fewer.layers) == kept:  # `plan_slices` refuses another number
                difference = differing_layer(architecture, fewer, chosen)
                if difference:
                    raise budget.refusal(
                        f"{kind} computes differently with {kept} layers instead of "
                        f"{len(layers)}: {difference}; use another method"
                    )
        return smaller

    def passes(self, options: Options, config: PreTrainedConfig) -> float:
        """Count half a pass per trial: each removal tries about as many layers as are kept."""
        if options.criterion == "influence":
            return 1.0
        kept = int(getattr(config, N_LAYERS))
        return kept / 2 * max(1.0, kept * (1 / (options.keep or 0.8) - 1))

    def apply(
        self, context: CalibrationContext, options: Options, config: PreTrainedConfig
    ) -> SlicedModel:
        """Choose the layers to remove; the others are renumbered."""
        n_layers, n_kept = len(context.architecture.layers), int(getattr(config, N_LAYERS))
        facts: dict[str, Any] = {}
        if n_kept == n_layers:
            kept = list(range(n_layers))
        elif options.criterion == "perplexity":
            kept, losses = _search_by_perplexity(context, n_kept)
            facts = {"losses": losses}
        else:
            influence = block_influence(context)
            order = sorted(range(n_layers), key=lambda layer: influence[layer])
            kept = sorted(order[n_layers - n_kept :])
            facts = {"influence": influence}
        final = deepcopy(context.architecture.model.config)
        _keep_layers_(final, kept)
        dropped = [layer for layer in range(n_layers) if layer not in kept]
        return SlicedModel(final, _renumbered(context, kept), {"dropped": dropped, **facts})


def block_influence(context: CalibrationContext) -> list[float]:
    """Return one minus the mean cosine between input and output of each layer (ShortGPT, eq. 1)."""
    executor = LayerExecutor(context)
    states, names, found = executor.embedded(), context.architecture.layer_names, []
    for index, name in enumerate(names):
        total = 0.0
        with executor.layer(index), torch.no_grad():
            for rows in executor.batches:
                x = on_device(states[rows], context.device)
                y = executor.apply(index, x)
                total += float(cosine_similarity(x, y, dim=-1).sum(dtype=torch.float64))
                copy_(states[rows], y)
        check_finite(total, f"the cosine of input and output in {name}")
        found.append(1 - total / executor.tokens.numel())
        context.on_step("slice", index + 1, len(names))
    return found


def _search_by_perplexity(
    context: CalibrationContext, n_kept: int
) -> tuple[list[int], list[float]]:
    """Remove layers greedily by the loss; return the kept layers and the loss of each removal.

    A trial runs the layers after the removed one, on states that the layers before it have
    computed once: half a forward pass on average. The layers stay on the device if they fit the
    memory limit.
    """
    executor = LayerExecutor(context)
    if executor.tokens.shape[1] < 2:
        raise RecipeError(
            "calibration.length: must be at least 2 with criterion: perplexity, got 1; raise it"
        )
    layers, names = context.architecture.layers, context.architecture.layer_names
    inputs = executor.embedded()
    reached, states = (
        ActivationCache(context, name, executor.shape).tensor for name in ("dense", "compressed")
    )
    kept, losses = list(range(len(layers))), []
    trials, done = sum(range(n_kept + 1, len(layers) + 1)), 0
    with ExitStack() as held:
        held.enter_context(executor.around_layers(head=True))
        n = sum(p.numel() for layer in layers for p in layer.parameters())
        resident = n * torch.float32.itemsize <= context.memory_limit_gib * GIB
        for index in kept if resident else []:
            held.enter_context(executor.layer(index))

        def advance(states: Tensor, indices: Sequence[int]) -> None:
            for index in indices:
                with nullcontext() if resident else executor.layer(index):
                    executor.advance_(index, states)

        while len(kept) > n_kept:
            copy_(reached, inputs)
            found: dict[int, float] = {}
            for place, layer in enumerate(kept):
                copy_(states, reached)
                advance(states, kept[place + 1 :])
                found[layer] = _mean_loss(executor, states)
                check_finite(found[layer], f"the loss without {names[layer]}")
                advance(reached, [layer])
                done += 1
                context.on_step("slice", done, trials)
            best = min(found, key=lambda layer: found[layer])
            kept.remove(best)
            losses.append(found[best])
    return kept, losses


@torch.no_grad()
def _mean_loss(executor: LayerExecutor, states: Tensor) -> float:
    """Return the mean loss per token, given the output `states` of the last layer."""
    total, device = 0.0, executor.context.device
    for rows in executor.batches:
        tokens, hidden = executor.tokens[rows], on_device(states[rows], device)
        logits = executor.logits(hidden, tokens)[:, :-1].flatten(0, 1)
        labels = tokens[:, 1:].reshape(-1).to(device)
        total += float(cross_entropy(logits, labels, reduction="sum"))
    return total / executor.tokens[:, 1:].numel()


def _keep_layers_(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Restrict a config to some layers, including lists with one value per layer."""
    n_layers = int(getattr(config, N_LAYERS))
    for key, value in config.to_dict().items():
        if key.endswith("_token_id") or key == "architectures":  # lists that are not per layer
            continue
        if isinstance(value, list) and len(value) == n_layers:
            setattr(config, key, [value[layer] for layer in kept])
    setattr(config, N_LAYERS, len(kept))


def _renumbered(context: CalibrationContext, kept: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    names = context.architecture.layer_names
    new = {names[old]: names[number] for number, old in enumerate(kept)}
    for name in context.architecture.stored_parameters():
        layer = next((each for each in names if name.startswith(f"{each}.")), None)
        if layer is None:
            yield name, context.reader.read(name)
        elif layer in new:
            yield new[layer] + name.removeprefix(layer), context.reader.read(name)
