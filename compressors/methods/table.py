"""Methods: published names as rows of one table.

Most published systems of low rank differ only in the metric under which the truncated SVD is taken.
Such a method is that metric, made of the weight and its statistics; one solver turns it into a
`Spectrum`, a rate-distortion curve that can be cut at any rank. The others are in `coded`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from lrc.compressors.methods.base import Method
from lrc.compressors.methods.fixed_size import CODED, SUM
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.compressors.solvers.spectrum import Spectrum, energies_only, spectrum


@dataclass(frozen=True)
class Metric:
    """What errors cost: the arguments of `spectrum` beside the weight.

    `mean` [d_in] is the input whose output a bias restores exactly, None without a bias.
    """

    inputs: Moment | None = None
    gradients: Moment | None = None
    damp: float = 0.0
    gradient_damp: float = 0.0
    mean: Tensor | None = None


@dataclass(frozen=True)
class LowRankMethod(Method):
    """A metric, under which one solver takes the truncated SVD."""

    metric: Callable[..., Metric]
    """``metric(W, statistics, **options)``; the first line of its docstring says what it does."""
    shared: bool = field(default=False, kw_only=True)
    has_bias: bool = field(default=False, kw_only=True)

    @property
    def whole(self) -> bool:
        """A shared factor sees several layers, of which an image through one says nothing."""
        return self.shared

    def solve(self, W: Tensor, statistics: Statistics, **options: float) -> Spectrum:
        """Decompose a weight [d_out, d_in].

        Raises
        ------
        ValueError
            If statistics that the method needs are missing.
        TypeError
            If an option is not the method's.
        """
        m = self.metric(W, statistics, **self.with_defaults(statistics, options))
        result = spectrum(W, m.inputs, m.gradients, damp=m.damp, gradient_damp=m.gradient_damp)
        return replace(result, mean=m.mean)

    def energies(self, W: Tensor, statistics: Statistics, **options: float) -> Tensor:
        """Return the energies of `solve` [min(d_out, d_in)] alone; raises the same."""
        m = self.metric(W, statistics, **self.with_defaults(statistics, options))
        return energies_only(W, m.inputs, m.gradients, damp=m.damp, gradient_damp=m.gradient_damp)


class Mixed(Method):
    """Whichever form an allocation finds best for a matrix, by the method that makes it."""

    chooses_schemes = True

    @property
    def whole(self) -> bool:
        """As some of its parts need it."""
        return any(part.whole for part in self.parts)

    @property
    def parts(self) -> tuple[Method, ...]:
        """Return the two-sided methods, one a form."""
        return METHODS["kfac"], METHODS["sparse"], SUM, METHODS["dictionary"]


@dataclass(frozen=True)
class Rounding(Method):
    """A weight as it is, as integers: there is nothing to choose but a scheme."""

    form: str = field(default="integers", kw_only=True)

    @property
    def whole(self) -> bool:
        """What rounding one input costs, others make up for."""
        return bool(self.needs)

    @property
    def forms(self) -> list[str]:
        """Name the one form."""
        return [self.form]


def _plain(W: Tensor, statistics: Statistics) -> Metric:
    """Find the closest matrix of the rank, blind to the data."""
    return Metric()


def _fisher_rows(W: Tensor, statistics: Statistics) -> Metric:
    """Weigh every row by the square root of its summed Fisher information.

    The square of that weight is the metric, so the Fisher information stands in it as it is.
    """
    assert statistics.row_fisher is not None
    return Metric(gradients=Moment.weighted(statistics.row_fisher, W.T))


def _activation_scaled(W: Tensor, statistics: Statistics, *, alpha: float) -> Metric:
    """Scale every column by the mean magnitude of its input to the power alpha."""
    assert statistics.input_magnitude is not None
    magnitude = statistics.input_magnitude.double() / statistics.n_tokens
    return Metric(Moment.weighted(magnitude ** (2 * alpha), W))


def _whitened(W: Tensor, statistics: Statistics, *, damp: float) -> Metric:
    """Minimise the error of the layer's output on the calibration tokens."""
    return Metric(statistics.inputs, damp=damp)


def _output_features(W: Tensor, statistics: Statistics, *, damp: float) -> Metric:
    """Keep the principal components of the output about its mean, which a bias restores.

    The papers take the eigenvectors U of the outputs' covariance and set ``B = U``,
    ``A = U^T W``, ``bias = (I - U U^T) E[y]``: the whitened problem with centred inputs.
    """
    assert statistics.inputs is not None
    assert statistics.input_mean is not None
    total, n_tokens = statistics.input_mean, statistics.n_tokens
    centred = statistics.inputs.centred(total, n_tokens, W)
    return Metric(centred, damp=damp, mean=total.double() / n_tokens)


def _kronecker(W: Tensor, statistics: Statistics, *, damp: float, gradient_damp: float) -> Metric:
    """Minimise the loss to second order, by the Kronecker-factored Fisher matrix."""
    return Metric(statistics.inputs, statistics.gradients, damp, gradient_damp)


# Damping of the inputs: the optimum is unchanged to four digits up to 1e-4 and Cholesky rarely
# needs more than 1e-6. Gradients are noisier: perplexity of SmolLM2-135M at 80 % kept, 131k tokens,
# is 33.6 with 1e-4 to 0.1 and 34.5 with 1; with few tokens much more damping helps.
_DAMP = {"damp": 1e-6}

METHODS: dict[str, Method] = {
    "svd": LowRankMethod(frozenset(), "Eckart and Young 1936", _plain),
    "fwsvd": LowRankMethod(frozenset({"row_fisher"}), "FWSVD, arXiv:2207.00112", _fisher_rows),
    "asvd": LowRankMethod(
        frozenset({"input_magnitude"}),
        "ASVD, arXiv:2312.05821",
        _activation_scaled,
        options={"alpha": 0.5},
    ),
    "svd-llm": LowRankMethod(
        frozenset({"inputs"}), "SVD-LLM, arXiv:2403.07378, section 3.1", _whitened, options=_DAMP
    ),
    "lord": LowRankMethod(
        frozenset({"inputs", "input_mean"}),
        "LoRD, arXiv:2309.14021; atomic feature mimicking, Yu and Wu 2023",
        _output_features,
        options=_DAMP,
        has_bias=True,
    ),
    "kfac": LowRankMethod(
        frozenset({"inputs", "gradients"}),
        "K-FAC, arXiv:1503.05671; as a metric of low-rank compression, arXiv:2505.17974",
        _kronecker,
        options={**_DAMP, "gradient_damp": 0.1},
    ),
    "basis-sharing": LowRankMethod(
        frozenset({"inputs"}),
        "Basis Sharing, arXiv:2410.03765",
        _whitened,
        options=_DAMP,
        shared=True,
    ),
    **CODED,
    "gptq": Rounding(frozenset({"inputs"}), "GPTQ, arXiv:2210.17323"),
    "gqsa": Rounding(frozenset({"inputs"}), "GQSA, arXiv:2412.17560", form="group_sparse"),
    "rtn": Rounding(frozenset(), "rounding to the nearest"),
    "mixed": Mixed(
        frozenset({"inputs", "gradients"}),
        "one Lagrangian over forms; their losses compare, being of one metric",
        options={**_DAMP, "gradient_damp": 0.1, "rounds": 15},
    ),
}
