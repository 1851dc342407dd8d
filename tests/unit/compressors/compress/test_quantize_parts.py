"""Every component quantized: what is stored, what it represents, and what overflows."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.format import expected_tensors
from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.checkpoint.tensor_checks import check_values
from lrc.compressors.compress.group import WeightGroup
from lrc.compressors.compress.quantize_parts import quantize_parts, quantize_whole
from lrc.compressors.compress.solve import compress_group
from lrc.compressors.layers import (
    COMPONENTS,
    ComponentConfig,
    CompressedLinear,
    QuantizationArgs,
    WeightConfig,
    layer_tensors,
    reconstruct,
    sentinel,
)
from lrc.compressors.layers.packed_weight import PackedLinear
from lrc.compressors.layers.packing import read_values
from lrc.compressors.planning.tasks import LayerTask, QuantizationTask, Weight
from lrc.compressors.solvers.moments import Moment, Statistics
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.configs.errors import ModelError

D_OUT, D_IN, RANK = 48, 64, 16
SCHEMES = ["int8", "int4-g16", "int3-g8-asymmetric", "int5"]
SIZES: dict[str, dict[str, int]] = {
    "low_rank": {"rank": RANK},
    "pivoted_low_rank": {"rank": RANK},
    "sparse": {"nonzeros": 900},
    "semi_structured": {"n": 5},
    "pivoted_low_rank+sparse": {"rank": RANK, "nonzeros": 500},
    "dictionary": {"atoms": 32, "nonzeros": 8},
    "tensor_train": {"bond": RANK},
    "dense": {},
    "dense+low_rank": {"rank": 3},
}
PATTERNS = {"tensor_train": "12x4,16x4"}
WHOLE = ("dense", "dense+low_rank")


@dataclass(frozen=True)
class Example:
    """A sum of components, whose first factor may be shared."""

    types: str
    shared: bool = False

    def __str__(self) -> str:
        return "shared_" * self.shared + self.types

    def config(self, scheme: str | None) -> WeightConfig:
        """Return the configuration; a low-rank correction of dense weights is not quantized."""
        args = None if scheme is None else QuantizationArgs.parse(scheme)
        components = tuple(
            ComponentConfig(
                kind,
                {name: SIZES[self.types][name] for name in COMPONENTS[kind].SIZES},
                None if self.types == "dense+low_rank" and kind == "low_rank" else args,
                PATTERNS.get(kind),
                shares="other" if self.shared else None,
            )
            for kind in self.types.split("+")
        )
        return WeightConfig((D_OUT, D_IN), components)

    @property
    def owner(self) -> "Example":
        return replace(self, shared=False)


EXAMPLES = [
    *map(Example, SIZES),
    *(
        Example(kind, shared=True)
        for kind in SIZES
        if "+" not in kind and COMPONENTS[kind].SHARED_SIZE
    ),
]


def test_every_component_is_covered() -> None:
    covered = {kind for types in SIZES for kind in types.split("+")}
    assert covered | {"block_sparse"} == COMPONENTS.keys()  # which has tests of its own
    can_share = {kind for kind, found in COMPONENTS.items() if found.SHARED_SIZE}
    assert {each.types for each in EXAMPLES if each.shared} == can_share


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def largest(scores: Tensor, count: int) -> Tensor:
    where = scores.abs().topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, where, True)


def contents(example: Example) -> list[dict[str, Tensor]]:
    """Return the arguments of `encode` for every component."""
    sizes, found = SIZES[example.types], []
    for kind in example.types.split("+"):
        if kind == "dictionary":
            D, S = random(D_IN, sizes["atoms"]), random(sizes["atoms"], D_OUT, seed=1)
            mask = largest(S.T, sizes["nonzeros"]).T
            found.append({"D": D, "S": S * mask, "mask": mask})
        elif kind == "sparse":
            W = random(D_OUT, D_IN, seed=2)
            mask = largest(W.flatten(), sizes["nonzeros"]).view_as(W)
            found.append({"W_hat": W * mask, "mask": mask})
        elif kind == "semi_structured":
            W = random(D_OUT, D_IN, seed=2)
            mask = largest(W.unflatten(1, (-1, 8)), sizes["n"]).flatten(1)
            found.append({"W_hat": W * mask, "mask": mask})
        elif kind == "tensor_train":
            first, second = random(1, 12, 16, RANK), random(RANK, 4, 4, 1, seed=1)
            found.append({"core1": first, "core2": second})
        else:
            found.append({"B": random(D_OUT, RANK), "A": random(RANK, D_IN, seed=1)})
    return found


def encoded(example: Example) -> list[dict[str, Tensor]]:
    """Return the unquantized tensors of every component; none if the weight is whole."""
    if example.types in WHOLE:
        return []
    kinds = example.types.split("+")
    return [COMPONENTS[kind].encode(**c) for kind, c in zip(kinds, contents(example), strict=True)]


def named(example: Example, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors of components by their names within the layer."""
    return {
        f"{kind}.{leaf}": tensor
        for kind, tensors in zip(example.types.split("+"), parts, strict=True)
        for leaf, tensor in tensors.items()
    }


