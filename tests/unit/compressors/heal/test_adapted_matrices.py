"""Adapters and the matrices that absorb them."""

from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lrc.compressors.heal.adapted_integers import IntegerMatrix
from lrc.compressors.heal.adapted_parameters import AdaptedParameters
from lrc.compressors.heal.adapter_kinds import adaptable, kronecker_sites
from lrc.compressors.heal.adapters import Adapter, KroneckerAdapter, LowRankAdapter, SliceAdapter
from lrc.compressors.layers import COMPONENTS, ComponentConfig, CompressedLinear, WeightConfig
from lrc.compressors.layers.packing import encode_matrix
from lrc.compressors.layers.quantization_args import QuantizationArgs

SHAPE = (12, 8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fill(adapter: Adapter, size: float = 0.3) -> Adapter:
    """Give an adapter random numbers."""
    with torch.no_grad():
        for number, parameter in enumerate(adapter.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(number + 1)) * size)
    return adapter


def low_rank(shape: tuple[int, int] = SHAPE, size: float = 0.5) -> Adapter:
    return LowRankAdapter(shape, rank=3, size=size, generator=seeded())


def some_rows() -> Adapter:
    return SliceAdapter(SHAPE, dim=0, places=torch.tensor([1, 7, 8]), size=0.5)


def some_columns() -> Adapter:
    return SliceAdapter(SHAPE, dim=1, places=torch.tensor([0, 5]), size=0.5)


def kronecker() -> KroneckerAdapter:
    A = KroneckerAdapter.new_terms(4, seeded(1), torch.device("cpu"))
    return KroneckerAdapter(SHAPE, A=A, rank=2, size=0.5, generator=seeded())


