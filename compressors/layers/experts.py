"""Mixture-of-experts layers whose experts are separate linear layers.

transformers stores the experts of a layer as 3-D parameters, such as `gate_up_proj` [n_experts,
2 * width, d_model] and `down_proj` [n_experts, d_model, width], or transposed. `SplitExperts` takes
the place of such a module. Its matrices are views of the 3-D parameters in ordinary linear layers,
``EXPERT.gate_up_proj`` and ``EXPERT.down_proj``, which can be targeted, observed and replaced like
all others. Routers and shared experts are separate modules and do not change.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MATRICES = ("gate_up_proj", "up_proj", "down_proj")
BIAS = "_bias"
"""Ending of the names of fused biases."""


@dataclass(frozen=True)
class FusedTensor:
    """A parameter that holds one matrix, or one bias, of every expert."""

    leaf: str
    """Its name within the module, such as ``gate_up_proj`` or ``gate_up_proj_bias``."""
    shape: tuple[int, ...]
    transposed: bool
    """Whether a matrix is stored as [d_in, d_out]."""

    def name_of(self, expert: int) -> str:
        """Return the name of the tensor of one expert within `SplitExperts`."""
        kind = "bias" if self.leaf.endswith(BIAS) else "weight"
        return f"{expert}.{self.leaf.removesuffix(BIAS)}.{kind}"

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the parameter for the tensors of all experts."""
        stacked = torch.stack(list(parts))
        return stacked.mT.contiguous() if self.transposed else stacked


