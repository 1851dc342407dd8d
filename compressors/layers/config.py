"""Configuration of a compressed weight: the record that plans, config.json and reports share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

from lrc.compressors.layers.block_sparse import BlockSparse
from lrc.compressors.layers.component import Component, ComponentConfig
from lrc.compressors.layers.dense import Dense
from lrc.compressors.layers.dictionary import Dictionary
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.pivoted_low_rank import PivotedLowRank
from lrc.compressors.layers.quantization_args import QuantizationArgs, TensorSpecs
from lrc.compressors.layers.semi_structured import SemiStructured
from lrc.compressors.layers.sparse import Sparse
from lrc.compressors.layers.tensor_train import TensorTrain

COMPONENTS: dict[str, type[Component]] = {
    kind.TYPE: kind
    for kind in (
        Dense,
        LowRank,
        PivotedLowRank,
        Sparse,
        SemiStructured,
        BlockSparse,
        Dictionary,
        TensorTrain,
    )
}
SENTINEL_BITS = 8
"""Every compressed weight stores one byte under the name of the dense weight."""


@dataclass(frozen=True)
class WeightConfig:
    """A weight as the sum of components; without components it is the dense source weight."""

    shape: tuple[int, int]
    """``(d_out, d_in)``"""
    components: tuple[ComponentConfig, ...] = ()
    bias: bool = False
    """Whether the compressed layer has its own bias, in addition to or instead of the source's."""

    @property
    def compressed(self) -> bool:
        """Whether the weight is stored in another way than in the source."""
        return bool(self.components)

    @property
    def types(self) -> str:
        """Component types joined by ``+``; ``dense`` for the source weight."""
        return "+".join(c.type for c in self.components) or "dense"

    @property
    def description(self) -> str:
        """Sizes of all components as tables show them."""
        found = [COMPONENTS[c.type].describe(*self.shape, c) for c in self.components]
        return ", ".join(filter(None, found))

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of all components; the rank is that of their sum."""
        found: dict[str, int] = {}
        for component in self.components:
            for name, size in component.sizes.items():
                found[name] = found.get(name, 0) + size
        return found

    @property
    def quantization(self) -> QuantizationArgs | None:
        """Parameters of the first quantized component."""
        return next((c.quantization for c in self.components if c.quantization), None)

    @property
    def plain_integers(self) -> bool:
        """Whether this is one dense matrix of symmetric integers, without an own bias."""
        args = self.quantization
        return self.types == "dense" and args is not None and args.symmetric and not self.bias

    @property
    def shares(self) -> str | None:
        """Name of the layer whose first factor this one uses."""
        return next((c.shares for c in self.components if c.shares), None)

    def quantized(self, args: QuantizationArgs | None) -> "WeightConfig":
        """Return the configuration with all components quantized."""
        return replace(self, components=tuple(c.with_quantization(args) for c in self.components))

    @property
    def elastic(self) -> bool:
        """Whether the weight has ranks for several budgets."""
        return any(c.ranks for c in self.components)

    def at_budget(self, index: int) -> "WeightConfig":
        """Return the configuration after a cut to one of the budgets, which are counted from 0."""
        kept = (c.at_budget(index) for c in self.components if not c.ranks or c.ranks[index])
        return replace(self, components=tuple(kept))

    def tensors(self) -> TensorSpecs:
        """Return the stored tensors by their names within the layer, without sentinel and bias.

        Raises
        ------
        ValueError
            If no weight of that shape can have this configuration.
        """
        return {
            f"{c.type}.{name}": spec
            for c in self.components
            for name, spec in stored_tensors(*self.shape, c).items()
        }

    def stored_bits(self, number_bits: int) -> int:
        """Return the size in the file, without a bias; `number_bits` is that of the model's dtype.

        Raises
        ------
        ValueError
            As `tensors`.
        """
        if not self.components:
            return prod(self.shape) * number_bits
        return SENTINEL_BITS + sum(
            _bits(c.type, *self.shape, number_bits, _key(c)) for c in self.components
        )

    def parameters(self) -> int:
        """Return how many numbers are stored, without indices, masks and scales."""
        if not self.components:
            return prod(self.shape)
        return sum(
            prod(spec.shape)
            for c in self.components
            for spec in COMPONENTS[c.type].tensors(*self.shape, c).values()
            if spec.role != "index"
        )

    def multiply_adds(self) -> int:
        """Return the multiplications with a weight per token."""
        if not self.components:
            return prod(self.shape)
        return sum(COMPONENTS[c.type].multiply_adds(*self.shape, c) for c in self.components)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, the inverse of `from_json`."""
        record: dict[str, Any] = {
            "shape": list(self.shape),
            "components": [c.to_json() for c in self.components],
        }
        return record | ({"bias": True} if self.bias else {})

    @classmethod
    def from_json(cls, record: Any) -> "WeightConfig":
        """Read the JSON values of `to_json` and check that they are consistent.

        Raises
        ------
        ValueError
            With what must be there and what was found.
        """
        found = _expect(record, dict, "a mapping with 'shape' and 'components'")
        unknown = found.keys() - {"shape", "components", "bias"}
        if unknown:
            raise ValueError(f"has the unknown key {min(unknown)!r}")
        shape = found.get("shape")
        if not isinstance(shape, list) or [type(n) for n in shape] != [int, int] or min(shape) < 1:
            raise ValueError(f"'shape' must be [d_out, d_in], got {shape!r:.60}")
        listed = _expect(found.get("components"), list, "a list 'components'")
        components = tuple(_component(each, alone=len(listed) == 1) for each in listed)
        if len({c.type for c in components}) < len(components):
            raise ValueError("the types of 'components' must differ")
        bias = _expect(found.get("bias", False), bool, "true or false as 'bias'")
        config = cls((shape[0], shape[1]), components, bias)
        config.tensors()
        return config


