"""What holds for every component: a new one is covered as soon as it has examples here."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrc.compressors.checkpoint.format import SAFETENSORS_NAMES
from lrc.compressors.checkpoint.quantizer import replace_layers
from lrc.compressors.checkpoint.tensor_checks import check_headers, check_values
from lrc.compressors.io.shards import read_headers
from lrc.compressors.layers import (
    COMPONENTS,
    ComponentConfig,
    Sizes,
    WeightConfig,
    layer_tensors,
    reconstruct,
    sentinel,
)
from lrc.compressors.layers.chain_shape import ChainShape, pattern_for
from lrc.compressors.methods.size_families import components_at, largest_step

D_OUT, D_IN, RANK = 24, 43, 6  # the width fills no whole number of bytes of a mask
EIGHTS = 48  # the width of what is stored in groups of eight
# Always quantized: test_quantize_parts, test_block_sparse, test_compressed_embedding.
QUANTIZED = {"dense", "block_sparse"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest(scores: Tensor, count: int) -> Tensor:
    """Return a mask with the `count` largest entries of every row."""
    where = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, where, True)


# The arguments of `encode`, and the matrix that they represent.
Content = tuple[dict[str, Tensor], Tensor]


def low_rank(rank: int) -> Content:
    B, A = random(D_OUT, rank), random(rank, D_IN, seed=1)
    return {"B": B, "A": A}, B @ A


def sparse(nonzeros: int) -> Content:
    W = random(D_OUT, D_IN)
    mask = largest(W.flatten(), nonzeros).view_as(W)
    return {"W_hat": W * mask, "mask": mask}, W * mask


def semi_structured(n: int) -> Content:
    W = random(D_OUT, EIGHTS)
    mask = largest(W.unflatten(1, (-1, 8)), n).flatten(1)
    return {"W_hat": W * mask, "mask": mask}, W * mask


def dictionary(atoms: int, nonzeros: int) -> Content:
    D, S = random(D_IN, atoms), random(atoms, D_OUT, seed=1)
    mask = largest(S.T, nonzeros).T
    return {"D": D, "S": S * mask, "mask": mask}, (D @ (S * mask)).T


def tensor_train(bond: int) -> Content:
    shape = ChainShape.of(D_OUT, D_IN, pattern_for(D_OUT, D_IN, 2), bond)
    cores = [random(*core, seed=k) for k, core in enumerate(shape.cores)]
    W = torch.einsum("xacb,bdey->adce", *cores).reshape(D_OUT, D_IN)
    return {"core1": cores[0], "core2": cores[1]}, W


CONTENT: dict[str, Callable[..., Content]] = {
    "low_rank": low_rank,
    "pivoted_low_rank": low_rank,
    "sparse": sparse,
    "semi_structured": semi_structured,
    "dictionary": dictionary,
    "tensor_train": tensor_train,
}
RANKS = [{"rank": 1}, {"rank": RANK}, {"rank": D_OUT}]
DICTIONARIES = [
    {"atoms": 1, "nonzeros": 1},
    {"atoms": 13, "nonzeros": 4},
    {"atoms": 35, "nonzeros": 2},  # as a list of indices
    {"atoms": 24, "nonzeros": 24},
]
# Types and whether the first factor is shared -> sizes, the smallest first, a usual one next.
SIZES: dict[tuple[str, bool], list[dict[str, int]]] = {
    ("low_rank", False): RANKS,
    ("low_rank", True): RANKS,
    ("pivoted_low_rank", False): RANKS,
    ("sparse", False): [{"nonzeros": 1}, {"nonzeros": 300}, {"nonzeros": D_OUT * D_IN}],
    ("semi_structured", False): [{"n": 1}, {"n": 5}, {"n": 8}],
    ("pivoted_low_rank+sparse", False): [
        {"rank": 1, "nonzeros": 1},
        {"rank": RANK, "nonzeros": 300},
        {"rank": D_OUT, "nonzeros": D_OUT * D_IN},
    ],
    ("dictionary", False): DICTIONARIES,
    ("dictionary", True): DICTIONARIES,
    ("tensor_train", False): [{"bond": 1}, {"bond": 3}, {"bond": 6}],
}


def pattern_of(kind: str, d_out: int, d_in: int) -> str | None:
    """Return the pattern of a component that needs one."""
    return pattern_for(d_out, d_in, 2) if kind == "tensor_train" else None


@dataclass(frozen=True)
class Example:
    """A sum of components at some sizes."""

    types: str
    sizes: Sizes
    shared: bool = False
    """Whether it uses the first factor of the layer `other`, of the same sizes."""

    def __str__(self) -> str:
        kind = "shared_" * self.shared + self.types
        return "-".join([kind, *map(str, self.sizes.values())])

    @property
    def d_in(self) -> int:
        return EIGHTS if self.types == "semi_structured" else D_IN

    def _content(self, kind: str) -> Content:
        own = {name: self.sizes[name] for name in COMPONENTS[kind].SIZES}
        return CONTENT[kind](**own)

    @property
    def weight(self) -> Tensor:
        return sum(self._content(kind)[1] for kind in self.types.split("+"))  # type: ignore[return-value]

    def config(self, *, bias: bool = False) -> WeightConfig:
        components = tuple(
            ComponentConfig(
                kind,
                {name: self.sizes[name] for name in COMPONENTS[kind].SIZES},
                pattern=pattern_of(kind, D_OUT, self.d_in),
                shares="other" if self.shared else None,
            )
            for kind in self.types.split("+")
        )
        return WeightConfig((D_OUT, self.d_in), components, bias)

    def encoded(self) -> dict[str, Tensor]:
        """Return the tensors that the layer stores itself, by their names within it."""
        found = {"weight": sentinel()}
        for kind in self.types.split("+"):
            tensors = COMPONENTS[kind].encode(**self._content(kind)[0])
            if self.shared:
                del tensors["a.weight"]
            found |= {f"{kind}.{leaf}": tensor for leaf, tensor in tensors.items()}
        return found

    @property
    def other(self) -> "Example":
        return Example(self.types, self.sizes) if self.shared else Example("low_rank", RANKS[1])

    def model(
        self, *, bias: bool = False, own_bias: bool = False, dtype: torch.dtype = torch.float64
    ) -> nn.Module:
        """Load the example and the other layer like a checkpoint.

        The example comes first, before the layer whose factor it may use.
        """
        model = nn.Module()
        model.layer = nn.Linear(self.d_in, D_OUT, bias=bias, dtype=dtype)
        model.other = nn.Linear(D_IN, D_OUT, bias=False, dtype=dtype)
        replace_layers(model, {"layer": self.config(bias=own_bias), "other": self.other.config()})
        state = {f"layer.{leaf}": tensor for leaf, tensor in self.encoded().items()}
        state |= {f"other.{leaf}": tensor for leaf, tensor in self.other.encoded().items()}
        if bias or own_bias:
            state["layer.bias"] = random(D_OUT, seed=2)
        model.load_state_dict(state)
        check_values(model)
        return model


EXAMPLES = [
    Example(types, sizes, shared) for (types, shared), each in SIZES.items() for sizes in each
]


def test_every_component_is_covered() -> None:
    covered = {(kind, shared) for types, shared in SIZES for kind in types.split("+")}
    assert {kind for kind, _ in covered} | QUANTIZED == COMPONENTS.keys()
    can_share = {kind for kind, found in COMPONENTS.items() if found.SHARED_SIZE}
    assert {kind for kind, shared in covered if shared} == can_share


@pytest.fixture(params=EXAMPLES, ids=str)
def example(request: pytest.FixtureRequest) -> Example:
    chosen: Example = request.param
    return chosen


@pytest.fixture(
    params=[Example(types, s[1], shared) for (types, shared), s in SIZES.items()], ids=str
)
def usual(request: pytest.FixtureRequest) -> Example:
    chosen: Example = request.param
    return chosen


@pytest.mark.parametrize("bias", ["none", "of the dense layer", "its own"])
def test_computes_the_product_and_becomes_dense(
    example: Example, bias: str, rounding: Callable[..., float]
) -> None:
    layer = example.model(bias=bias == "of the dense layer", own_bias=bias == "its own").layer
    x = random(3, 5, example.d_in, seed=3)
    expected = x @ example.weight.T + (0 if bias == "none" else random(D_OUT, seed=2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    assert layer(x[:, :0]).shape == (3, 0, D_OUT)
    dense = layer.to_dense()
    assert type(dense) is nn.Linear
    assert dense.weight.dtype == torch.float64
    close = rounding(example.d_in, torch.float32) * float(expected.abs().max())  # through float32
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=close)


def test_stored_tensors_are_reconstructed_to_the_weight_of_the_layer(example: Example) -> None:
    """Without the layer that shares the factor in memory."""
    found = reconstruct(
        example.config(), example.encoded().__getitem__, example.other.encoded().__getitem__
    )
    assert found.dtype == torch.float32
    assert torch.equal(found, example.model().layer.dense_weight())


def test_counted_bits_and_parameters_are_those_of_the_file(
    example: Example, tmp_path: Path
) -> None:
    config, layer = example.config(), example.model(dtype=torch.bfloat16).layer
    save_file(layer.state_dict(), tmp_path / "one.safetensors")
    headers = read_headers([tmp_path / "one.safetensors"])
    content = (tmp_path / "one.safetensors").read_bytes()
    n_bytes = len(content) - 8 - int.from_bytes(content[:8], "little")  # but for the header
    assert n_bytes * 8 == config.stored_bits(16)
    assert sum(p.numel() for p in layer.parameters()) == config.parameters()
    check_headers(layer_tensors(config), [str(tmp_path / "one.safetensors")])
    assert {h.dtype for h in headers.values()} <= {"BF16", "U8", "I16"}


@pytest.mark.parametrize("own_bias", [False, True])
def test_encoded_and_loaded_tensors_are_the_declared_ones(example: Example, own_bias: bool) -> None:
    declared = layer_tensors(example.config(bias=own_bias))
    assert {spec.dtype for spec in declared.values()} <= {None, *SAFETENSORS_NAMES}
    encoded = example.encoded() | ({"bias": random(D_OUT)} if own_bias else {})
    loaded = example.model(own_bias=own_bias, dtype=torch.float16).layer.state_dict()
    for tensors, floating in ((encoded, torch.float64), (loaded, torch.float16)):
        assert {name: ([*t.shape], t.dtype) for name, t in tensors.items()} == {
            name: (spec.shape, spec.dtype or floating) for name, spec in declared.items()
        }


def test_multiply_adds_are_counted_as_torch_counts_them(example: Example) -> None:
    layer = example.model().layer
    with FlopCounterMode(display=False) as counter:
        layer(random(7, example.d_in))
    assert counter.get_total_flops() == 2 * 7 * example.config().multiply_adds()


@pytest.mark.parametrize(("d_out", "d_in"), [(D_OUT, D_IN), (D_IN, D_OUT), (1, 9), (9, 1), (3, 8)])
def test_a_larger_step_stores_more(usual: Example, d_out: int, d_in: int) -> None:
    bits = []
    shared = "other" if usual.shared else None
    pattern = pattern_of(usual.types, d_out, d_in)
    for step in range(1, largest_step(usual.types, d_out, d_in, pattern=pattern) + 1):
        components = tuple(
            replace(c, shares=shared)
            for c in components_at(usual.types, step, d_out, d_in, pattern=pattern)
        )
        for c in components:
            assert c.sizes.keys() == {*COMPONENTS[c.type].SIZES}
        config = WeightConfig((d_out, d_in), components)
        assert WeightConfig.from_json(config.to_json()) == config
        assert config.description
        bits.append(config.stored_bits(16))
    assert bits == sorted({*bits})
    assert bits or (usual.types == "semi_structured" and d_in % 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conversion_leaves_integers_alone(example: Example, dtype: torch.dtype) -> None:
    model = example.model()
    expected = model.layer(random(2, example.d_in, seed=3)).detach()
    before = {n: t.clone() for n, t in model.state_dict().items() if not t.is_floating_point()}
    model.half() if dtype == torch.float16 else model.to(dtype)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
    y = model.layer(random(2, example.d_in, seed=3).to(dtype)).detach()
    assert y.dtype == dtype
    assert model.layer.to_dense().weight.dtype == dtype
    error = float((y.double() - expected).norm() / expected.norm())
    # Measured at most 0.0063, 0.00061 and 2.4e-7.
    assert error <= {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 2e-6}[dtype]


def test_compiles_as_one_graph(example: Example) -> None:
    model = example.model(bias=True)
    torch.compiler.reset()  # all examples share a `forward`, of which torch keeps few graphs
    graph = torch.compile(model.layer, fullgraph=True, backend="eager")
    x = random(2, example.d_in, seed=3)
    torch.testing.assert_close(graph(x), model.layer(x))


def test_gradients_reach_every_parameter(example: Example) -> None:
    model = example.model(bias=True)
    model.layer(random(2, example.d_in)).square().sum().backward()
    for name, parameter in model.layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "file"]
)
def test_a_copied_model_is_independent(
    example: Example, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = example.model()
    x = random(2, example.d_in, seed=3)
    expected = model.layer(x)
    twin = copied(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(twin.layer(x), expected)
    assert not model.layer(x).any()


def test_sizes_are_printed_with_the_model(example: Example) -> None:
    printed = repr(example.model().layer)
    for name, size in example.sizes.items():
        assert f"{name}={size}" in printed