def group_of(
    config: WeightConfig, W: Tensor, dtype: torch.dtype, H: Tensor | None = None, **how: object
) -> WeightGroup:
    quantize = QuantizationTask(
        0, "rtn", config.quantization, **{"balance": "even", "correction": "qera", **how}
    )  # type: ignore[arg-type]
    task = LayerTask((Weight("layer", 0),), config, 16, 0, "rtn", config.types, quantize=quantize)
    known = Statistics() if H is None else Statistics(1, Moment.of(H))
    return WeightGroup(task, [W], [known], dtype)


def quantized(
    example: Example, scheme: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the tensors that the layer stores itself, each rounded to nearest separately."""
    config, parts = example.config(scheme), encoded(example)
    group = group_of(config, random(D_OUT, D_IN), dtype)
    found = quantize_parts(group, 0, config, parts) if parts else quantize_whole(group, 0, config)
    own = config.tensors()
    return {
        name: t.to(dtype) if t.is_floating_point() else t
        for name, t in named(example, found.tensors).items()
        if name in own
    }


each_example = pytest.mark.parametrize("example", EXAMPLES, ids=str)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@each_example
@each_scheme
def test_quantized_tensors_are_those_declared_and_loaded(example: Example, scheme: str) -> None:
    config = example.config(scheme)
    assert WeightConfig.from_json(config.to_json()) == config
    declared = layer_tensors(config)
    found = {"weight": sentinel(), **quantized(example, scheme, torch.bfloat16)}
    assert {name: ([*t.shape], t.dtype) for name, t in found.items()} == {
        name: (spec.shape, spec.dtype or torch.bfloat16) for name, spec in declared.items()
    }
    layer = CompressedLinear(config, dtype=torch.bfloat16)
    assert layer.state_dict().keys() == found.keys()
    layer.load_state_dict(found)
    assert not layer.problems()
    assert expected_tensors("m", config, bias=False).keys() == {f"m.{n}" for n in found}


@each_example
@each_scheme
def test_counted_bits_are_those_of_the_file(example: Example, scheme: str) -> None:
    found = {"weight": sentinel(), **quantized(example, scheme, torch.bfloat16)}
    stored = sum(t.numel() * t.element_size() * 8 for t in found.values())
    assert stored == example.config(scheme).stored_bits(16)


def assert_near(number: Tensor, exact: Tensor, step: Tensor, args: QuantizationArgs) -> None:
    """Demand half a step, and a step where a number may lie beyond the end of the range."""
    end = (number / step).abs() >= args.highest - 0.5
    end = end if args.symmetric else torch.ones_like(end)
    assert bool(((number - exact).abs() <= step * torch.where(end, 1.01, 0.501)).all())


@each_example
@each_scheme
def test_every_number_is_within_half_a_step_of_the_unquantized_one(
    example: Example, scheme: str
) -> None:
    args, found = QuantizationArgs.parse(scheme), quantized(example, scheme)
    parts = encoded(example)
    tensors = named(example, parts) if parts else {"dense.weight": random(D_OUT, D_IN)}
    checked = 0
    for leaf, exact in tensors.items():
        if not exact.is_floating_point() or f"{leaf}_scale" not in found:
            continue
        step, number = found[f"{leaf}_scale"].abs().double(), represented(leaf, found, exact, args)
        if leaf.endswith("values"):
            each = step.repeat_interleave(args.group_size or 128)[: exact.numel()].view_as(exact)
            assert_near(number, exact, each, QuantizationArgs(args.bits))
        else:
            each = step.repeat_interleave(exact.shape[1] // step.shape[1], 1)
            assert_near(number, exact, each, args)
        checked += 1
    assert checked == sum(name.endswith("_scale") for name in found) > 0


def represented(
    leaf: str, found: dict[str, Tensor], exact: Tensor, args: QuantizationArgs
) -> Tensor:
    """Return the numbers that the integers of one tensor represent."""
    if leaf.endswith("values"):
        packed, scale = found[f"{leaf}_packed"], found[f"{leaf}_scale"]
        return read_values(packed, scale.double(), exact.numel(), args).view_as(exact)
    rows, columns = exact.shape
    module = PackedLinear(columns, rows, args, dtype=torch.float32)
    names = [name for name in found if name.startswith(f"{leaf}_")]
    stem = leaf.removesuffix("weight")
    module.load_state_dict({name.removeprefix(stem): found[name] for name in names})
    return module.weight.detach().double()


@each_scheme
def test_a_low_rank_correction_reduces_the_error_of_quantization(scheme: str) -> None:
    W, errors = random(D_OUT, D_IN), []
    for example in map(Example, WHOLE):
        W_hat = reconstruct(example.config(scheme), quantized(example, scheme).__getitem__)
        errors.append(float((W_hat - W).norm()))
    assert errors[1] < errors[0]


@each_example
@each_scheme
def test_the_layer_computes_its_product_and_becomes_dense(
    example: Example, scheme: str, rounding: Callable[..., float]
) -> None:
    model = nn.Module()
    model.layer, model.other = nn.Linear(D_IN, D_OUT), nn.Linear(D_IN, D_OUT, bias=False)
    config, modules = example.config(scheme), {"layer": example.config(scheme)}
    own, lent = quantized(example, scheme), {}
    bias = torch.linspace(-1, 1, D_OUT)
    state = {f"layer.{name}": tensor for name, tensor in own.items()}
    state |= {"layer.weight": sentinel(), "layer.bias": bias}
    if example.shared:
        modules["other"], lent = example.owner.config(scheme), quantized(example.owner, scheme)
        state |= {f"other.{name}": tensor for name, tensor in lent.items()}
        state["other.weight"] = sentinel()
    else:
        state["other.weight"] = model.other.weight.detach()
    replace_layers(model, modules)
    model.load_state_dict(state)
    check_values(model)
    x = random(3, 5, D_IN, seed=3).float()
    W_hat = reconstruct(config, own.__getitem__, lent.__getitem__)
    expected = x @ W_hat.T + bias
    close = rounding(D_IN + RANK, torch.float32) * float(expected.abs().max())
    torch.testing.assert_close(model.layer(x), expected, rtol=0, atol=close)
    dense = model.layer.to_dense()
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=close)
    assert scheme in repr(model.layer)


def test_scales_of_whole_weights_that_overflow_are_reported_by_the_name_of_the_layer() -> None:
    config = Example("dense").config("int4-g16")
    group = group_of(config, random(D_OUT, D_IN) * 1e8, torch.float16)
    words = r"layer \[48, 64\]: cannot be quantized to int4-g16: scales"
    with pytest.raises(ModelError, match=words) as caught:
        compress_group(group)
    assert caught.value.code == "scale-overflow"


@pytest.mark.parametrize("balance", ["measured", "first"])
def test_scales_of_factors_that_overflow_are_an_error(balance: str) -> None:
    factors = {"B": random(D_OUT, RANK) * 1e6, "A": random(RANK, D_IN) * 1e6}
    H = torch.eye(D_IN, dtype=torch.float64)
    config = Example("low_rank").config("int4")
    group = group_of(config, random(D_OUT, D_IN) * 1e8, torch.float16, H, balance=balance)
    with pytest.raises(ScaleOverflow, match="overflow"):
        quantize_parts(group, 0, config, [COMPONENTS["low_rank"].encode(**factors)])