def stored_tensors(d_out: int, d_in: int, component: ComponentConfig) -> TensorSpecs:
    """Return the tensors of one component as the file holds them.

    Raises
    ------
    ValueError
        If no weight of that shape can have this configuration.
    """
    specs = COMPONENTS[component.type].tensors(d_out, d_in, component)
    if component.quantization is None:
        return specs
    return component.quantization.quantized_specs(specs)


def _component(record: Any, *, alone: bool) -> ComponentConfig:
    found = _expect(record, dict, "components that are mappings with a 'type'")
    got = found.get("type")
    kind = COMPONENTS.get(got) if isinstance(got, str) else None
    if kind is None:
        raise ValueError(f"'type' must be one of {', '.join(COMPONENTS)}, got {got!r:.60}")
    known = {"type", *kind.SIZES, "quantization", "pattern", "shares"}
    unknown = found.keys() - known - ({"ranks"} if kind is LowRank else set())
    if unknown:
        raise ValueError(f"a {kind.TYPE} component has no {min(unknown)!r}")
    for name in kind.SIZES:
        size = found.get(name)
        if type(size) is not int or size < 1:
            raise ValueError(f"{name!r} must be a whole number >= 1, got {size!r:.60}")
    args = found.get("quantization")
    if kind is Dense and args is None:
        raise ValueError("a dense component must have a 'quantization', such as int8")
    pattern, shares = found.get("pattern"), found.get("shares")
    if pattern is not None and not (isinstance(pattern, str) and kind.allows(pattern)):
        allowed = " or ".join(kind.PATTERNS) or "left out"
        raise ValueError(f"'pattern' of {kind.TYPE} must be {allowed}, got {pattern!r:.60}")
    if shares is not None and (kind.SHARED_SIZE is None or not isinstance(shares, str)):
        raise ValueError(f"'shares' must name a layer of type low_rank or dictionary, got {shares}")
    try:
        parsed = None if args is None else QuantizationArgs.parse(str(args))
    except ValueError as error:
        raise ValueError(f"'quantization' {error}") from None
    sizes = {name: found[name] for name in kind.SIZES}
    component = ComponentConfig(kind.TYPE, sizes, parsed, pattern, shares)
    return component if "ranks" not in found else _with_ranks(component, found["ranks"], alone)


def _with_ranks(component: ComponentConfig, ranks: Any, alone: bool) -> ComponentConfig:
    args = component.quantization
    if component.shares or (args is not None and (args.group_size or not args.symmetric)):
        raise ValueError(
            "'ranks' must be left out next to 'shares', and next to a 'quantization' with groups "
            "or zero points"
        )
    least = 1 if alone else 0
    whole = isinstance(ranks, list) and all(type(rank) is int and rank >= least for rank in ranks)
    if not whole or ranks[:1] != [component.sizes["rank"]] or sorted(ranks)[::-1] != ranks:
        raise ValueError(
            f"'ranks' must be whole numbers >= {least} that start with the rank "
            f"{component.sizes['rank']} and do not increase, got {ranks!r:.60}"
        )
    return replace(component, ranks=tuple(ranks))


def _expect(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"must have {what}, got {value!r:.60}")
    return value


Key = tuple[tuple[tuple[str, int], ...], QuantizationArgs | None, str | None, bool]


def _key(component: ComponentConfig) -> Key:
    """Return what determines the size of a component besides type and shape."""
    sizes = tuple(component.sizes.items())
    return sizes, component.quantization, component.pattern, component.shares is not None


@cache  # allocation needs the size of every candidate, and many weights have the same shape
def _bits(kind: str, d_out: int, d_in: int, number_bits: int, key: Key) -> int:
    sizes, args, pattern, shared = key
    component = ComponentConfig(kind, dict(sizes), args, pattern, "owner" if shared else None)
    specs = stored_tensors(d_out, d_in, component).values()
    return sum(prod(s.shape) * (s.dtype.itemsize * 8 if s.dtype else number_bits) for s in specs)


Modules = Mapping[str, WeightConfig]
"""Full name of a layer -> configuration of its weight."""
