"""Train every decoder layer to produce the dense layer's outputs, with one layer in memory.

Attention and MLP are fitted together or one after the other. A window no smaller than one
nonlinearity matters: fits of single matrices are worse [1]_. Inputs come from the compressed layers
before, so that a layer also corrects their errors, and for some windows from the dense model [2]_.

References
----------
.. [1] "A Free Lunch in LLM Compression: Revisiting Retraining after Pruning", 2025.
   https://arxiv.org/abs/2510.14444
.. [2] "Lillama: Large Language Models Compression via Low-Rank Feature Distillation", 2024.
   https://arxiv.org/abs/2412.16719
"""

import time
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.calibrate.activation_cache import ActivationCache, cache_files
from lrc.compressors.calibrate.batch_size import BATCH_TOKENS
from lrc.compressors.calibrate.layer_executor import LayerExecutor
from lrc.compressors.evaluate.agreement import kl_divergence, log_probabilities
from lrc.compressors.heal.budget import Budget
from lrc.compressors.heal.descent import is_better
from lrc.compressors.heal.divergence import PIECE
from lrc.compressors.heal.layer_fit import Apply, LayerData, LayerFit, find_parts
from lrc.compressors.heal.trained_files import TRAINED, layer_file, write_trained
from lrc.compressors.heal.work import (
    HealWork,
    coordinates_of,
    deterministic,
    finite,
    loss_facts,
    nothing_to_train,
    select,
    selected_supports_,
    trained_parameters,
)
from lrc.compressors.io.device_copies import copy_, on_device
from lrc.compressors.solvers.linalg import tensor_cores
from lrc.configs.heal import Block

ELAPSED = "elapsed"
"""Key of the facts about a piece: seconds of training until it was written."""


def fit_blocks(work: HealWork, options: Block) -> dict[str, Any]:
    """Fit all layers in order and write their values; return the facts for the report.

    Of every fit the step with the lowest error on held-out text is used, and in the end nothing if
    the predictions of the model are no better. Layers that are written already are only applied.
    Embedding, last norm and head are those of the dense model.

    Raises
    ------
    RecipeError
        If the model has nothing that the options train.
    """
    device = work.session.device
    with deterministic(device), tensor_cores(device):
        return BlockFit(work, options).run()


