"""What holds for every form: a new one is covered here as soon as it has its examples."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrc.compressors.checkpoint.format import STORED, check_modules
from lrc.compressors.checkpoint.quantizer import check_headers, swap_in_forms
from lrc.compressors.io.shards import read_headers
from lrc.compressors.layers import FORMS, MEMBERS, Form
from lrc.configs.errors import CheckpointError

D_OUT, D_IN, RANK = 24, 43, 6  # the width fills no whole number of bytes of a mask
# Always packed: test_integers, test_embedded.
INTEGERS = {"integers", "integers_plus_low_rank", "group_sparse", "embedded_integers"}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest(scores: Tensor, count: int) -> Tensor:
    """Return a mask with the `count` largest entries of every row."""
    where = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, where, True)


# What `encode` takes, and the weight that it stands for.
Content = tuple[tuple[Tensor, ...], Tensor]


def product(rank: int) -> Content:
    B, A = random(D_OUT, rank), random(rank, D_IN, seed=1)
    return (B, A), B @ A


def sparse(nonzeros: int) -> Content:
    W = random(D_OUT, D_IN)
    mask = largest(W.flatten(), nonzeros).view_as(W)
    return (W * mask, mask), W * mask


def low_rank_plus_sparse(rank: int, nonzeros: int) -> Content:
    (B, A), low = product(rank)
    (M, mask), entries = sparse(nonzeros)
    return (B, A, M, mask), low + entries


def dictionary(atoms: int, nonzeros: int) -> Content:
    D, S = random(D_IN, atoms), random(atoms, D_OUT, seed=1)
    mask = largest(S.T, nonzeros).T
    return (D, S * mask, mask), (D @ (S * mask)).T


@dataclass(frozen=True)
class Kind:
    """How to make examples of a form, and of which sizes: the smallest first, a usual one next."""

    make: Callable[..., Content]
    sizes: list[dict[str, int]]
    extra: dict[str, Any]
    """What a spec holds beside; `other` is a layer that can lend, of the same sizes."""


RANKS = [{"rank": 1}, {"rank": RANK}, {"rank": D_OUT}]
DICTIONARIES = [
    {"atoms": 1, "nonzeros": 1},
    {"atoms": 13, "nonzeros": 4},
    {"atoms": 35, "nonzeros": 2},  # as a list of indices
    {"atoms": 24, "nonzeros": 24},
]
KINDS = {
    "low_rank": Kind(product, RANKS, {}),
    "pivoted_low_rank": Kind(product, RANKS, {}),
    "shared_low_rank": Kind(product, RANKS, {"shares": "other"}),
    "sparse": Kind(
        sparse, [{"nonzeros": 1}, {"nonzeros": 300}, {"nonzeros": D_OUT * D_IN}], {"d_in": D_IN}
    ),
    "low_rank_plus_sparse": Kind(
        low_rank_plus_sparse,
        [
            {"rank": 1, "nonzeros": 1},
            {"rank": RANK, "nonzeros": 300},
            {"rank": D_OUT, "nonzeros": D_OUT * D_IN},
        ],
        {},
    ),
    "dictionary": Kind(dictionary, DICTIONARIES, {}),
    "shared_dictionary": Kind(dictionary, DICTIONARIES, {"shares": "other"}),
}


@dataclass(frozen=True)
class Example:
    """A form at some sizes."""

    form: str
    sizes: dict[str, int]

    def __str__(self) -> str:
        return "-".join([self.form, *map(str, self.sizes.values())])

    @property
    def cls(self) -> type[Form]:
        return FORMS[self.form]

    @property
    def weight(self) -> Tensor:
        return KINDS[self.form].make(**self.sizes)[1]

    def encoded(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = self.cls.encode(*KINDS[self.form].make(**self.sizes)[0])
        return tensors

    def spec(self, **more: Any) -> dict[str, Any]:
        return {"form": self.form, **self.sizes, **KINDS[self.form].extra, **more}

    def other(self) -> "Example":
        lenders = [owner for owner, member in MEMBERS.items() if member == self.form]
        return Example(lenders[0], self.sizes) if lenders else Example("low_rank", RANKS[1])

    def table(self, **more: Any) -> dict[str, dict[str, Any]]:
        """Name the form under test before the layer that it may borrow from."""
        return {"layer": self.spec(**more), "other": self.other().spec()}

    def model(
        self, *, bias: bool = False, own_bias: bool = False, dtype: torch.dtype = torch.float64
    ) -> nn.Module:
        """Load the example and the other layer, the way a checkpoint is loaded."""
        model = nn.Module()
        model.layer = nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype)
        model.other = nn.Linear(D_IN, D_OUT, bias=False, dtype=dtype)
        swap_in_forms(model, self.table(**({"bias": True} if own_bias else {})))
        state = {f"layer.{leaf}": tensor for leaf, tensor in self.encoded().items()}
        state |= {f"other.{leaf}": tensor for leaf, tensor in self.other().encoded().items()}
        if bias or own_bias:
            state[f"layer.{self.cls.BIAS}"] = random(D_OUT, seed=2)
        model.load_state_dict(state)
        return model


EXAMPLES = [Example(form, sizes) for form, kind in KINDS.items() for sizes in kind.sizes]


def test_every_form_is_covered() -> None:
    assert KINDS.keys() | INTEGERS == FORMS.keys()


@pytest.fixture(params=EXAMPLES, ids=str)
def example(request: pytest.FixtureRequest) -> Example:
    chosen: Example = request.param
    return chosen


@pytest.fixture(params=KINDS)
def usual(request: pytest.FixtureRequest) -> Example:
    return Example(request.param, KINDS[request.param].sizes[1])


@pytest.mark.parametrize("bias", ["none", "of the dense layer", "its own"])
def test_computes_the_product_and_becomes_dense(
    example: Example, bias: str, rounding: Callable[..., float]
) -> None:
    layer = example.model(bias=bias == "of the dense layer", own_bias=bias == "its own").layer
    x = random(3, 5, D_IN, seed=3)
    expected = x @ example.weight.T + (0 if bias == "none" else random(D_OUT, seed=2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    assert layer(x[:, :0]).shape == (3, 0, D_OUT)
    dense = layer.dense()
    assert type(dense) is nn.Linear
    assert dense.weight.dtype == torch.float64
    close = rounding(D_IN, torch.float32) * float(expected.abs().max())  # through float32
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=close)


def test_counted_bits_and_parameters_are_those_of_the_file(
    example: Example, tmp_path: Path
) -> None:
    layer = example.model(dtype=torch.bfloat16).layer
    save_file(layer.state_dict(), tmp_path / "one.safetensors")
    headers = read_headers([tmp_path / "one.safetensors"])
    content = (tmp_path / "one.safetensors").read_bytes()
    n_bytes = len(content) - 8 - int.from_bytes(content[:8], "little")  # but for the header
    assert n_bytes * 8 == example.cls.stored_bits(D_OUT, D_IN, bits=16, **example.sizes)
    numbers = sum(p.numel() for p in layer.parameters())
    assert numbers == example.cls.parameters_stored(D_OUT, D_IN, **example.sizes)
    check_headers(
        example.cls.shapes(D_OUT, D_IN, example.spec(), bias=False),
        [str(tmp_path / "one.safetensors")],
    )
    assert {h.dtype for h in headers.values()} <= {"BF16", "U8", "I16"}


@pytest.mark.parametrize("own_bias", [False, True])
def test_what_is_encoded_and_what_is_held_is_what_is_declared(
    example: Example, own_bias: bool
) -> None:
    spec = example.spec(**({"bias": True} if own_bias else {}))
    declared = example.cls.shapes(D_OUT, D_IN, spec, bias=False)
    assert {dtype for _, dtype in declared.values()} <= {None, *STORED}
    bias = {example.cls.BIAS: random(D_OUT)} if own_bias else {}
    encoded = example.encoded() | bias
    held = example.model(own_bias=own_bias, dtype=torch.float16).layer.state_dict()
    for tensors, floating in ((encoded, torch.float64), (held, torch.float16)):
        assert {name: ([*t.shape], t.dtype) for name, t in tensors.items()} == {
            name: (shape, dtype or floating) for name, (shape, dtype) in declared.items()
        }


def test_work_is_counted_as_torch_counts_it(example: Example) -> None:
    layer = example.model().layer
    with FlopCounterMode(display=False) as counter:
        layer(random(7, D_IN))
    work = example.cls.multiply_adds(D_OUT, D_IN, **example.sizes)
    assert counter.get_total_flops() == 2 * 7 * work


def test_shape_is_read_off_the_headers(example: Example) -> None:
    found = {name: [*t.shape] for name, t in example.model().state_dict().items()}
    assert example.cls.dense_shape("layer", example.spec(), found) == (D_OUT, D_IN)


def test_a_plan_writes_what_the_spec_adds(usual: Example) -> None:
    """But for the owner of a shared factor, which no shape tells."""
    added = {key: value for key, value in usual.spec().items() if key != "shares"}
    assert added == {"form": usual.form, **usual.sizes, **usual.cls.extra(D_OUT, D_IN)}


@pytest.mark.parametrize(("d_out", "d_in"), [(D_OUT, D_IN), (D_IN, D_OUT), (1, 9), (9, 1)])
def test_a_larger_step_stores_more(usual: Example, d_out: int, d_in: int) -> None:
    bits = []
    for step in range(1, usual.cls.largest_step(d_out, d_in) + 1):
        sizes = usual.cls.sizes_at(step, d_out, d_in)
        assert sizes.keys() == {*usual.cls.SIZES}
        assert usual.cls.problem(usual.spec(**sizes)) is None
        assert usual.cls.written(d_out, d_in, sizes)
        bits.append(usual.cls.stored_bits(d_out, d_in, bits=16, **sizes))
    assert bits == sorted({*bits})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conversion_leaves_integers_alone(example: Example, dtype: torch.dtype) -> None:
    model = example.model()
    expected = model.layer(random(2, D_IN, seed=3)).detach()
    before = {n: t.clone() for n, t in model.state_dict().items() if not t.is_floating_point()}
    model.half() if dtype == torch.float16 else model.to(dtype)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
    y = model.layer(random(2, D_IN, seed=3).to(dtype)).detach()
    assert y.dtype == dtype
    assert model.layer.dense().weight.dtype == dtype
    error = float((y.double() - expected).norm() / expected.norm())
    # Measured at most 0.0063, 0.00061 and 2.4e-7.
    assert error <= {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 2e-6}[dtype]


def test_compiles_as_one_graph(example: Example) -> None:
    model = example.model(bias=True)
    graph = torch.compile(model.layer, fullgraph=True, backend="eager")
    x = random(2, D_IN, seed=3)
    torch.testing.assert_close(graph(x), model.layer(x))


def test_gradients_reach_every_parameter(example: Example) -> None:
    model = example.model(bias=True)
    model.layer(random(2, D_IN)).square().sum().backward()
    for name, parameter in model.layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "file"]
)
def test_a_copied_model_is_another_model(
    example: Example, copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = example.model()
    x = random(2, D_IN, seed=3)
    expected = model.layer(x)
    twin = copied(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(twin.layer(x), expected)
    assert not model.layer(x).any()


# What is done to an entry, of which a form's size may be the object, and what is said of it.
WRONG: dict[str, tuple[Callable[[dict[str, Any], str], object], str]] = {
    "no size": (lambda spec, size: spec.pop(size), "must hold 'SIZE': N >= 1, got"),
    "size 0": (lambda spec, size: spec.update({size: 0}), "must hold 'SIZE': N >= 1"),
    "size a truth": (lambda spec, size: spec.update({size: True}), "must hold 'SIZE': N >= 1"),
    "size a text": (lambda spec, size: spec.update({size: "3"}), "must hold 'SIZE': N >= 1"),
    "bias a text": (lambda spec, _: spec.update(bias="yes"), "must hold true or false as 'bias'"),
    "no form": (lambda spec, _: spec.pop("form"), "must be {'form': NAME} with the sizes"),
    "unknown": (lambda spec, _: spec.update(form="x"), f"{', '.join(FORMS)}, got.*newer lrc"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_specs_are_refused_in_words(usual: Example, case: str) -> None:
    spoil, words = WRONG[case]
    for size in usual.cls.SIZES:
        modules = usual.table()
        check_modules(modules, "config.json")
        spoil(modules["layer"], size)
        sentence = rf"config.json: modules\['layer'\] .*{words.replace('SIZE', size)}"
        with pytest.raises(CheckpointError, match=sentence):
            check_modules(modules, "config.json")
