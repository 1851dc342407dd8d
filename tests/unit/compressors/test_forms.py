"""What holds for every form: a new one is covered here as soon as it is in the table."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lrc.compressors.checkpoint.format import check_modules
from lrc.compressors.checkpoint.quantizer import check_headers, swap_in_forms
from lrc.compressors.layers import FORMS
from lrc.compressors.shards import read_headers
from lrc.configs.errors import CheckpointError

D_OUT, D_IN, RANK = 24, 40, 6
# What a spec of each form holds beside form and rank; `other` is a low_rank layer of that rank.
EXTRA: dict[str, dict[str, Any]] = {
    "low_rank": {},
    "pivoted_low_rank": {},
    "shared_low_rank": {"shares": "other"},
}


def test_every_form_is_covered() -> None:
    assert EXTRA.keys() == FORMS.keys()


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(rank: int = RANK) -> tuple[Tensor, Tensor]:
    return random(D_OUT, rank), random(rank, D_IN, seed=1)


def spec_of(form: str, rank: int = RANK, **more: Any) -> dict[str, Any]:
    return {"form": form, "rank": rank, **EXTRA[form], **more}


def table(form: str, rank: int = RANK, **more: Any) -> dict[str, dict[str, Any]]:
    """Name the form under test before the layer that it may borrow from."""
    return {"layer": spec_of(form, rank, **more), "other": spec_of("low_rank", rank)}


def model_of(
    form: str,
    rank: int = RANK,
    *,
    bias: bool = False,
    own_bias: bool = False,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """Load `product` in both layers, the way a checkpoint is loaded."""
    model = nn.Module()
    model.layer = nn.Linear(D_IN, D_OUT, bias=bias, dtype=dtype)
    model.other = nn.Linear(D_IN, D_OUT, bias=False, dtype=dtype)
    modules = table(form, rank, **({"bias": True} if own_bias else {}))
    swap_in_forms(model, modules)
    state = {
        f"{name}.{leaf}": tensor
        for name, spec in modules.items()
        for leaf, tensor in FORMS[spec["form"]].encode(*product(rank)).items()
    }
    if bias or own_bias:
        state[f"layer.{FORMS[form].BIAS}"] = random(D_OUT, seed=2)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("bias", ["none", "of the dense layer", "its own"])
@pytest.mark.parametrize("rank", [1, RANK, D_OUT])
def test_computes_the_product_and_becomes_dense(form: str, rank: int, bias: str) -> None:
    layer = model_of(
        form, rank, bias=bias == "of the dense layer", own_bias=bias == "its own"
    ).layer
    B, A = product(rank)
    x = random(3, 5, D_IN, seed=3)
    expected = x @ (B @ A).T + (0 if bias == "none" else random(D_OUT, seed=2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    dense = layer.dense()
    assert type(dense) is nn.Linear
    assert dense.weight.dtype == torch.float64
    torch.testing.assert_close(dense(x), expected, rtol=1e-4, atol=1e-4)  # through float32


@pytest.mark.parametrize("rank", [1, RANK, D_OUT])
def test_counted_bits_and_parameters_are_those_of_the_file(
    form: str, rank: int, tmp_path: Path
) -> None:
    layer = model_of(form, rank, dtype=torch.bfloat16).layer
    save_file(layer.state_dict(), tmp_path / "one.safetensors")
    headers = read_headers([tmp_path / "one.safetensors"])
    content = (tmp_path / "one.safetensors").read_bytes()
    n_bytes = len(content) - 8 - int.from_bytes(content[:8], "little")  # but for the header
    assert n_bytes * 8 == FORMS[form].stored_bits(D_OUT, D_IN, bits=16, rank=rank)
    numbers = sum(p.numel() for p in layer.parameters())
    assert numbers == FORMS[form].parameters_stored(D_OUT, D_IN, rank=rank)
    check_headers(
        FORMS[form].shapes(D_OUT, D_IN, spec_of(form, rank), bias=False),
        [str(tmp_path / "one.safetensors")],
    )
    assert {h.dtype for h in headers.values()} <= {"BF16", "U8", "I16"}


@pytest.mark.parametrize("own_bias", [False, True])
def test_what_is_encoded_and_what_is_held_is_what_is_declared(form: str, own_bias: bool) -> None:
    spec = spec_of(form, **({"bias": True} if own_bias else {}))
    declared = FORMS[form].shapes(D_OUT, D_IN, spec, bias=False)
    encoded = FORMS[form].encode(*product())
    assert declared.keys() - encoded.keys() == ({FORMS[form].BIAS} if own_bias else set())
    held = model_of(form, own_bias=own_bias, dtype=torch.float16).layer.state_dict()
    assert {name: [*t.shape] for name, t in held.items()} == {
        n: s for n, (s, _) in declared.items()
    }
    for name, (_, dtype) in declared.items():
        assert held[name].dtype == (dtype or torch.float16)


@pytest.mark.parametrize("rank", [1, RANK, D_OUT])
def test_work_is_counted_as_torch_counts_it(form: str, rank: int) -> None:
    layer = model_of(form, rank).layer
    with FlopCounterMode(display=False) as counter:
        layer(random(7, D_IN))
    assert counter.get_total_flops() == 2 * 7 * FORMS[form].multiply_adds(D_OUT, D_IN, rank=rank)


def test_shape_is_read_off_the_headers(form: str) -> None:
    found = {name: [*t.shape] for name, t in model_of(form).state_dict().items()}
    assert FORMS[form].dense_shape("layer", spec_of(form), found) == (D_OUT, D_IN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_conversion_leaves_integers_alone(form: str, dtype: torch.dtype) -> None:
    model = model_of(form)
    expected = model.layer(random(2, D_IN, seed=3)).detach()
    before = {n: t.clone() for n, t in model.state_dict().items() if not t.is_floating_point()}
    model.to(dtype)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
    y = model.layer(random(2, D_IN, seed=3).to(dtype)).detach()
    assert y.dtype == dtype
    error = float((y.double() - expected).norm() / expected.norm())
    # Measured at most 0.005, 0.0005 and 1.2e-7.
    assert error <= {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 2e-6}[dtype]


def test_compiles_as_one_graph(form: str) -> None:
    model = model_of(form, bias=True)
    graph = torch.compile(model.layer, fullgraph=True, backend="eager")
    x = random(2, D_IN, seed=3)
    torch.testing.assert_close(graph(x), model.layer(x))


def test_gradients_reach_every_parameter(form: str) -> None:
    model = model_of(form, bias=True)
    model.layer(random(2, D_IN)).square().sum().backward()
    for name, parameter in model.layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_a_copied_model_is_another_model(form: str) -> None:
    model = model_of(form)
    x = random(2, D_IN, seed=3)
    expected = model.layer(x)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(twin.layer(x), expected)
    assert not model.layer(x).any()


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no rank": (lambda spec: spec.pop("rank"), "must hold 'rank': N >= 1, got"),
    "rank 0": (lambda spec: spec.update(rank=0), "must hold 'rank': N >= 1"),
    "rank a truth": (lambda spec: spec.update(rank=True), "must hold 'rank': N >= 1"),
    "rank a text": (lambda spec: spec.update(rank="3"), "must hold 'rank': N >= 1"),
    "bias a text": (lambda spec: spec.update(bias="yes"), "must hold true or false as 'bias'"),
    "no form": (lambda spec: spec.pop("form"), "must be {'form': NAME"),
    "unknown": (lambda spec: spec.update(form="x"), f"{', '.join(FORMS)}, got.*newer lrc"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_specs_are_refused_in_words(form: str, case: str) -> None:
    modules = table(form)
    check_modules(modules, "config.json")
    spoil, words = WRONG[case]
    spoil(modules["layer"])
    with pytest.raises(CheckpointError, match=rf"config.json: modules\['layer'\] .*{words}"):
        check_modules(modules, "config.json")