ADAPTERS = {
    "low rank": low_rank,
    "rows": some_rows,
    "columns": some_columns,
    "Kronecker": kronecker,
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_product_is_that_with_the_difference(name: str) -> None:
    adapter = ADAPTERS[name]().double()
    x, y = torch.randn(2, 5, 8).double(), torch.randn(2, 5, 12).double()
    assert torch.equal(adapter(x, y), y)  # all start at zero
    assert not adapter.delta().any()
    fill(adapter)
    torch.testing.assert_close(adapter(x, y), y + x @ adapter.delta().T, rtol=1e-10, atol=1e-12)
    assert {*adapter.scales()} == {leaf for leaf, _ in adapter.named_parameters()}


def test_a_low_rank_adapter_has_its_rank_and_size() -> None:
    adapter = LowRankAdapter((400, 300), rank=3, size=0.5, generator=seeded())
    with torch.no_grad():
        adapter.B.normal_(generator=seeded(1))
    delta = adapter.delta().detach()
    assert int(torch.linalg.matrix_rank(delta)) == 3
    assert float(delta.square().mean().sqrt()) == pytest.approx(0.5, rel=0.15)
    assert sum(p.numel() for p in adapter.parameters()) == 3 * 700
    # A thin factor cannot have more.
    assert LowRankAdapter((400, 2), rank=3, size=1.0, generator=seeded()).A.shape == (2, 2)


def test_the_difference_is_a_sum_of_kronecker_products() -> None:
    adapter = kronecker()
    fill(adapter, 1.0)
    A, s, t = adapter.A, adapter.s, adapter.t
    assert (A.shape, s.shape, t.shape) == ((4, 4, 4), (4, 3, 2), (4, 2, 2))
    expected = 0.5 * sum(torch.kron(A[i], s[i] @ t[i]) for i in range(4))
    torch.testing.assert_close(adapter.delta(), expected)
    # It can have any rank, unlike LoRA with as many numbers.
    assert int(torch.linalg.matrix_rank(adapter.delta().detach())) == 8


def test_one_term_of_full_rank_is_any_matrix() -> None:
    """The small factor is then a number."""
    A = nn.Parameter(torch.ones(1, 1, 1))
    adapter = KroneckerAdapter(SHAPE, A=A, rank=8, size=1.0, generator=seeded())
    target = torch.randn(SHAPE, generator=seeded(2))
    with torch.no_grad():
        adapter.t.copy_(torch.eye(8)[None])
        adapter.s.copy_(target[None])
    torch.testing.assert_close(adapter.delta(), target)


def test_shared_factors_are_trained_once() -> None:
    root = nn.ModuleDict({"a": nn.Linear(8, 12), "b": nn.Linear(8, 12), "odd": nn.Linear(8, 10)})
    for share, count in ((True, 1), (False, 2)):
        options = SimpleNamespace(terms=4, adapter_rank=2, share=share)
        sites = kronecker_sites(root, adaptable(root), options)
        assert {*sites} == {"a.weight", "b.weight"}
        generator = seeded()
        matrices = {name: site.matrix for name, site in sites.items()}
        adapters = {name: site.make(generator) for name, site in sites.items()}
        dtypes = dict.fromkeys(sites, torch.float32)
        trained = AdaptedParameters(matrices, adapters, dtypes)
        assert trained.count == count * 4**3 + 2 * 2 * (12 + 8)


def component(kind: str) -> CompressedLinear:
    sizes = {"low_rank": {"rank": 4}, "pivoted_low_rank": {"rank": 4}, "sparse": {"nonzeros": 40}}
    sizes |= {"semi_structured": {"n": 3}, "dictionary": {"atoms": 6, "nonzeros": 3}, "dense": {}}
    args = QuantizationArgs(4, 4, symmetric=False) if kind == "dense" else None
    config = WeightConfig(SHAPE, (ComponentConfig(kind, sizes[kind], args),))
    layer = CompressedLinear(config)
    W = torch.randn(SHAPE, generator=seeded(3))
    A, B = torch.randn(4, 8, generator=seeded(4)), torch.randn(12, 4, generator=seeded(5))
    if kind in ("low_rank", "pivoted_low_rank"):
        tensors = COMPONENTS[kind].encode(B=B, A=A)
    elif kind == "dense":
        codes = torch.randint(-8, 8, SHAPE, generator=seeded(6))
        zero = torch.randint(-2, 3, (12, 2), generator=seeded(7))
        scale = torch.rand(12, 2, generator=seeded(8)) + 0.1
        assert args is not None
        tensors = encode_matrix("weight", codes, scale, zero, args)
    elif kind == "dictionary":
        mask = torch.zeros(6, 12, dtype=torch.bool)
        for column in range(12):
            mask[torch.randperm(6, generator=seeded(column))[:3], column] = True
        S = torch.randn(6, 12, generator=seeded(9)) * mask
        tensors = COMPONENTS[kind].encode(D=torch.randn(8, 6, generator=seeded(2)), S=S, mask=mask)
    else:
        count = 40 if kind == "sparse" else 36
        order = W.abs().flatten().argsort(descending=True)
        if kind == "semi_structured":  # three of the eight numbers of a row
            top = W.abs().topk(3, dim=1).indices
            mask = torch.zeros(SHAPE, dtype=torch.bool).scatter(1, top, True)
        else:
            mask = torch.zeros(96, dtype=torch.bool).index_fill(0, order[:count], True).view(SHAPE)
        tensors = COMPONENTS[kind].encode(W_hat=W, mask=mask)
    layer.load_state_dict(
        {"weight": layer.weight, **{f"{kind}.{name}": t for name, t in tensors.items()}}
    )
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    "kind", ["low_rank", "pivoted_low_rank", "sparse", "semi_structured", "dictionary", "dense"]
)
def test_merging_computes_the_same_as_the_adapters(kind: str) -> None:
    layer = component(kind)
    x = torch.randn(3, 8, generator=seeded(10))
    before, state = layer(x), {k: v.clone() for k, v in layer.state_dict().items()}
    matrices = adaptable(layer)
    assert matrices
    adapters = {name: low_rank(each.shape, each.size) for name, each in matrices.items()}
    dtypes = dict.fromkeys(matrices, torch.float32) | dict.fromkeys(
        (name for name, each in matrices.items() if isinstance(each, IntegerMatrix)), torch.int32
    )
    trained = AdaptedParameters(matrices, adapters, dtypes)
    torch.testing.assert_close(layer(x), before)
    layer(x).sum().backward()  # A has a gradient of zero, because B is zero
    assert all(p.grad is not None for p in trained.parameters.values())
    for adapter in adapters.values():
        fill(adapter)
    found = layer(x)
    assert not torch.allclose(found, before)
    with torch.no_grad(), trained.as_stored():
        torch.testing.assert_close(layer(x), found)
    torch.testing.assert_close(layer(x), found)
    stored = trained.encoded(trained.rounded())
    torch.testing.assert_close(layer(x), found)
    after = layer.state_dict()
    assert {*stored} == {name for name in after if not torch.equal(after[name], state[name])}
    assert all(torch.equal(stored[name], after[name]) for name in stored)
    assert not layer.problems()
    torch.testing.assert_close(x @ layer.dense_weight().T, found, rtol=1e-4, atol=1e-5)


