"""Products of tokens with the experts that they select, without a loop over experts.

A loop launches every kernel once for each expert that receives tokens, which takes longer than the
products if experts are small. Experts of the same form are stacked instead and multiplied together.
"""

from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lrc.compressors.layers.experts import SplitExperts, split_modules
from lrc.compressors.layers.stacked_layers import StackedLayers, form_of

DEVICES = ("cuda",)
"""Types of devices on which experts are stacked; on a CPU, the loop is as fast."""
NUMBERS = 2**26
"""Entries of the matrices that are gathered or dequantized at a time."""
MOST_TOKENS = 64
"""Mean number of tokens of an expert above which a loop is used: products are padded to the largest
number of tokens, and launching them no longer takes long."""

Activation = Callable[[Tensor], Tensor]


class ExpertBatch:
    """Experts whose matrices have the same forms.

    Parameters
    ----------
    experts : SplitExperts
    numbers : list of int
        Of the experts in the batch.
    """

    def __init__(self, experts: SplitExperts, numbers: list[int]) -> None:
        self.numbers = numbers
        members = [experts.get_submodule(str(number)) for number in numbers]
        first, second = zip(*(member.children() for member in members), strict=True)
        self.first, self.second = StackedLayers(first, members), StackedLayers(second)

    def stack(self) -> bool:
        """Stack the matrices of the experts; return whether that was possible."""
        return self.first.stack() and self.second.stack()

    def serves(self, x: Tensor) -> bool:
        """Return whether the experts are as they were when they were stacked, and fit the input."""
        like = self.first.like
        if x.dtype != like.dtype or x.device != like.device:
            return False
        return self.first.unchanged and self.second.unchanged

    @property
    def width(self) -> int:
        """Number of experts whose matrices may be gathered at a time."""
        return max(1, NUMBERS // max(self.first.numbers, self.second.numbers))

    def apply(self, x: Tensor, ids: Tensor, activation: Activation) -> Tensor:
        """Map ``x`` [n, m, d_model], element i by the expert at position ``ids[i]``."""
        return self.second.multiply(activation(self.first.multiply(x, ids)), ids)


class ExpertBatches:
    """The experts of a layer, as many of them stacked as possible.

    Parameters
    ----------
    experts : SplitExperts
    """

    def __init__(self, experts: SplitExperts) -> None:
        self._experts = experts
        self._batches: list[ExpertBatch] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave copies and files without batches: their tensors are separate ones."""
        return type(None), ()

    def stack(self) -> None:
        """Stack the experts, if they are on one of `DEVICES`."""
        self._batches = []
        if next(self._experts.parameters()).device.type not in DEVICES:
            return
        forms: defaultdict[tuple[str | None, ...], list[int]] = defaultdict(list)
        for number in range(self._experts.n_experts):
            expert = self._experts.get_submodule(str(number))
            forms[tuple(form_of(layer) for layer in expert.children())].append(number)
        self._batches = [
            batch
            for form, numbers in forms.items()
            if None not in form and len(numbers) > 1
            for batch in [ExpertBatch(self._experts, numbers)]
            if batch.stack()
        ]

    def __call__(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        activation: Activation,
    ) -> Tensor | None:
        """Return what `SplitExperts` returns; None where its loop must be used.

        That is where gradients are recorded, where the experts have hooks or adapters, and for many
        tokens.
        """
        recording = torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_states.device.type)
        if recording or not all([batch.serves(hidden_states) for batch in self._batches]):
            return None
        slots, n_experts = top_k_index.numel(), self._experts.n_experts
        whole = [batch for batch in self._batches if len(batch.numbers) == n_experts]
        if whole and slots <= whole[0].width:
            products = self._gathered(whole[0], hidden_states, top_k_index, activation)
        elif self._batches:
            found = self._padded(hidden_states, top_k_index, activation)
            if found is None:
                return None
            products = found
        else:
            return None
        weighted = products * top_k_weights.reshape(-1, 1)  # [n_tokens * top_k, d_model]
        result = weighted.view(*top_k_index.shape, -1).sum(dim=1)
        return result.to(hidden_states.dtype)

    def _gathered(
        self, batch: ExpertBatch, x: Tensor, top_k_index: Tensor, activation: Activation
    ) -> Tensor:
        """Multiply each token by the matrices of each of its experts, without waiting for a GPU.

        Returns the outputs [n_tokens * top_k, d_model], without the weights of the router.
        """
        ids = top_k_index.flatten()
        last = len(batch.numbers) - 1
        x = x.repeat_interleave(top_k_index.shape[1], dim=0)[:, None]
        y = batch.apply(x, ids.clamp(max=last), activation)[:, 0]
        return torch.where((ids <= last)[:, None], y, 0)

    def _padded(self, x: Tensor, top_k_index: Tensor, activation: Activation) -> Tensor | None:
        """Do the same with the tokens of each expert, padded to the largest number of tokens."""
        slots, top_k = top_k_index.numel(), top_k_index.shape[1]
        chosen = top_k_index.flatten()
        n_experts = self._experts.n_experts
        counts = chosen.bincount(minlength=n_experts)[:n_experts].tolist()
        hit = [number for number, count in enumerate(counts) if count]
        if slots > MOST_TOKENS * len(hit):
            return None
        starts = [0, *accumulate(counts)]
        order = chosen.argsort(stable=True)  # slots, expert by expert
        result = x.new_zeros(slots + 1, x.shape[1])  # the last row takes what pads
        left = {*hit}
        for batch in self._batches:
            places = {number: place for place, number in enumerate(batch.numbers)}
            used = sorted(left & {*batch.numbers}, key=lambda number: -counts[number])
            left -= {*used}
            for begin in range(0, len(used), batch.width):
                part = used[begin : begin + batch.width]
                most = counts[part[0]]
                facts = [[places[n], starts[n], counts[n]] for n in part]
                ids, first, count = torch.tensor(facts, device=x.device).T
                row = torch.arange(most, device=x.device)
                place = (first[:, None] + row).clamp(max=slots - 1)  # [n_experts, most]
                slot = torch.where(row < count[:, None], order[place], slots)
                tokens = slot.clamp(max=slots - 1) // top_k
                y = batch.apply(x[tokens], ids, activation)
                result.index_copy_(0, slot.flatten(), y.flatten(0, 1))
        for number in sorted(left):
            slot = order[starts[number] : starts[number] + counts[number]]
            expert: nn.Module = self._experts.get_submodule(str(number))
            y = expert(x[slot // top_k], x.new_ones(len(slot), 1), activation)
            result.index_copy_(0, slot, y)
        return result[:slots]


def batch_experts(model: nn.Module) -> None:
    """Let the experts of a model be multiplied together on a GPU.

    Parameters of experts of the same form, such as integers of the same scheme or factors of the
    same rank, are moved into common tensors. Those of Llama 4 receive all tokens and are left out.
    """
    for _, module in split_modules(model):
        if type(module) is SplitExperts:
            module.batches = ExpertBatches(module)
            module.batches.stack()
