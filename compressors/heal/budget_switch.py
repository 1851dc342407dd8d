"""Training for all budgets of an elastic checkpoint at once: a random one in every step.

The first rows and columns of the factors take part in all budgets, the last ones only in the
largest, so that training keeps, or finds, the order in which factors can be cut: ordered dropout
[1]_, with the ranks of the budgets instead of all ranks [2]_.

References
----------
.. [1] S. Horváth et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
   ICML 2024. https://arxiv.org/abs/2308.14929
.. [2] "FlexRank: Nested Low-Rank Knowledge Decomposition for Adaptive Model Deployment", ICML 2026.
   https://arxiv.org/abs/2602.02680
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from lrc.compressors.heal.schedule import batch_rows
from lrc.compressors.layers.low_rank import LowRank

T = TypeVar("T")


class BudgetSwitch:
    """Lets a model compute as it would after a cut to one of its budgets.

    Parameters
    ----------
    model : nn.Module
        With its compressed layers; parameters keep their shapes.
    budgets : sequence of float
        The budgets, the largest first; empty if the model is not elastic.
    """

    def __init__(self, model: nn.Module, budgets: Sequence[float]) -> None:
        modules = (module for module in model.modules() if isinstance(module, LowRank))
        self._components = [each for each in modules if each.config.ranks]
        self.budgets = tuple(budgets) if self._components else ()
        self.used: int | None = None
        """The budget in use, counted from 0; None before the first call of `use`."""

    def use(self, index: int) -> None:
        """Compute with one of the budgets from now on; they are counted from 0."""
        self.used = index
        for component in self._components:
            component.used_rank = component.config.ranks[index]

    def use_for(self, step: int, *, seed: int) -> None:
        """Compute with the budget of a training step: each once in random order, and then again."""
        if self.budgets:
            self.use(int(batch_rows(step, n_windows=len(self.budgets), batch=1, seed=seed)))

    def measure(self, loss: Callable[[], T]) -> list[T]:
        """Return the loss at every budget; one value if the model is not elastic."""
        found = []
        for index in range(max(1, len(self.budgets))):
            self.use(index)
            found.append(loss())
        return found
