"""Gradient descent on trained parameters, with the best result so far."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lrc.compressors.heal.parameters import TrainedParameters
from lrc.compressors.heal.schedule import learning_rate

BETAS = (0.9, 0.95)
LARGEST_NORM = 1.0
SMALLEST_SIZE = 1e-3
"""Root mean square from which on learning rates are relative, so that zeros are trained too."""
PARTS = {"average": "exp_avg", "square": "exp_avg_sq", "step": "step"}
"""Names of AdamW's state in a saved state -> those in torch."""


def is_better(loss: float, best: float) -> bool:
    """Return whether a loss is lower than another one, which may be the first that is finite."""
    return math.isfinite(loss) and not loss >= best


class Descent:
    """AdamW without weight decay; gradients are clipped, and the learning rate follows a schedule.

    The learning rate of a tensor is relative to the root mean square of its values at first, as in
    Adafactor [1]_: stored forms differ in scale by orders of magnitude, and so do models. For the
    weights of SmolLM2-135M (0.19) 5e-4 is 1e-4, for those of a Llama of 8B parameters about 1e-5.

    Parameters
    ----------
    trained : TrainedParameters
    steps : int
        Number of steps in all.
    rate : float
        Highest learning rate, relative.

    References
    ----------
    .. [1] N. Shazeer and M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
       ICML 2018, section 8. https://arxiv.org/abs/1804.04235
    """

    def __init__(self, trained: TrainedParameters, *, steps: int, rate: float) -> None:
        self.trained, self.steps, self._rate = trained, steps, rate
        self.done = 0
        self.losses: list[tuple[int, float]] = []
        """Steps done, and the loss on held-out text with the values as they would be stored."""
        self.skipped = 0
        """Steps without effect, because gradients were not finite."""
        self.best = trained.start
        self.best_step = 0
        self._sizes = [max(trained.scale(name), SMALLEST_SIZE) for name in trained.parameters]
        groups = [{"params": [parameter]} for parameter in trained.parameters.values()]
        self._optimizer = torch.optim.AdamW(groups, lr=rate, betas=BETAS, weight_decay=0.0)

    @property
    def best_loss(self) -> float:
        """The loss of `best`."""
        return dict(self.losses)[self.best_step]

    def update_(self) -> None:
        """Take a step along the accumulated gradients, and clear them."""
        rate = learning_rate(self.done, self.steps, self._rate)
        for group, size in zip(self._optimizer.param_groups, self._sizes, strict=True):
            group["lr"] = rate * size
        norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters.values(), LARGEST_NORM)
        if bool(norm.isfinite()):
            self._optimizer.step()
            self.trained.limit_()
        else:
            self.skipped += 1
        self._optimizer.zero_grad()
        self.done += 1

    def judge(self, loss: float) -> None:
        """Record the loss on held-out text; the values are kept if it is the lowest so far."""
        better = is_better(loss, self.best_loss if self.losses else math.nan)
        self.losses.append((self.done, loss))
        if better:
            self.best, self.best_step = self.trained.rounded(), self.done

    def state_names(self) -> list[str]:
        """Return the names of the tensors in a saved state; averages are absent at first."""
        kinds = ("value", "best", *PARTS)
        return [f"{kind}/{name}" for kind in kinds for name in self.trained.parameters]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and facts from which `resume` continues to the same bytes."""
        tensors = {}
        for name, parameter in self.trained.parameters.items():
            tensors[f"value/{name}"] = parameter.detach()
            tensors[f"best/{name}"] = self.best[name]
            for part, key in PARTS.items():
                if parameter in self._optimizer.state:
                    tensors[f"{part}/{name}"] = self._optimizer.state[parameter][key]
        facts = {
            "done": self.done,
            "losses": self.losses,
            "skipped": self.skipped,
            "best_step": self.best_step,
        }
        return {name: tensor.cpu() for name, tensor in tensors.items()}, facts

    def resume(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        names = self.trained.parameters
        self.trained.set_({name: tensors[f"value/{name}"] for name in names})
        device = next(iter(names.values())).device
        self.best = {name: tensors[f"best/{name}"].to(device) for name in names}
        self.done, self.skipped = facts["done"], facts["skipped"]
        self.best_step = facts["best_step"]
        self.losses = [(step, loss) for step, loss in facts["losses"]]
        for name, parameter in names.items():
            if f"average/{name}" in tensors:
                self._optimizer.state[parameter] = {
                    # torch keeps the number of steps on the CPU.
                    key: tensors[f"{part}/{name}"].to("cpu" if part == "step" else device)
                    for part, key in PARTS.items()
                }
