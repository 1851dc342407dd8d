"""Remove experts of mixture-of-experts layers, which always leaves a plain checkpoint."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from lrc.compressors.calibrate.calibration_context import CalibrationContext, check_finite
from lrc.compressors.calibrate.layer_executor import LayerExecutor
from lrc.compressors.layers.experts import Expert, split_modules
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.slicing.layout import skeleton
from lrc.compressors.slicing.slice_method import Budget, SlicedModel, SliceMethod
from lrc.configs.slice import Reap as Options
from lrc.configs.slice import SliceBase

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Config keys for the number of experts; a class reads one of them."""
GROUPS = ("n_group", "num_expert_group")
"""Config keys for the number of groups of experts of which the router first selects some."""


OptionsT = TypeVar("OptionsT", bound=SliceBase)


@dataclass
class ExpertScores:
    """Scores of the experts of one layer, and the tokens that they received."""

    totals: Tensor
    """[n_experts], sums of the norms of weighted outputs."""
    tokens: Tensor
    """[n_experts]"""

    @classmethod
    def zero(cls, n_experts: int) -> Self:
        """Return those of no tokens."""
        return cls(
            torch.zeros(n_experts, dtype=torch.float64), torch.zeros(n_experts, dtype=torch.int64)
        )

    @property
    def scores(self) -> Tensor:
        """[n_experts], 0 for experts without tokens."""
        return self.totals / self.tokens.clamp_min(1)

    def watch(self, experts: nn.Module) -> ExitStack:
        """Add the tokens that the experts of a module receive within the context."""

        def see(number: int, _: nn.Module, __: object, y: Tensor) -> None:
            self.totals[number] += y.norm(dim=-1).sum(dtype=torch.float64).cpu()
            self.tokens[number] += len(y)

        hooks = ExitStack()
        for name, module in experts.named_children():
            if isinstance(module, Expert):
                hooks.enter_context(module.register_forward_hook(partial(see, int(name))))
        return hooks


