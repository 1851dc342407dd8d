"""Tasks: the planned compression of each weight, or of weights that share a factor.

Tasks contain everything that calibration, allocation, compression and reporting need; none of these
reads the recipe. Allocation completes pending configurations. Results are stored separately, see
`LayerResult`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator

from lrc.compressors.layers import COMPONENTS, ComponentConfig, QuantizationArgs, WeightConfig
from lrc.compressors.planning.measures import Measure

ConfigField = Annotated[
    WeightConfig,
    PlainValidator(lambda v: v if isinstance(v, WeightConfig) else WeightConfig.from_json(v)),
    PlainSerializer(lambda c: c.to_json()),
]
ArgsField = Annotated[
    QuantizationArgs,
    PlainValidator(lambda v: v if isinstance(v, QuantizationArgs) else QuantizationArgs.parse(v)),
    PlainSerializer(str),
]


@dataclass(frozen=True)
class Weight:
    """One weight matrix of the model."""

    name: str
    """Full name of the layer, without ``.weight``."""
    layer: int
    """Index of the decoder layer."""


@dataclass(frozen=True)
class Compensation:
    """Options of error compensation, see `refit_target`."""

    mix: float
    residual: float
    damp: float
    routed: bool = False
    """Whether the weight belongs to an expert, and is fitted to the tokens that the router of the
    dense model sends to it."""


@dataclass(frozen=True)
class QuantizationTask:
    """How the numbers of a weight are quantized."""

    stage: int
    """Index of the stage in the recipe."""
    quantizer: Literal["gptq", "rtn"]
    args: ArgsField | None = None
    """None if the allocator of the decompose stage chooses the quantization."""
    act_order: bool = True
    damp: float = 0.01
    balance: Literal["measured", "first", "quarter", "even", "rotated"] = "measured"
    """How singular values are split between two quantized factors, see `lrc.configs.quantize`."""
    correction: Literal["qera", "eora", "lqer"] | None = None
    """Method of the low-rank correction added to a quantized weight; None for no correction."""
    correction_rank: int = 0
    sparsity: float | None = None
    """Fraction of the quantization groups that are removed, in weights without decomposition."""

    def applied_to(self, config: WeightConfig) -> WeightConfig:
        """Return the configuration after quantization."""
        args = self.args
        if args is None:
            return config
        if config.compressed:
            return config.quantized(args)
        if self.sparsity is not None:
            groups = config.shape[0] * args.groups(config.shape[1])
            kept = max(groups - int(self.sparsity * groups), 1)
            found = [ComponentConfig("block_sparse", {"groups": kept}, args)]
        else:
            found = [ComponentConfig("dense", {}, args)]
        if self.correction is not None:
            found.append(ComponentConfig("low_rank", {"rank": self.correction_rank}))
        return replace(config, components=tuple(found))


@dataclass(frozen=True)
class LayerTask:
    """A weight, or several weights that share a first factor, and what will be done to them."""

    weights: tuple[Weight, ...]
    """The first one stores the shared factor, if there is one."""
    config: ConfigField
    """How every weight of the group will be stored; dense while an allocation is pending."""
    number_bits: int
    """Bits of one number in the dtype of the model."""
    stage: int
    """Index of the decompose stage, or of the quantize stage if none decomposes the weight."""
    method: str
    """Key of `METHODS`."""
    types: str = "dense"
    """Component types, joined by ``+``, if the recipe fixes them; an allocation chooses its own."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the method's solver."""
    pattern: str | None = None
    ratio: float = 2.0
    """Number of dictionary atoms over the number of coefficients per output."""
    source_bias: bool = False
    """Whether the layer has a bias in the source model."""
    allocation: int | None = None
    """Index in `Plan.allocations` of the allocation that will choose `config`; None once chosen."""
    estimated_bits: int | None = None
    """Expected size while the allocation is pending."""
    quantize: QuantizationTask | None = None
    compensate: Compensation | None = None
    statistics: tuple[str, ...] = ()
    """What calibration collects for each weight."""
    note: str | None = None
    """Why the weights stay dense."""

    @property
    def name(self) -> str:
        """Name of the first weight, which identifies the task."""
        return self.weights[0].name

    @property
    def layer(self) -> int:
        """Index of the decoder layer of the first weight.

        Intermediate results are saved per decoder layer.
        """
        return self.weights[0].layer

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of each weight."""
        return self.config.shape

    @property
    def stacked_shape(self) -> tuple[int, int]:
        """Shape of the weights stacked along their outputs."""
        return len(self.weights) * self.shape[0], self.shape[1]

    @property
    def pending(self) -> bool:
        """Whether an allocation will choose the configuration."""
        return self.allocation is not None

    @property
    def compressed(self) -> bool:
        """Whether the weights will be stored differently from the source, or may be."""
        return self.pending or self.config.compressed

    @property
    def dense_bits(self) -> int:
        """Size of the dense weights."""
        return len(self.weights) * prod(self.shape) * self.number_bits

    @property
    def bits(self) -> int:
        """Size of the weights as they will be stored; an estimate while pending."""
        return self.bits_of(self.config) if self.estimated_bits is None else self.estimated_bits

    @property
    def parameters(self) -> int:
        """Number of stored numbers; an estimate while pending."""
        if self.estimated_bits is not None:
            args = self.quantize.args if self.quantize else None
            return self.estimated_bits // (self.number_bits if args is None else args.bits)
        added = self._added_biases(self.config)
        return sum(self.config_of(w).parameters() + added for w in self.weights)

    def config_of(self, weight: Weight, config: WeightConfig | None = None) -> WeightConfig:
        """Return the configuration of one weight; all but the first refer to the shared factor."""
        config = self.config if config is None else config
        if weight == self.weights[0]:
            return config
        return replace(
            config,
            components=tuple(
                replace(c, shares=self.name) if COMPONENTS[c.type].SHARED_SIZE else c
                for c in config.components
            ),
        )

    def bits_of(self, config: WeightConfig) -> int:
        """Return the size of the group stored with `config`, including biases that are added."""
        return sum(self.weight_bits(weight, config) for weight in self.weights)

    def weight_bits(self, weight: Weight, config: WeightConfig) -> int:
        """Return the size of one weight stored with `config`, as for `bits_of`."""
        added = self._added_biases(config) * self.number_bits
        return self.config_of(weight, config).stored_bits(self.number_bits) + added

    def _added_biases(self, config: WeightConfig) -> int:
        return self.shape[0] if config.bias and not self.source_bias else 0

    def cost(self, config: WeightConfig, measure: Measure) -> int:
        """Return the cost of the group stored with `config`, in bits, multiply-adds or time.

        A configuration that is not smaller than the dense weights, or not cheaper, costs as much as
        they do, because the weights would be stored dense.
        """
        dense = self.dense_cost(measure)
        if not config.compressed:
            return dense
        bits = [self.weight_bits(weight, config) for weight in self.weights]
        if sum(bits) >= self.dense_bits:
            return dense
        return min(sum(measure.compressed(config, each) for each in bits), dense)

    def dense_cost(self, measure: Measure) -> int:
        """Return the cost of the dense weights."""
        number = len(self.weights)
        return number * measure.dense(self.shape, self.dense_bits // number)

    def with_components(self, components: tuple[ComponentConfig, ...]) -> WeightConfig:
        """Return a configuration of these weights with the given components."""
        bias = self.config.bias and bool(components)
        return replace(self.config, components=components, bias=bias)

    def with_config(self, config: WeightConfig, note: str | None = None) -> "LayerTask":
        """Return the task with its final configuration.

        The quantization that a later stage applies is added to it.
        """
        stored = config if self.quantize is None else self.quantize.applied_to(config)
        return replace(self, config=stored, allocation=None, estimated_bits=None, note=note)

    def kept_dense(self, note: str | None = None) -> "LayerTask":
        """Return the task without decomposition, quantized if a later stage quantizes it."""
        return self.with_config(WeightConfig(self.shape), note)


@dataclass(frozen=True)
class LayerResult:
    """What is known about a task after allocation and, completely, after compression."""

    config: ConfigField
    """How each weight is stored, which a fallback may have changed."""
    relative_error: float | None = None
    """Weighted squared error relative to that of removing the weight: predicted, then measured."""
    predicted_nats: float | None = None
    """Predicted increase of the mean loss of a token, if the method can predict it."""
    refit: bool = False
    """Whether the weight was fitted to the inputs that the compressed model produces."""
    fallback: str | None = None
    """Description of deviations from the plan, such as increased damping."""
    n_tokens: int | tuple[int, ...] | None = None
    """Calibration tokens that an expert received, or each of several; None for other weights."""
