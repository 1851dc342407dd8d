"""Tasks: how each group of weights is compressed.

A task is complete: calibration, allocation, compression, saving and reporting read tasks, never the
recipe. Results are stored separately, see `LayerResult`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator

from lrc.compressors.layers import COMPONENTS, ComponentConfig, QuantizationArgs, WeightConfig

Measure = Literal["bits", "macs"]
MEASURE_NAMES: dict[Measure, str] = {"bits": "bits", "macs": "multiply-adds"}

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


@dataclass(frozen=True)
class QuantizationTask:
    """How the numbers of a weight are quantized."""

    stage: int
    """Index of the stage in the recipe."""
    quantizer: Literal["gptq", "rtn"]
    args: ArgsField | None = None
    """None if the allocator of the decomposition chooses them."""
    act_order: bool = True
    damp: float = 0.01
    balance: Literal["measured", "first", "quarter", "even", "rotated"] = "measured"
    correction: Literal["qera", "eora", "lqer"] | None = None
    """Metric of a low-rank correction of dense weights; None for no correction."""
    correction_rank: int = 0
    sparsity: float | None = None
    """Fraction of the groups of dense weights that are removed."""

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
    """The first one stores the shared factor."""
    config: ConfigField
    """How every weight of the group will be stored; dense while an allocation is pending."""
    number_bits: int
    """Bits of one number in the dtype of the model."""
    stage: int
    """Index of the stage in the recipe that decomposes, or else quantizes."""
    method: str
    """Key of `METHODS`."""
    types: str = "dense"
    """Component types that the method produces when sizes are given, joined by ``+``."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the method's solver."""
    pattern: str | None = None
    ratio: float = 2.0
    """Atoms per coefficient of dictionaries."""
    source_bias: bool = False
    """Whether the layer has a bias in the source model."""
    allocation: int | None = None
    """Index in `Plan.allocations` of the allocation that is going to choose `config`."""
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
        """Decoder layer in whose file the results of the whole group are stored."""
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
        """Whether an allocation is going to choose the configuration."""
        return self.allocation is not None

    @property
    def compressed(self) -> bool:
        """Whether the weights will be stored in another way than in the source."""
        return self.pending or self.config.compressed

    @property
    def source_bits(self) -> int:
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
        added = self.shape[0] if self.config.bias and not self.source_bias else 0
        return sum(self.config_of(w).parameters() + added for w in self.weights)

    def config_of(self, weight: Weight, config: WeightConfig | None = None) -> WeightConfig:
        """Return the configuration of one weight, which may use the factor of the first one."""
        config = self.config if config is None else config
        if weight == self.weights[0]:
            return config
        return replace(
            config,
            components=tuple(
                replace(c, shares=self.name) if COMPONENTS[c.type].CAN_SHARE else c
                for c in config.components
            ),
        )

    def bits_of(self, config: WeightConfig) -> int:
        """Return the size of the group stored with `config`, with a bias that the source lacks."""
        return sum(self.weight_bits(weight, config) for weight in self.weights)

    def weight_bits(self, weight: Weight, config: WeightConfig) -> int:
        """Return the size of one weight stored with `config`, as for `bits_of`."""
        added = self.shape[0] * self.number_bits if config.bias and not self.source_bias else 0
        return self.config_of(weight, config).stored_bits(self.number_bits) + added

    def cost(self, config: WeightConfig, measure: Measure) -> int:
        """Return the cost of storing or multiplying by the group with `config`.

        Where a configuration enlarges the file, that is the cost of the dense weights.
        """
        bits = self.bits_of(config)
        if bits >= self.source_bits:
            return self.dense_cost(measure)
        return bits if measure == "bits" else len(self.weights) * config.multiply_adds()

    def dense_cost(self, measure: Measure) -> int:
        """Return the cost of the dense weights."""
        return self.source_bits if measure == "bits" else len(self.weights) * prod(self.shape)

    def with_components(self, components: tuple[ComponentConfig, ...]) -> WeightConfig:
        """Return a configuration of these weights with the given components."""
        bias = self.config.bias and bool(components)
        return replace(self.config, components=components, bias=bias)

    def decided(self, config: WeightConfig, note: str | None = None) -> "LayerTask":
        """Return the task with a configuration, which a later stage may quantize."""
        stored = config if self.quantize is None else self.quantize.applied_to(config)
        return replace(self, config=stored, allocation=None, estimated_bits=None, note=note)

    def dense(self, note: str | None = None) -> "LayerTask":
        """Return the task with dense weights, which a later stage may quantize."""
        return self.decided(WeightConfig(self.shape), note)


@dataclass(frozen=True)
class LayerResult:
    """What is known about a task after allocation and, completely, after compression."""

    config: ConfigField
    """How each weight is stored, which a fallback may have changed."""
    loss: float | None = None
    """Predicted: weighted squared error relative to that of removing the weight."""
    predicted_nats: float | None = None
    """Predicted increase of the mean loss of a token, if the method can predict it."""
    refit: bool = False
    """Whether the weight was fitted to the inputs that the compressed model produces."""
    fallback: str | None = None
    """Deviations from the plan."""