class BlockFit:
    """Hidden states of the dense model, the trained one and the one before, layer by layer."""

    def __init__(self, work: HealWork, options: Block) -> None:
        self._work, self._options = work, options
        self._journal, self._stored = work.session.journal, work.stored()
        self._shared = {
            f"{component.shares}.{component.type}.a."
            for config in self._stored.modules.values()
            for component in config.components
            if component.shares is not None
        }
        context = work.session.models.calibration()
        text, length = work.text, work.text.training.shape[1]
        most = max(1, min(BATCH_TOKENS[context.device_type] // length, len(text.held_out)))
        self._together = max(n for n in range(1, most + 1) if options.batch % n == 0)
        # All batches have the same number of windows, for which the calls of layers are recorded.
        self._n_held_out = len(text.held_out) // self._together * self._together
        count = -(-len(text.training) // self._together) * self._together
        training = text.training[torch.arange(count) % len(text.training)]
        windows = torch.cat([text.held_out[: self._n_held_out], training])
        third = replace(  # for each of three buffers
            context,
            windows=lambda: windows,
            memory_limit_gib=context.memory_limit_gib / 3,
            gpu_fraction=context.gpu_fraction / 3,
        )
        self._executor = LayerExecutor(third, batch_tokens=self._together * length)
        self._dense = self._executor.embedded("dense")
        self._targets, self._healed = (
            ActivationCache(third, name, self._executor.shape).tensor
            for name in ("states", "compressed")
        )
        copy_(self._healed, self._dense)
        self._before = self._dense[: self._n_held_out].clone()
        self._start = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Fit all layers, and compare the predictions of the model with those before."""
        work, n_layers = self._work, len(self._executor.architecture.layers)
        facts = []
        for index in range(n_layers):
            facts.append(self._layer(index))
            work.session.on_step("heal", index + 1, n_layers)
        trainable = sum(each["trainable"] for each in facts)
        if not trainable:
            raise nothing_to_train(work.where, self._options.train)
        before, after = self._divergence(self._before), self._divergence(self._healed)
        self._journal.forget(*cache_files(self._journal))
        steps = [fit["steps"] for each in facts for fit in each["fits"]]
        kept = is_better(after, before)
        if not kept:
            self._journal.forget(*(layer_file(work.stage, index) for index in range(n_layers)))
        return {
            "trainable": trainable,
            "steps": round(sum(steps) / len(steps)),
            "layers": facts,
            "kept": kept,
            "before": finite(before),
            "after": finite(after if kept else before),
        }

    def _layer(self, index: int) -> dict[str, Any]:
        """Fit a layer unless that is done, and advance all hidden states by it."""
        piece = layer_file(self._work.stage, index)
        prefix = self._executor.architecture.layer_names[index]
        with self._executor.layer(index) as dense:
            apply: Apply = partial(self._executor.apply, index)
            self._advance(apply, dense, self._dense, self._targets)
            compressed = deepcopy(dense)
            self._stored.compress_layer_(compressed, prefix)
            self._advance(apply, compressed, self._before, self._before)
            if self._journal.has(piece):
                self._start = time.monotonic() - self._journal.read_facts(piece)[ELAPSED]
            else:
                self._fit(index, dense, compressed, piece)
            trained = {
                f"{prefix}.{name}": tensor
                for name, tensor in chain(compressed.named_parameters(), compressed.named_buffers())
            }
            names: list[str] = self._journal.read_facts(piece)[TRAINED]
            with torch.no_grad():
                for name in names:
                    trained[name].copy_(self._journal.read_tensor(piece, name))
            self._advance(apply, compressed, self._healed, self._healed)
        self._dense, self._targets = self._targets, self._dense
        facts: dict[str, Any] = self._journal.read_facts(piece)["facts"]
        return facts

    def _fit(self, index: int, dense: nn.Module, compressed: nn.Module, piece: str) -> None:
        """Fit the parts of a layer, one after the other, and write their values."""
        options, work = self._options, self._work
        prefix = self._executor.architecture.layer_names[index]
        apply: Apply = partial(self._executor.apply, index)
        selected = {
            name: parameter
            for name, parameter in select(compressed, options).items()
            if not any(f"{prefix}.{name}".startswith(shared) for shared in self._shared)
        }
        supports = selected_supports_(compressed, selected, options)
        data = LayerData(self._dense, self._healed, self._targets, self._n_held_out, self._together)
        parts = find_parts(
            apply,
            self._dense[: self._together],
            compressed,
            [*selected],
            separate=options.parts == "separate",
        )
        tensors: dict[str, Tensor] = {}
        fits, trainable = [], 0
        parts = parts if selected else []
        for number, part in enumerate(parts):
            named = {f"{prefix}.{name}": selected[name] for name in part.parameters}
            seed = work.seed * 1_000_003 + index
            moving = {f"{prefix}.{n}": supports[n] for n in part.parameters if n in supports}
            coordinates = coordinates_of(
                compressed, {n: selected[n] for n in part.parameters}, options, f"{prefix}."
            )
            trained = trained_parameters(named, self._stored, moving, coordinates, seed=seed)
            fit = LayerFit(apply, dense, compressed, part, data)
            budget = self._budget(index, parts_left=len(parts) - number)
            descent = fit.run(trained, options, budget=budget, seed=seed)
            tensors |= trained.encoded(descent.best)
            fits.append({"part": part.child or "layer", **loss_facts(descent)})
            trainable += trained.count
        for support in supports.values():
            support.restore_()
        facts = {"layer": prefix, "trainable": trainable, "fits": fits}
        record = {"facts": facts, ELAPSED: time.monotonic() - self._start}
        if tensors:
            write_trained(self._journal, piece, tensors, record)
        else:  # a safetensors file needs at least one tensor
            nothing = {"none": torch.zeros(1)}
            self._journal.write_tensors(piece, nothing, {TRAINED: [], **record})

    def _budget(self, index: int, *, parts_left: int) -> Budget:
        """Return the budget of a part: limited time is divided evenly between layers."""
        done = (index + 1) / len(self._executor.architecture.layers)
        left = self._options.seconds * done - (time.monotonic() - self._start)
        return self._work.budget(left / parts_left)

    @torch.no_grad()
    def _advance(self, apply: Apply, layer: nn.Module, states: Tensor, out: Tensor) -> None:
        """Write the output of a layer for `states` [n, length, d_model] into `out`."""
        for start in range(0, len(states), self._together):
            rows = slice(start, start + self._together)
            copy_(out[rows], apply(states[rows], layer))

    @torch.no_grad()
    def _divergence(self, states: Tensor) -> float:
        """Return the divergence per held-out position for the outputs of the last layer."""
        executor, total = self._executor, 0.0
        size = PIECE[executor.context.device_type]
        tokens = executor.tokens[: self._n_held_out]
        with executor.around_layers(head=True):
            for number, ids in enumerate(tokens):
                for start in range(0, len(ids), size):
                    rows = (slice(number, number + 1), slice(start, start + size))
                    log_p, log_q = (
                        log_probabilities(
                            executor.logits(
                                on_device(each[rows], executor.context.device), tokens[rows]
                            )
                        )
                        for each in (self._dense, states)
                    )
                    total += float(kl_divergence(log_p, log_q).sum())
        return total / tokens.numel()
