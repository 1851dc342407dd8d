"""Inputs of experts in two models that give them the same tokens."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from lrc.compressors.calibrate.layer_executor import ForwardEnded, LayerExecutor
from lrc.compressors.calibrate.statistic_table import RunningSums
from lrc.compressors.layers.experts import SplitExperts
from lrc.compressors.solvers.moments import token_weights

ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")
"""Of `SplitExperts.forward`."""


@dataclass
class ExpertInputs:
    """What the experts of a layer receive of a batch."""

    selected: dict[str, Tensor] = field(default_factory=dict)
    """Experts that the router has selected, and their weights, by the names in `ARGUMENTS`."""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Linear -> its inputs [n_tokens, d_in]; without those that received no token."""
    gates: dict[str, Tensor] = field(default_factory=dict)
    """Expert -> weights [n_tokens, 1] of the router."""


def experts_of(model: nn.Module, linear: str) -> str | None:
    """Return the module of all experts of a layer, one of whose linears is given."""
    parent = linear.rpartition(".")[0].rpartition(".")[0]
    return parent if isinstance(model.get_submodule(parent), SplitExperts) else None


def by_matrix(model: nn.Module, groups: list[list[str]]) -> list[list[str]]:
    """Reorder the linears of a layer, grouped by input: the same matrix of all experts in turn.

    Experts do not depend on each other, so that the first matrices of all of them can be measured
    before the second ones.
    """
    of_experts = [group for group in groups if experts_of(model, group[0])]
    if not of_experts:
        return groups
    first = groups.index(of_experts[0])
    expert = model.get_submodule(of_experts[0][0].rpartition(".")[0])
    order = [leaf for leaf, _ in expert.named_children()]
    of_experts.sort(key=lambda group: order.index(group[0].rpartition(".")[2]))
    others = [group for group in groups if group not in of_experts]
    return [*groups[:first], *of_experts, *others[first:]]


def read_inputs(
    executor: LayerExecutor,
    layer: int,
    hidden: Tensor,
    names: Sequence[str],
    selected: Mapping[str, Tensor] | None = None,
) -> ExpertInputs:
    """Apply a resident layer to hidden states [n, length, d_model] up to the end of its experts.

    Parameters
    ----------
    names : sequence of str
        Linears of its experts.
    selected : mapping of str to Tensor, optional
        Of another model, to be used in place of what the router selects.
    """
    model, found = executor.architecture.model, ExpertInputs()
    experts = experts_of(model, names[0])
    assert experts is not None

    def select(
        _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        given = dict(zip(ARGUMENTS[: len(args)], args, strict=True)) | kwargs
        given |= selected or {}
        found.selected = {name: given[name] for name in ARGUMENTS[1:]}
        return (), given

    def end(*_: object) -> None:
        raise ForwardEnded

    with ExitStack() as hooks:
        module = model.get_submodule(experts)
        hooks.enter_context(module.register_forward_pre_hook(select, with_kwargs=True))
        hooks.enter_context(module.register_forward_hook(end))
        for name in names:
            expert = name.rpartition(".")[0]
            see = partial(lambda key, _, args: found.inputs.__setitem__(key, args[0]), name)
            weigh = partial(lambda key, _, args: found.gates.__setitem__(key, args[1]), expert)
            hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(see))
            hooks.enter_context(model.get_submodule(expert).register_forward_pre_hook(weigh))
        with suppress(ForwardEnded):
            executor.apply(layer, hidden)
    return found


def add_moments_(
    sums: RunningSums,
    name: str,
    dense: ExpertInputs,
    compressed: ExpertInputs,
    *,
    d_in: int,
    window: int | None,
    capped: bool,
    gated: bool,
) -> None:
    """Add ``H``, ``cross`` and the number of tokens ``n`` of a linear, zeros if it received none.

    See `PrefixMoments`, and `SequentialCalibration.measure` for `capped` and `gated`.
    """
    device = next(iter(dense.selected.values())).device
    for key in ("H", "cross"):
        sums[f"{name}.{key}"] = torch.zeros(d_in, d_in, device=device)
    sums[f"{name}.n"] = torch.zeros(1, dtype=torch.float64, device=device)
    if name not in dense.inputs:
        return
    x, x_hat = dense.inputs[name], compressed.inputs[name]
    scale = x.new_ones(len(x), 1)
    if capped:
        scale = token_weights(x_hat, window or len(x_hat)).sqrt()
    if gated:
        scale = scale * dense.gates[name.rpartition(".")[0]]
    sums.add_square(f"{name}.H", scale * x_hat)
    sums.add_product(f"{name}.cross", scale * x, scale * x_hat)
    sums[f"{name}.n"] += len(x)
