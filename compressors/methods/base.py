"""What planning and execution ask of any method, whatever it makes of a matrix."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lrc.compressors.layers import Sizes
from lrc.compressors.solvers.moments import Moment, Statistics

RANK_FORMS = ["low_rank", "pivoted_low_rank"]


@dataclass(frozen=True)
class Method:
    """One row of the table: what has to be known for it, and who published it."""

    needs: frozenset[str]
    """Fields of `Statistics` that have to be collected."""
    source: str
    options: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    """The method's own keys of the recipe, with the value each has if left out."""

    shared = False
    """Whether weights of several layers can be solved as one stack, see `shared_spectrum`."""
    chooses_schemes = False
    """Whether an allocation may choose integers for the numbers of its forms."""
    has_bias = False
    """Whether a bias makes up for what the factors lose of the mean output."""

    @property
    def whole(self) -> bool:
        """Whether second moments are needed whole: an image through the weight will not do."""
        return False

    @property
    def parts(self) -> tuple["Method", ...]:
        """Methods between which an allocation may choose; most are their only one."""
        return (self,)

    @property
    def forms(self) -> list[str]:
        """Names of the forms that a matrix alone may be given."""
        found = [[p.form] if isinstance(p, CodedMethod) else RANK_FORMS for p in self.parts]
        return [form for forms in found for form in forms]

    def for_form(self, form: str) -> "Method":
        """Return the part that makes a form."""
        return next((p for p in self.parts if form in p.forms), self.parts[0])

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration text has to be read at all."""
        return bool(self.needs)

    def nats_per_token(self, tail_energy: float, n_tokens: int) -> float | None:
        """Predict how much an error raises the mean loss of a token, in nats; None if it cannot.

        Only energies weighted by inputs and gradients are losses. A change E of the weight moves
        the output at token t by ``E x_t``; the second-order change of the summed loss is
        ``1/2 sum_t (g_t^T E x_t)^2`` (empirical Fisher, tokens uncorrelated). Kronecker factoring
        takes ``x`` and ``g`` as independent, so that the sum becomes ``tr(G E H E^T) / n`` with
        the sums G and H; the mean over tokens divides by n once more.
        """
        if not {"inputs", "gradients"} <= self.needs:
            return None
        return 0.5 * tail_energy / n_tokens**2

    def with_defaults(self, statistics: Statistics, options: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the options, once the statistics are found to be there.

        Raises
        ------
        ValueError
            If statistics that the method needs are missing.
        """
        if missing := statistics.missing(self.needs):
            raise ValueError(f"the statistics lack {', '.join(missing)}; the method needs them")
        return {**self.options, **options}


@dataclass(frozen=True)
class Coded:
    """A weight in a form whose sizes were given beforehand, and what it costs in quality."""

    parts: dict[str, Tensor]
    """Arguments of the form's `encode`."""
    energy: float
    """Of the error, under the method's metrics."""
    loss: float
    """Share of the weighted energy of W that is lost, in [0, 1]."""
    fallback: str | None = None


class CodedMethod(Method, ABC):
    """A method that is solved at given sizes, one by one; a spectrum gives every rank at once."""

    form: str
    """Name of the form of its results."""

    @property
    def whole(self) -> bool:
        """The error of such a weight lies outside of what an image through W shows."""
        return True

    def _known(self, statistics: Statistics) -> tuple[Moment | None, Moment | None]:
        """Return the moments of inputs and gradients that belong to the method's metric."""
        return (
            statistics.inputs if "inputs" in self.needs else None,
            statistics.gradients if "gradients" in self.needs else None,
        )

    @abstractmethod
    def solve(self, W: Tensor, statistics: Statistics, sizes: Sizes, **options: Any) -> Coded:
        """Find the best weight of these sizes; W is [d_out, d_in].

        Raises
        ------
        ValueError
            If statistics are missing, or no weight of that shape can have these sizes.
        """

    @abstractmethod
    def energies(
        self, W: Tensor, statistics: Statistics, sizes: Sequence[Sizes], **options: Any
    ) -> tuple[list[float], float]:
        """Return the energy of the error at several sizes, and that of W itself."""

    @abstractmethod
    def work(
        self, d_out: int, d_in: int, sizes: Sequence[Sizes], *, curve: bool, **options: Any
    ) -> int:
        """Count the multiply-adds of `solve` at each of several sizes, or of `energies` at all."""
