"""Gradient descent on trained parameters, with the best result so far."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.heal.budget import Budget
from lrc.compressors.heal.parameters import TrainedParameters
from lrc.compressors.heal.schedule import WARM_UP, learning_rate
from lrc.compressors.solvers.cuda_graphs import record_if_possible
from lrc.compressors.solvers.linalg import tensor_cores

BETAS, EPSILON = (0.9, 0.95), 1e-8
LARGEST_NORM = 1.0
SMALLEST_SIZE = 1e-3
"""Root mean square from which on learning rates are relative, so that zeros are trained too."""
LOWER = 1 / 3
"""Factor of the learning rate after a restart."""


def is_better(loss: float, best: float) -> bool:
    """Return whether a loss is lower than another one, which may be the first that is finite."""
    return math.isfinite(loss) and not loss >= best


class Descent:
    """Adam; gradients are clipped, and the rate follows a schedule.

    As long as no step was better than the untrained values, a measurement that is worse after the
    rate has reached its highest value shows that it is too high: training starts again with a lower
    one, for the steps that are left.

    The learning rate of a tensor is relative to the root mean square of its values at first, as in
    Adafactor [1]_: stored forms differ in scale by orders of magnitude, and so do models. For the
    weights of SmolLM2-135M (0.19) 1e-3 is 2e-4, for those of a Llama of 8B parameters about 2e-5.
    Parameters with coordinates, see `factor_coordinates`, are trained in these.

    Parameters
    ----------
    trained : TrainedParameters
    budget : Budget
    rate : float
        Highest learning rate, relative, until a restart.
    pool : optional
        Memory that recordings share, see `torch.cuda.graph_pool_handle`. Without it, updates are
        not recorded: a recording keeps the memory that an update needs.

    References
    ----------
    .. [1] N. Shazeer and M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
       ICML 2018, section 8. https://arxiv.org/abs/1804.04235
    """

    def __init__(
        self, trained: TrainedParameters, *, budget: Budget, rate: float, pool: Any = None
    ) -> None:
        self.trained, self.budget, self._pool = trained, budget, pool
        self.done = 0
        self.rates = [(0, rate)]
        """Steps done at every start, and the learning rate from then on."""
        self.losses: list[tuple[int, float]] = []
        """Steps done, and the loss on held-out text with the values as they would be stored."""
        self.skipped = 0
        """Steps without effect, because gradients were not finite."""
        self._updates = 0  # since the last start
        self.best = trained.start
        self.best_step = 0
        self._sizes = [max(trained.scale(name), SMALLEST_SIZE) for name in trained.parameters]
        self._parameters = [*trained.parameters.values()]
        self._coordinates = [trained.coordinates.get(name) for name in trained.parameters]
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)  # stays, as recorded steps add to it
        self._averages = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._squares = [torch.zeros_like(parameter) for parameter in self._parameters]
        first = self._parameters[0]
        self._factors = torch.zeros(3, dtype=first.dtype, device=first.device)
        self._repeat: Callable[[], object] | None = None
        """The recorded `_move_`."""

    @property
    def steps(self) -> int:
        """Number of steps in all, as far as it is known."""
        return self.budget.total(self.done)

    @property
    def is_judged(self) -> bool:
        """Whether the loss on held-out text is due."""
        return self.budget.is_judged(self.done)

    @property
    def best_loss(self) -> float:
        """The loss of `best`."""
        return dict(self.losses)[self.best_step]

    def update_(self) -> None:
        """Take a step along the accumulated gradients, and clear them."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, LARGEST_NORM)
        if bool(norm.isfinite()):
            self._updates += 1
            self._factors.copy_(torch.tensor(self._next_factors(), dtype=torch.float64))
            if self._pool is None:
                self._move_()
            elif self._repeat is None:
                self._repeat = record_if_possible(self._move_, self._factors.device, self._pool)
            else:
                self._repeat()
        else:
            self.skipped += 1
        gradients: Any = [parameter.grad for parameter in self._parameters]
        torch._foreach_zero_(gradients)
        self.done += 1
        self.budget.advance()

    def _next_factors(self) -> list[float]:
        """Return the learning rate, and the factors that correct the averages of few steps."""
        start, highest = self.rates[-1]
        rate = learning_rate(self.done - start, self.steps - start, highest)
        first, second = (1 - beta**self._updates for beta in BETAS)
        return [-rate, first, math.sqrt(second)]

    @torch.no_grad()
    def _move_(self) -> None:
        """Move all parameters along their gradients."""
        found: Any = [parameter.grad for parameter in self._parameters]
        rate, *corrections = self._factors
        with tensor_cores(self._factors.device):  # for the products of coordinates
            gradients = [
                gradient if coordinates is None else coordinates.of_gradient(gradient)
                for gradient, coordinates in zip(found, self._coordinates, strict=True)
            ]
            updates = self._adam(gradients, *corrections)
            torch._foreach_mul_(updates, self._sizes)
            torch._foreach_mul_(updates, rate)
            changes = [
                update if coordinates is None else coordinates.of_parameter(update)
                for update, coordinates in zip(updates, self._coordinates, strict=True)
            ]
        torch._foreach_add_(self._parameters, changes)
        self.trained.limit_()

    def _adam(self, gradients: Any, of_average: Tensor, of_root: Tensor) -> Any:
        """Return Adam's updates by a few operations; torch's optimizer needs some for each rate."""
        first, second = BETAS
        torch._foreach_lerp_(self._averages, gradients, 1 - first)
        torch._foreach_mul_(self._squares, second)
        torch._foreach_addcmul_(self._squares, gradients, gradients, value=1 - second)
        roots = torch._foreach_sqrt(self._squares)
        torch._foreach_div_(roots, of_root)
        torch._foreach_add_(roots, EPSILON)
        torch._foreach_mul_(roots, of_average)
        torch._foreach_reciprocal_(roots)
        torch._foreach_mul_(roots, self._averages)
        return roots

    def judge(self, loss: float) -> None:
        """Record the loss on held-out text; the values are kept if it is the lowest so far."""
        better = is_better(loss, self.best_loss if self.losses else math.nan)
        self.losses.append((self.done, loss))
        if better:
            self.best, self.best_step = self.trained.rounded(), self.done
        elif self.best_step == 0 and self._rises_no_more and self.done < self.steps:
            self._restart_()

    @property
    def _rises_no_more(self) -> bool:
        """Whether the learning rate has reached its highest value since the last start."""
        return self.done - self.rates[-1][0] >= WARM_UP

    def _restart_(self) -> None:
        """Return to the values at the start, and train with a lower rate from here on."""
        self.trained.set_(self.trained.start)
        self.rates.append((self.done, LOWER * self.rates[-1][1]))
        self._updates = 0
        for tensor in [*self._averages, *self._squares]:
            tensor.zero_()

    def state_names(self) -> list[str]:
        """Return the names of the tensors in a saved state."""
        kinds = ("value", "best", "average", "square")
        return [f"{kind}/{name}" for kind in kinds for name in self.trained.parameters]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and facts from which `resume` continues to the same bytes."""
        tensors = {}
        for index, (name, parameter) in enumerate(self.trained.parameters.items()):
            tensors[f"value/{name}"] = parameter.detach()
            tensors[f"best/{name}"] = self.best[name]
            tensors[f"average/{name}"] = self._averages[index]
            tensors[f"square/{name}"] = self._squares[index]
        facts = {
            "done": self.done,
            "losses": self.losses,
            "skipped": self.skipped,
            "rates": self.rates,
            "updates": self._updates,
            "best_step": self.best_step,
            "budget": self.budget.state(),
        }
        return {name: tensor.cpu() for name, tensor in tensors.items()}, facts

    def resume(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        names = self.trained.parameters
        self.trained.set_({name: tensors[f"value/{name}"] for name in names})
        device = next(iter(names.values())).device
        self.best = {name: tensors[f"best/{name}"].to(device) for name in names}
        self.done, self.skipped = facts["done"], facts["skipped"]
        self.best_step, self._updates = facts["best_step"], facts["updates"]
        self.rates = [(step, rate) for step, rate in facts["rates"]]
        self.budget.resume(facts["budget"])
        self.losses = [(step, loss) for step, loss in facts["losses"]]
        for index, name in enumerate(names):
            self._averages[index].copy_(tensors[f"average/{name}"])
            self._squares[index].copy_(tensors[f"square/{name}"])