class Expert(nn.Module):
    """One expert: a linear layer into its hidden units, and one back."""

    def __init__(self, fused: nn.Module, tensors: Iterable[FusedTensor], number: int) -> None:
        super().__init__()
        for tensor in tensors:
            if tensor.leaf.endswith(BIAS):
                continue
            stored = fused.get_parameter(tensor.leaf)
            weight = stored.detach()[number]
            weight = weight.mT if tensor.transposed else weight
            bias = fused._parameters.get(tensor.leaf + BIAS)
            linear = nn.Linear(
                weight.shape[1], weight.shape[0], bias=bias is not None, device="meta"
            )
            linear.weight = nn.Parameter(weight, requires_grad=stored.requires_grad)
            if bias is not None:
                linear.bias = nn.Parameter(bias.detach()[number], requires_grad=bias.requires_grad)
            self.add_module(tensor.leaf, linear)

    def forward(self, x: Tensor, gates: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Map the tokens of the expert, ``x`` [n_tokens, d_model], to their weighted output.

        `gates` [n_tokens, 1] are the weights of the router, and `activation` maps the output of the
        first linear layer to the input of the second.
        """
        first, second = self.children()
        y: Tensor = second(activation(first(x)))
        return y * gates


class SplitExperts(nn.Module):
    """The experts of a layer as children ``0``, ``1``, ...; calls those that receive tokens.

    Parameters
    ----------
    fused : nn.Module
        A module for which `fused_tensors` returns tensors. It loses its parameters, and is used for
        its activation only. The linear layers of the experts are views of the parameters.
    """

    batches: Any = None
    """Callable with the arguments of `forward` and the activation that returns the same, or None if
    it cannot; its method `stack` is called after tensors have been moved, see `ExpertBatches`."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.tensors = fused_tensors(fused)
        self.n_experts = next(iter(self.tensors)).shape[0]
        for number in range(self.n_experts):
            self.add_module(str(number), Expert(fused, self.tensors, number))
        for tensor in self.tensors:
            fused.register_parameter(tensor.leaf, None)
        # Not a child, so that model classes do not initialize the parameters that it lost.
        vars(self)["fused"] = fused

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of the weighted outputs of the experts that each token selects.

        Parameters
        ----------
        hidden_states : Tensor, shape [n_tokens, d_model]
        top_k_index : Tensor, shape [n_tokens, top_k]
            Numbers of the selected experts; `n_experts` or larger for none.
        top_k_weights : Tensor, shape [n_tokens, top_k]
        """
        activation = self._activation
        if self.batches is not None:
            found: Tensor | None = self.batches(
                hidden_states, top_k_index, top_k_weights, activation
            )
            if found is not None:
                return found
        order = top_k_index.flatten().argsort(stable=True)
        counts = top_k_index.flatten().bincount(minlength=self.n_experts).tolist()
        selected = order // top_k_index.shape[1]  # tokens, expert by expert
        gates = top_k_weights.flatten()[order, None]
        result, start = torch.zeros_like(hidden_states), 0
        for number, count in enumerate(counts[: self.n_experts]):
            if count:
                rows = slice(start, start + count)
                tokens = selected[rows]
                y = self._modules[str(number)](hidden_states[tokens], gates[rows], activation)  # type: ignore[misc]
                result.index_add_(0, tokens, y.to(result.dtype))
            start += count
        return result

    @property
    def _activation(self) -> Callable[[Tensor], Tensor]:
        fused: Any = vars(self)["fused"]
        found: Callable[[Tensor], Tensor] = fused._apply_gate if fused.has_gate else fused.act_fn
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or convert all tensors, and stack them again where they are now."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.batches is not None:
            self.batches.stack()
        return self

    def selected(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> int:
        """Return how many experts a token selects, given the arguments of a call."""
        return top_k_index.shape[1]

    @torch.no_grad()
    def to_fused(self) -> nn.Module:
        """Return the original module with the present matrices, all of which must be dense."""
        fused: nn.Module = vars(self)["fused"]
        for tensor in self.tensors:
            parts = [self.get_parameter(tensor.name_of(e)) for e in range(self.n_experts)]
            trained = parts[0].requires_grad
            parameter = nn.Parameter(tensor.join(parts), requires_grad=trained)
            fused.register_parameter(tensor.leaf, parameter)
        return fused

    def extra_repr(self) -> str:
        """Return the number of experts for `print(model)`."""
        return f"{self.n_experts} experts"


class GroupedExperts(SplitExperts):
    """Experts, as of Llama 4, that receive all tokens, scaled by the router, once per expert."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Return the outputs [n_experts * n_tokens, d_model], expert by expert.

        ``hidden_states`` has the same shape. A token is zero where the router has not selected the
        expert, and so is its output.
        """
        result = torch.zeros_like(hidden_states)
        routed = hidden_states.any(dim=1)
        rows = routed.nonzero().flatten()
        counts = routed.view(self.n_experts, -1).sum(dim=1).tolist()
        for number, tokens in enumerate(rows.split(counts)):
            if len(tokens):
                x = hidden_states[tokens]
                y = self._modules[str(number)](x, x.new_ones(len(x), 1), self._activation)  # type: ignore[misc]
                result = result.index_copy(0, tokens, y)
        return result

    @property
    def _activation(self) -> Callable[[Tensor], Tensor]:
        act: Callable[[Tensor], Tensor] = vars(self)["fused"].act_fn

        def gated(y: Tensor) -> Tensor:
            gate, up = y.chunk(2, dim=-1)
            return up * act(gate)

        return gated

    def selected(self, hidden_states: Tensor) -> int:  # type: ignore[override]
        """Return how many experts a token selects, given the arguments of a call."""
        routed = hidden_states.any(dim=1)
        return int(routed.sum()) * self.n_experts // len(routed)


GROUPED = ("Llama4TextExperts",)
"""Names of classes of experts whose place `GroupedExperts` takes; they store transposed matrices,
but transformers does not dispatch them to other implementations."""


def fused_tensors(module: nn.Module) -> tuple[FusedTensor, ...]:
    """Return the fused tensors of a module of experts; none of any other module.

    These are the modules that transformers dispatches to interchangeable implementations, which
    state their layout, and those of `GROUPED`. Modules with further parameters are left out.
    """
    grouped = type(module).__name__ in GROUPED
    if not grouped and not (hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")):
        return ()
    transposed = grouped or bool(module.is_transposed)
    own: dict[str, Tensor] = dict(module.named_parameters())
    if any(name.removesuffix(BIAS) not in MATRICES for name in own) or "down_proj" not in own:
        return ()
    matrices = [name for name in MATRICES if name in own]
    if len(matrices) != 2 or len({len(tensor) for tensor in own.values()}) != 1:
        return ()
    names = [name for leaf in matrices for name in (leaf, leaf + BIAS) if name in own]
    return tuple(
        FusedTensor(name, tuple(own[name].shape), transposed and own[name].ndim == 3)
        for name in names
    )


def fused_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules of fused experts in a model."""
    return [name for name, module in model.named_modules() if fused_tensors(module)]


def split_experts_(model: nn.Module) -> None:
    """Replace all modules of fused experts in a model by `SplitExperts`."""
    for name in fused_modules(model):
        fused = model.get_submodule(name)
        kind = GroupedExperts if type(fused).__name__ in GROUPED else SplitExperts
        model.set_submodule(name, kind(fused))


def fuse_experts_(model: nn.Module) -> None:
    """Undo `split_experts_`."""
    for name, module in [*split_modules(model)]:
        model.set_submodule(name, module.to_fused())


def ordinary_linears(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that the class of a model has itself."""
    experts = tuple(f"{name}." for name, _ in split_modules(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(experts)
    ]


def split_modules(model: nn.Module) -> Iterator[tuple[str, SplitExperts]]:
    """Yield the name of every `SplitExperts` in a model, and the module."""
    for name, module in model.named_modules():
        if isinstance(module, SplitExperts):
            yield name, module