class ReadTensors(TorchDispatchMode):
    """Records the tensors that operations read and that existed before."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = MappingProxyType({})
    ) -> Any:
        for tensor in tree_flatten((args, dict(kwargs)))[0]:
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in self._made:
                self.found[tensor.data_ptr()] = tensor
        out = func(*args, **kwargs)
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in self.found:
                self._made[tensor.data_ptr()] = tensor  # kept, so that no address occurs twice
        return out


@pytest.mark.parametrize(
    "kind", ["low_rank", "pivoted_low_rank", "sparse", "semi_structured", "dictionary", "dense"]
)
def test_measurements_leave_the_tensors_of_a_step_at_their_addresses(kind: str) -> None:
    """A recorded step, which is repeated after measurements, reads them there."""
    layer = component(kind)
    matrices = adaptable(layer)
    adapters = {name: low_rank(each.shape, each.size) for name, each in matrices.items()}
    dtypes = dict.fromkeys(matrices, torch.float32)
    trained = AdaptedParameters(matrices, adapters, dtypes)
    for parameter in trained.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(3, 8, generator=seeded(10))
    layer(x)  # as before a recording: what a first step derives is kept
    reads = []
    for _ in range(2):
        with ReadTensors() as read:
            layer(x).sum().backward()
        reads.append(read)
        with torch.no_grad(), trained.as_stored():
            layer(x)
    assert len(reads[0].found) > 3
    assert {*reads[0].found} == {*reads[1].found}


def test_rounding_to_16_bits_is_seen_by_as_stored() -> None:
    linear = nn.Linear(8, 12, bias=False).requires_grad_(False)
    before = linear.weight.clone()
    matrices = adaptable(nn.ModuleDict({"a": linear}))
    (name,) = matrices
    assert name == "a.weight"
    adapter = fill(low_rank())
    trained = AdaptedParameters(matrices, {name: adapter}, {name: torch.bfloat16})
    expected: Tensor = (before + adapter.delta()).bfloat16().float()
    x = torch.eye(8)
    with torch.no_grad(), trained.as_stored():
        assert torch.equal(linear(x).T, expected)
    assert torch.equal(linear.weight, before)
    assert trained.count == 3 * (12 + 8)


def test_the_gradient_of_rounded_integers_is_that_without_rounding() -> None:
    layer = component("dense")
    matrices = adaptable(layer)
    (name,) = matrices
    adapter = low_rank()
    with torch.no_grad():
        adapter.get_parameter("B").normal_(generator=seeded(1)).mul_(1e-3)
    AdaptedParameters(matrices, {name: adapter}, {name: torch.int32})
    x = torch.randn(5, 8, generator=seeded(11))
    layer(x).square().sum().backward()
    ours = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    adapter.zero_grad()
    # Codes at the end of their range move inwards only.
    codes = layer.get_submodule("dense").codes()  # type: ignore[operator]
    scale = layer.get_submodule("dense").get_parameter("weight_scale")
    steps = codes + adapter.delta() / scale.repeat_interleave(4, dim=1)
    inside = ((steps >= -8) & (steps <= 7)).detach()
    W = layer.dense_weight()
    y = x @ (W + (adapter.delta() - adapter.delta().detach()) * inside).T
    y.square().sum().backward()
    theirs = [p.grad for p in adapter.parameters()]
    assert len(ours) == 2
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
