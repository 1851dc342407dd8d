"""Methods that are solved at given sizes: pruning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrc.compressors.decompose.method import Coded, CodedMethod, Sizes
from lrc.compressors.decompose.moments import Statistics
from lrc.compressors.decompose.sparse import Saliency, prune, prune_curve, weighted_energy


@dataclass(frozen=True)
class Pruning(CodedMethod):
    """Keep some entries, chosen by their saliency; under the metrics of what is known."""

    saliency: Saliency = "second-order"

    form = "sparse"
    whole = True

    def solve(self, W: Tensor, statistics: Statistics, sizes: Sizes, **options: Any) -> Coded:
        """Keep ``nonzeros`` entries of the whole matrix."""
        options = self.with_defaults(statistics, options)
        inputs, gradients = statistics.inputs, statistics.gradients
        found = prune(
            W,
            inputs if "inputs" in self.needs else None,
            gradients if "gradients" in self.needs else None,
            nonzeros=sizes["nonzeros"],
            saliency=self.saliency,
            **options,
        )
        parts = {"W_hat": found.W_hat, "mask": found.mask}
        return Coded(parts, found.energy, found.loss, found.fallback)

    def energies(
        self, W: Tensor, statistics: Statistics, sizes: Sequence[Sizes], **options: Any
    ) -> tuple[list[float], float]:
        """Return the energy of the error for several numbers of entries, and that of W itself."""
        options = self.with_defaults(statistics, options)
        inputs, gradients = statistics.inputs, statistics.gradients
        inputs = inputs if "inputs" in self.needs else None
        gradients = gradients if "gradients" in self.needs else None
        budgets = [each["nonzeros"] for each in sizes]
        found = prune_curve(
            W, inputs, gradients, nonzeros=budgets, saliency=self.saliency, **options
        )
        return found, weighted_energy(W, inputs, gradients, **options)


_DAMP = {"damp": 1e-6}

CODED: dict[str, CodedMethod] = {
    "magnitude": Pruning(frozenset(), "magnitude pruning", "magnitude"),
    "wanda": Pruning(frozenset({"inputs"}), "Wanda, arXiv:2306.11695", "wanda", options=_DAMP),
    "sparse": Pruning(
        frozenset({"inputs", "gradients"}),
        "optimal brain surgeon (Hassibi and Stork 1993) under the K-FAC metric",
        options={**_DAMP, "gradient_damp": 0.1},
    ),
}
