"""Merge experts of mixture-of-experts layers, which always leaves a plain checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lrc.compressors.calibrate.calibration_context import CalibrationContext, check_finite
from lrc.compressors.calibrate.layer_executor import LayerExecutor
from lrc.compressors.layers.experts import SplitExperts, split_modules
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.layout import skeleton
from lrc.compressors.slicing.reap import (
    ExpertScores,
    FewerExperts,
    best_experts,
    kept_part,
    router_groups,
    stored_shapes,
)
from lrc.compressors.slicing.slice_method import Budget, SlicedModel
from lrc.compressors.solvers.expert_merging import (
    align_neurons,
    expert_similarity,
    group_experts,
    reduced_neurons,
)
from lrc.configs.slice import Ream as Options

SAMPLES = 4096
"""Tokens on which all experts of a layer are compared."""


class Ream(FewerExperts[Options]):
    """Merge the experts that add least to the output of their layer into similar ones.

    The experts with the highest scores of `Reap` are kept. Each of the others is assigned to one of
    them, see `group_experts`, and the weights of a group are averaged, weighted by the scores,
    after the neurons have been put in the same order. Layers are merged one after the other, on the
    hidden states that the merged layers before them produce.

    Notes
    -----
    Experts are compared on a sample of tokens, with the softmax of the router's scores as weights,
    whatever function the model uses.

    References
    ----------
    .. [1] S. Jha et al., "REAM: Merging Improves Pruning of Experts in LLMs", 2026.
       https://arxiv.org/abs/2604.04356
    """

    def plan(
        self, architecture: Architecture, options: Options, budget: Budget
    ) -> PreTrainedConfig:
        """Return a config with as many experts as fit the budget."""
        config = super().plan(architecture, options, budget)
        kind = type(architecture.model).__name__
        smaller = skeleton(architecture, config)
        for name, module in split_modules(architecture.model):
            reason = _obstacle(architecture.model, smaller, name, module)
            if reason:
                raise budget.refusal(f"experts of {kind} cannot be merged: {reason}; use reap")
        n_experts = next(number for number, _ in architecture.experts.values())
        n_kept = next(module.n_experts for _, module in split_modules(smaller))
        if n_kept * options.group_size < n_experts:
            raise budget.refusal(
                f"allows {n_kept} of {n_experts} experts, which groups of {options.group_size} do "
                f"not hold; raise it, or raise group_size to {-(-n_experts // n_kept)}"
            )
        return config

    def passes(self, options: Options, config: PreTrainedConfig) -> float:
        """Return two forward passes: through each layer as it was, and merged."""
        return 2.0

    def apply(
        self, context: CalibrationContext, options: Options, config: PreTrainedConfig
    ) -> SlicedModel:
        """Merge the experts of each layer; the others are renumbered."""
        writer = _MergedLayers(context, options, config)
        return SlicedModel(config, writer.tensors(), writer.facts)


@dataclass
class _MergedLayers:
    """Compute the tensors of a model with merged experts."""

    context: CalibrationContext
    options: Options
    config: PreTrainedConfig
    facts: dict[str, Any] = field(
        default_factory=lambda: {"groups": {}, "scores": {}, "tokens": {}}
    )

    def __post_init__(self) -> None:
        self._smaller = skeleton(self.context.architecture, self.config).eval()
        self._merged: dict[str, Tensor] = {}
        self._kept: dict[str, list[int]] = {}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every stored parameter, merging the experts of a layer when it is reached."""
        architecture = self.context.architecture
        names, shapes, done = architecture.layer_names, stored_shapes(self._smaller), 0
        executor = LayerExecutor(self.context)
        states = executor.embedded()
        for name in architecture.stored_parameters():
            if done < len(names) and name.startswith(f"{names[done]}."):
                self._merge_layer(executor, done, states, shapes)
                done += 1
                self.context.on_step("slice", done, len(names))
            yield from kept_part(name, self._kept, shapes, self._read)

    def _read(self, name: str) -> Tensor:
        found = self._merged.get(name)
        return self.context.reader.read(name) if found is None else found

    @torch.no_grad()
    def _merge_layer(
        self,
        executor: LayerExecutor,
        index: int,
        states: Tensor,
        shapes: Mapping[str, list[int]],
    ) -> None:
        """Merge the experts of a layer, and replace the states by the output of the result."""
        architecture = self.context.architecture
        layer_name = architecture.layer_names[index]
        inside = [name for name in architecture.experts if name.startswith(f"{layer_name}.")]
        self._merged = {}
        with executor.layer(index):
            for experts in inside:
                self._merge(executor, index, experts, states)
            if not inside:
                executor.advance_(index, states)
        if inside:
            stored = (n for n in architecture.stored_parameters() if n.startswith(f"{layer_name}."))
            found = dict(
                part for name in stored for part in kept_part(name, self._kept, shapes, self._read)
            )
            layer = self._smaller.get_submodule(layer_name)
            _fill_(layer, layer_name, found, self.context.device)
            executor.advance_(index, states, layer)
            layer.to("meta")
        check_finite(states, f"the output of {layer_name}")

    def _merge(self, executor: LayerExecutor, index: int, name: str, states: Tensor) -> None:
        """Merge the experts of one module, all of whose weights are in memory."""
        model = self.context.architecture.model
        experts: SplitExperts = model.get_submodule(name)
        scores = ExpertScores.zero(experts.n_experts)
        tokens: list[Tensor] = []
        every = max(1, executor.tokens.numel() // SAMPLES)
        sample = experts.register_forward_pre_hook(lambda _, args: tokens.append(args[0][::every]))
        with sample, scores.watch(experts):
            for rows in executor.batches:
                executor.apply(index, states[rows])
        X = torch.cat(tokens)  # [n_samples, d_model]
        router = _router(model, self._smaller, name)
        assert router is not None
        logits = _router_scores(model, router, X)  # [n_samples, n_experts]
        gates = logits.softmax(dim=1)
        activations, outputs = [], []
        for number in range(experts.n_experts):
            first, second = experts.get_submodule(str(number)).children()
            hidden = experts._activation(first(X))
            activations.append(hidden.T)  # [width, n_samples]
            outputs.append((gates[:, number, None] * second(hidden)).mean(dim=0))
        n_kept = self._smaller.get_submodule(name).n_experts
        best = best_experts(scores.scores, n_kept, router_groups(self.config))
        similarity = expert_similarity(torch.stack(outputs), logits).cpu()
        groups = group_experts(scores.scores, similarity, best, self.options.group_size)
        merging = _Merging(experts, activations, _shares(scores.scores), self.context.seed)
        for group in groups:
            if len(group) > 1:
                for leaf, tensor in merging.merged(group).items():
                    stored = self.context.architecture.stored_parameters()[f"{name}.{leaf}"]
                    self._merged[f"{name}.{leaf}"] = tensor.to("cpu", stored.dtype)
        self._kept[name] = best
        self.facts["groups"][name] = groups
        self.facts["scores"][name] = scores.scores.tolist()
        self.facts["tokens"][name] = scores.tokens.tolist()


class _Merging:
    """Averages the weights of experts of one layer."""

    def __init__(
        self, experts: SplitExperts, activations: Sequence[Tensor], weights: Tensor, seed: int
    ) -> None:
        self._matrices: list[Any] = [
            [*experts.get_submodule(str(number)).children()] for number in range(experts.n_experts)
        ]
        self._experts, self._rows = experts, neuron_rows(experts)
        neurons = [
            torch.cat([*(one.weight[rows] for rows in self._rows), two.weight.T], dim=1)
            for one, two in self._matrices
        ]
        generator = torch.Generator().manual_seed(seed)
        self._reduced = reduced_neurons(torch.stack(neurons), generator)
        self._activations, self._weights = activations, weights

    def merged(self, group: Sequence[int]) -> dict[str, Tensor]:
        """Return the tensors of the first expert of a group, averaged over the group."""
        centre, *others = group
        shares = self._weights[[*group]] / self._weights[[*group]].sum()
        found = {
            name: float(shares[0]) * tensor for name, tensor in self._tensors(centre, None).items()
        }
        for number, share in zip(others, shares[1:].tolist(), strict=True):
            order = align_neurons(
                (self._activations[centre], self._activations[number]),
                (self._reduced[centre], self._reduced[number]),
            )
            for name, tensor in self._tensors(number, order).items():
                found[name] += share * tensor
        first = f"{centre}."
        return {first + name: tensor for name, tensor in found.items()}

    def _tensors(self, number: int, order: Tensor | None) -> dict[str, Tensor]:
        """Return the tensors of an expert with its neurons in another order."""
        first, second = self._matrices[number]
        names = [name for name, _ in self._experts.get_submodule(str(number)).named_children()]
        found = {f"{names[1]}.weight": second.weight if order is None else second.weight[:, order]}
        for leaf, tensor in first.named_parameters():
            moved = tensor.clone()
            for rows in self._rows if order is not None else []:
                moved[rows] = tensor[rows[order]]
            found[f"{names[0]}.{leaf}"] = moved
        if second.bias is not None:
            found[f"{names[1]}.bias"] = second.bias
        return found


def _obstacle(model: nn.Module, smaller: nn.Module, name: str, module: SplitExperts) -> str | None:
    """Return why the experts of a module cannot be merged, if so."""
    if type(module) is not SplitExperts:
        return "they receive all tokens"
    if _router(model, smaller, name) is None:
        return f"{name} has no router with a row for each of them"
    try:
        neuron_rows(module)
    except ValueError as error:
        return str(error)
    return None


def neuron_rows(experts: SplitExperts) -> list[Tensor]:
    """Return the rows of the first matrix of an expert that belong to its neurons, in order.

    One tensor [width] without a gate; with one, the rows of gates and those of the other part,
    which classes store one after the other or in turns.

    Raises
    ------
    ValueError
        If the activation combines rows in another way.
    """
    first: Any
    second: Any
    first, second = experts.get_submodule("0").children()
    n_rows, width = first.out_features, second.in_features
    numbers = torch.arange(n_rows)
    if n_rows == width:
        return [numbers]
    probe = torch.full((n_rows,), 0.5)
    other = probe.clone()
    other[1] = 1.0
    changed = (experts._activation(other) != experts._activation(probe)).nonzero().flatten()
    if n_rows == 2 * width and changed.tolist() == [0]:
        return [numbers[::2], numbers[1::2]]
    if n_rows == 2 * width and changed.tolist() == [1]:
        return [numbers[:width], numbers[width:]]
    raise ValueError("the activation combines the rows of a gate in an unknown order")


def _router(model: nn.Module, smaller: nn.Module, experts: str) -> str | None:
    """Return the name of the weight [n_experts, d_model] of the router of a module of experts."""
    block, of_experts = experts.rpartition(".")[0], f"{experts}."
    for name, weight in model.get_submodule(block).named_parameters(prefix=block):
        if weight.ndim != 2 or name.startswith(of_experts):
            continue
        if smaller.get_parameter(name).shape[0] != weight.shape[0]:
            return name
    return None


def _router_scores(model: nn.Module, weight: str, x: Tensor) -> Tensor:
    """Return the scores [n_tokens, n_experts] of a router before they are made to weights."""
    bias = weight.removesuffix("weight") + "bias"
    parameters = dict(model.get_submodule(weight.rpartition(".")[0]).named_parameters())
    return nn.functional.linear(x, parameters["weight"], parameters.get(bias.rpartition(".")[2]))


def _shares(scores: Tensor) -> Tensor:
    """Return weights of experts: their scores, or the least positive one without tokens."""
    positive = scores[scores > 0]
    return scores.clamp_min(float(positive.min()) if len(positive) else 1.0)


def _fill_(layer: nn.Module, name: str, tensors: Mapping[str, Tensor], device: str) -> None:
    """Give a decoder layer its tensors, by their full names, in float32."""
    for path, owner in layer.named_modules(prefix=name):
        for leaf in owner._parameters:
            if owner._parameters[leaf] is not None:
                tensor = tensors[f"{path}.{leaf}"].to(device, torch.float32)
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:
                stored = tensors.get(f"{path}.{leaf}", buffer)
                owner._buffers[leaf] = stored.to(device)