class FewerExperts(SliceMethod[OptionsT]):
    """Keep the same number of experts in every layer, and their part of the router."""

    def plan(
        self, architecture: Architecture, options: OptionsT, budget: Budget
    ) -> PreTrainedConfig:
        """Return a config with as many experts as fit the budget; calibration chooses which."""
        model, kind = architecture.model, type(architecture.model).__name__
        if not architecture.experts:
            raise budget.refusal(f"{kind} has no experts that could be removed; use another method")
        numbers, selected = zip(*architecture.experts.values(), strict=True)
        n_experts, per_token = numbers[0], max(selected)
        if len({*numbers}) > 1:
            raise budget.refusal(
                f"the layers of {kind} have different numbers of experts ({min(numbers)} to "
                f"{max(numbers)}), and its config has one number for all; use another method"
            )
        of_experts = [p for _, module in split_modules(model) for p in module.parameters()]
        each = sum(p.numel() * p.element_size() for p in of_experts) // n_experts
        rest, groups = budget.dense_bytes - n_experts * each, router_groups(model.config)
        kept = min(n_experts, (budget.bytes - rest) // each) // groups * groups
        least = _least(model.config, per_token)
        if kept < least:
            raise budget.too_small(
                rest + least * each,
                f"{least} of {n_experts} experts, of which a token selects {per_token}, and "
                "everything else",
            )
        for key in COUNTS:
            smaller: PreTrainedConfig = deepcopy(model.config)
            if getattr(smaller.get_text_config(), key, None) != n_experts:
                continue
            setattr(smaller.get_text_config(), key, kept)
            if _fits(architecture, smaller, n_experts, kept):
                return smaller
        raise budget.refusal(
            f"{kind} does not take the number of its experts from one of the config keys "
            f"{', '.join(COUNTS)}; use another method"
        )


class Reap(FewerExperts[Options]):
    """Remove the experts that add least to the output of their layer; the same number everywhere.

    The score of an expert is the mean, over the tokens that select it, of the norm of its output
    times the weight of the router. The rows of the router for removed experts go with them, so that
    their tokens select the next best experts.

    References
    ----------
    .. [1] M. Lasby et al., "REAP the Experts", 2025. https://arxiv.org/abs/2510.13999 (equation 9)
    """

    def apply(
        self, context: CalibrationContext, options: Options, config: PreTrainedConfig
    ) -> SlicedModel:
        """Choose the experts to remove; the others are renumbered."""
        found = expert_scores(context)
        smaller = skeleton(context.architecture, config)
        n_kept = next(module.n_experts for _, module in split_modules(smaller))
        groups = router_groups(config)
        kept = {name: best_experts(layer.scores, n_kept, groups) for name, layer in found.items()}
        facts = {
            "dropped": {
                name: [n for n in range(len(found[name].scores)) if n not in chosen]
                for name, chosen in kept.items()
            },
            "scores": {name: layer.scores.tolist() for name, layer in found.items()},
            "tokens": {name: layer.tokens.tolist() for name, layer in found.items()},
        }
        shapes = stored_shapes(smaller)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in context.architecture.stored_parameters():
                yield from kept_part(name, kept, shapes, context.reader.read)

        return SlicedModel(config, tensors(), facts)


@torch.no_grad()
def expert_scores(context: CalibrationContext) -> dict[str, ExpertScores]:
    """Return the scores of the experts by the name of their module."""
    executor, names = LayerExecutor(context), context.architecture.layer_names
    states = executor.embedded()
    sizes = {name: number for name, (number, _) in context.architecture.experts.items()}
    found = {name: ExpertScores.zero(size) for name, size in sizes.items()}
    for index, name in enumerate(names):
        with executor.layer(index), ExitStack() as hooks:
            for experts, scores in found.items():
                if experts.startswith(f"{name}."):
                    module = context.architecture.model.get_submodule(experts)
                    hooks.enter_context(scores.watch(module))
            executor.advance_(index, states)
        check_finite(states, f"the output of {name}")
        context.on_step("slice", index + 1, len(names))
    return found


def best_experts(scores: Tensor, n_kept: int, groups: int) -> list[int]:
    """Return the numbers of the experts with the highest scores, as many of every group."""
    size = len(scores) // groups
    best = scores.view(groups, size).topk(n_kept // groups, dim=1).indices  # [groups, kept]
    best = best + size * torch.arange(groups)[:, None]
    return sorted(best.flatten().tolist())


def router_groups(config: Any) -> int:
    """Return the number of groups of experts of which the router first selects some."""
    text = config.get_text_config()
    return max(int(getattr(text, key, None) or 1) for key in GROUPS)


def _least(config: Any, per_token: int) -> int:
    """Return how many experts a layer needs at least.

    The router of a model with groups ranks these by their two best experts, then selects among the
    experts of the best groups.
    """
    groups = router_groups(config)
    if groups == 1:
        return per_token
    selected = int(getattr(config.get_text_config(), "topk_group", None) or 1)
    return groups * max(2, -(-per_token // selected))


def _fits(architecture: Architecture, config: PreTrainedConfig, n_experts: int, kept: int) -> bool:
    """Return whether a config only removes experts, and what the router has for each of them."""
    try:
        new = stored_shapes(skeleton(architecture, config))
    except Exception:  # modeling code may raise anything for unexpected sizes
        return False
    old = stored_shapes(architecture.model)
    removed = tuple(
        f"{name}.{number}." for name in architecture.experts for number in range(kept, n_experts)
    )
    if new.keys() != {name for name in old if not name.startswith(removed)}:
        return False
    changed = {name: shape for name, shape in new.items() if shape != old[name]}
    return all(
        _block(name, architecture.experts) is not None
        and [(a, b) for a, b in zip(old[name], shape, strict=True) if a != b] == [(n_experts, kept)]
        for name, shape in changed.items()
    )


def stored_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of the parameters and buffers of a model by name."""
    return {name: [*tensor.shape] for name, tensor in model.state_dict(keep_vars=True).items()}


def _block(name: str, experts: Iterable[str]) -> str | None:
    """Return the module of experts in whose block, which includes the router, a tensor is."""
    return next((each for each in experts if name.startswith(f"{_parent(each)}.")), None)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def kept_part(
    name: str,
    kept: Mapping[str, Sequence[int]],
    shapes: Mapping[str, list[int]],
    read: Callable[[str], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Yield what is left of a stored parameter, and its new name; nothing of a removed expert.

    Parameters
    ----------
    name : str
        Of the parameter in the original model.
    kept : mapping of str to sequence of int
        Name of a module of experts -> the numbers of those that are kept, in their new order.
    shapes : mapping of str to list of int
        Of the smaller model.
    read : callable
        Returns the parameter.
    """
    experts = _block(name, kept)
    chosen = [] if experts is None else [*kept[experts]]
    if experts is not None and name.startswith(f"{experts}."):
        number, _, leaf = name.removeprefix(f"{experts}.").partition(".")
        if int(number) in chosen:
            yield f"{experts}.{chosen.index(int(number))}.{leaf}", read(name)
        return
    tensor = read(name)
    for dim, (before, after) in enumerate(zip(tensor.shape, shapes[name], strict=True)):
        if before != after:
            tensor = tensor.index_select(dim, torch.tensor(chosen))
    yield name, tensor
