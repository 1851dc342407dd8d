"""Methods: published names as rows of one table.

Most published systems differ only in the metric under which the truncated SVD is taken. A method
is that metric, made of the weight and its statistics; one solver turns it into a `Spectrum`, a
rate-distortion curve that can be cut at any rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lrc.compressors.decompose.moments import Moment, Statistics
from lrc.compressors.decompose.spectrum import Spectrum, energies_only, spectrum


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
class Method:
    """One row: how to weigh errors, what has to be known for it, and who published it."""

    metric: Callable[..., Metric]
    """``metric(W, statistics, **options)``; the first line of its docstring says what it does."""
    needs: frozenset[str]
    """Fields of `Statistics` that have to be collected."""
    source: str
    options: Mapping[str, float] = field(default_factory=dict)
    """The method's own keys of the recipe, with the value each has if left out."""
    shared: bool = False
    """Whether weights of several layers are solved as one stack, see `shared_spectrum`."""
    has_bias: bool = False
    """Whether a bias makes up for what the factors lose of the mean output."""

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration text has to be read at all."""
        return bool(self.needs)

    def solve(self, W: Tensor, statistics: Statistics, **options: float) -> Spectrum:
        """Decompose a weight [d_out, d_in].

        Raises
        ------
        ValueError
            If statistics that the method needs are missing.
        TypeError
            If an option is not the method's.
        """
        m = self._metric(W, statistics, options)
        result = spectrum(W, m.inputs, m.gradients, damp=m.damp, gradient_damp=m.gradient_damp)
        return replace(result, mean=m.mean)

    def energies(self, W: Tensor, statistics: Statistics, **options: float) -> Tensor:
        """Return the energies of `solve` [min(d_out, d_in)] alone; raises the same."""
        m = self._metric(W, statistics, options)
        return energies_only(W, m.inputs, m.gradients, damp=m.damp, gradient_damp=m.gradient_damp)

    def nats_per_token(self, tail_energy: float, n_tokens: int) -> float | None:
        """Predict how much a cut raises the mean loss of a token, in nats; None if it cannot.

        Only energies weighted by inputs and gradients are losses. A change E of the weight moves
        the output at token t by ``E x_t``; the second-order change of the summed loss is
        ``1/2 sum_t (g_t^T E x_t)^2`` (empirical Fisher, tokens uncorrelated). Kronecker factoring
        takes ``x`` and ``g`` as independent, so that the sum becomes ``tr(G E H E^T) / n`` with
        the sums G and H; the mean over tokens divides by n once more.
        """
        if not {"inputs", "gradients"} <= self.needs:
            return None
        return 0.5 * tail_energy / n_tokens**2

    def _metric(self, W: Tensor, statistics: Statistics, options: Mapping[str, float]) -> Metric:
        if missing := statistics.missing(self.needs):
            raise ValueError(f"the statistics lack {', '.join(missing)}; the method needs them")
        return self.metric(W, statistics, **{**self.options, **options})


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
    "svd": Method(_plain, frozenset(), "Eckart and Young 1936"),
    "fwsvd": Method(_fisher_rows, frozenset({"row_fisher"}), "FWSVD, arXiv:2207.00112"),
    "asvd": Method(
        _activation_scaled,
        frozenset({"input_magnitude"}),
        "ASVD, arXiv:2312.05821",
        {"alpha": 0.5},
    ),
    "svd-llm": Method(
        _whitened, frozenset({"inputs"}), "SVD-LLM, arXiv:2403.07378, section 3.1", _DAMP
    ),
    "lord": Method(
        _output_features,
        frozenset({"inputs", "input_mean"}),
        "LoRD, arXiv:2309.14021; atomic feature mimicking, Yu and Wu 2023",
        _DAMP,
        has_bias=True,
    ),
    "kfac": Method(
        _kronecker,
        frozenset({"inputs", "gradients"}),
        "K-FAC, arXiv:1503.05671; as a metric of low-rank compression, arXiv:2505.17974",
        {**_DAMP, "gradient_damp": 0.1},
    ),
    "basis-sharing": Method(
        _whitened, frozenset({"inputs"}), "Basis Sharing, arXiv:2410.03765", _DAMP, shared=True
    ),
}
