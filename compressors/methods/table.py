"""Methods: published names as rows of one table.

Most published low-rank methods differ only in the metric under which the truncated SVD is taken.
Such a method is that metric, computed from the weight and its statistics; one solver turns it into
a `Spectrum`, a rate-distortion curve that can be cut at any rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lrc.compressors.methods.base import LOW_RANK_TYPES, Method
from lrc.compressors.methods.chains import TensorTrain
from lrc.compressors.methods.fixed_size import FIXED_SIZE, LOW_RANK_PLUS_SPARSE
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.compressors.solvers.spectrum import Spectrum, energies_only, spectrum


@dataclass(frozen=True)
class Metric:
    """Weighting of errors: the arguments of `spectrum` besides the weight.

    `mean` [d_in] is the input whose output a bias restores exactly; None without a bias.
    """

    inputs: Moment | None = None
    gradients: Moment | None = None
    damp: float = 0.0
    gradient_damp: float = 0.0
    mean: Tensor | None = None


@dataclass(frozen=True)
class LowRankMethod(Method):
    """A metric under which one solver computes the truncated SVD."""

    metric: Callable[..., Metric]
    """``metric(W, statistics, **options)``"""
    types: tuple[str, ...] = field(default=LOW_RANK_TYPES, kw_only=True)

    def solve(self, W: Tensor, statistics: Statistics, **options: float) -> Spectrum:
        """Decompose a weight [d_out, d_in].

        Raises
        ------
        ValueError
            If statistics that the method needs are missing.
        TypeError
            If an option is missing or unknown.
        """
        self.check(statistics)
        m = self.metric(W, statistics, **options)
        result = spectrum(W, m.inputs, m.gradients, damp=m.damp, gradient_damp=m.gradient_damp)
        return replace(result, mean=m.mean)

    def energies(self, W: Tensor, statistics: Statistics, **options: float) -> Tensor:
        """Return the squared singular values of `solve` [min(d_out, d_in)] only."""
        self.check(statistics)
        m = self.metric(W, statistics, **options)
        return energies_only(W, m.inputs, m.gradients, damp=m.damp, gradient_damp=m.gradient_damp)


class Mixed(Method):
    """For every weight the components that an allocator finds best."""

    chooses_quantization = True
    full_moments = True

    @property
    def parts(self) -> Mapping[str, Method]:
        """The two-sided method for every sum of components."""
        methods = METHODS["kfac"], METHODS["sparse"], LOW_RANK_PLUS_SPARSE, METHODS["dictionary"]
        return {types: method for method in methods for types in method.types}


class Quantization(Method):
    """The weight itself as integers, whole or with groups removed."""


def _plain(W: Tensor, statistics: Statistics) -> Metric:
    """Weight all entries equally."""
    return Metric()


def _fisher_rows(W: Tensor, statistics: Statistics) -> Metric:
    """Weight every row by the square root of its summed Fisher information.

    The metric is the square of that weight: the Fisher information itself.
    """
    assert statistics.row_fisher is not None
    return Metric(gradients=Moment.weighted(statistics.row_fisher, W.T))


def _activation_scaled(W: Tensor, statistics: Statistics, *, alpha: float) -> Metric:
    """Weight every column by the mean magnitude of its input to the power alpha."""
    assert statistics.input_magnitude is not None
    magnitude = statistics.input_magnitude.double() / statistics.n_tokens
    return Metric(Moment.weighted(magnitude ** (2 * alpha), W))


def _whitened(W: Tensor, statistics: Statistics, *, damp: float) -> Metric:
    """Weight by the inputs: the error of the layer's output on the calibration tokens."""
    return Metric(statistics.inputs, damp=damp)


def _output_features(W: Tensor, statistics: Statistics, *, damp: float) -> Metric:
    """Weight by the centred inputs; a bias restores the mean output.

    The papers take the eigenvectors U of the outputs' covariance and set ``B = U``,
    ``A = U^T W``, ``bias = (I - U U^T) E[y]``: the whitened problem with centred inputs.
    """
    assert statistics.inputs is not None
    assert statistics.input_mean is not None
    total, n_tokens = statistics.input_mean, statistics.n_tokens
    centred = statistics.inputs.centred(total, n_tokens, W)
    return Metric(centred, damp=damp, mean=total.double() / n_tokens)


def _kronecker(W: Tensor, statistics: Statistics, *, damp: float, gradient_damp: float) -> Metric:
    """Weight by the Kronecker-factored Fisher matrix: the loss to second order."""
    return Metric(statistics.inputs, statistics.gradients, damp, gradient_damp)


METHODS: dict[str, Method] = {
    "svd": LowRankMethod(frozenset(), "Eckart and Young 1936", _plain),
    "fwsvd": LowRankMethod(frozenset({"row_fisher"}), "FWSVD, arXiv:2207.00112", _fisher_rows),
    "asvd": LowRankMethod(
        frozenset({"input_magnitude"}),
        "ASVD, arXiv:2312.05821",
        _activation_scaled,
        options=("alpha",),
    ),
    "svd-llm": LowRankMethod(
        frozenset({"inputs"}),
        "SVD-LLM, arXiv:2403.07378, section 3.1",
        _whitened,
        options=("damp",),
    ),
    "lord": LowRankMethod(
        frozenset({"inputs", "input_mean"}),
        "LoRD, arXiv:2309.14021; atomic feature mimicking, Yu and Wu 2023",
        _output_features,
        options=("damp",),
        has_bias=True,
    ),
    "kfac": LowRankMethod(
        frozenset({"inputs", "gradients"}),
        "K-FAC, arXiv:1503.05671; as a metric of low-rank compression, arXiv:2505.17974",
        _kronecker,
        options=("damp", "gradient_damp"),
    ),
    "basis-sharing": LowRankMethod(
        frozenset({"inputs"}),
        "Basis Sharing, arXiv:2410.03765",
        _whitened,
        options=("damp",),
        shares_factors=True,
    ),
    **FIXED_SIZE,
    "tensor-train": TensorTrain(
        frozenset({"inputs", "gradients"}),
        "CompactifAI, arXiv:2401.14109; TT-SVD (Oseledets 2011) and alternating least squares "
        "under the K-FAC metric",
    ),
    "gptq": Quantization(frozenset({"inputs"}), "GPTQ, arXiv:2210.17323"),
    "gqsa": Quantization(frozenset({"inputs"}), "GQSA, arXiv:2412.17560", types=("block_sparse",)),
    "rtn": Quantization(frozenset(), "rounding to nearest"),
    "mixed": Mixed(
        frozenset({"inputs", "gradients"}),
        "one Lagrangian over components, whose losses are comparable under one metric",
        options=("damp", "gradient_damp", "rounds"),
        types=(
            *LOW_RANK_TYPES,
            "sparse",
            "semi_structured",
            "pivoted_low_rank+sparse",
            "dictionary",
        ),
    ),
}
