"""Every form with its numbers as integers: what is stored, what it stands for, what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrc.compressors.checkpoint.format import check_modules, expected_tensors
from lrc.compressors.checkpoint.quantizer import swap_in_forms
from lrc.compressors.compress.finalize import Ending, product
from lrc.compressors.compress.quantize_parts import Rounding, round_parts
from lrc.compressors.layers import FORMS, MEMBERS, Sharing
from lrc.compressors.layers.packed import PackedMatrix, read_values
from lrc.compressors.layers.scheme import Scheme
from lrc.compressors.planning.plan import Matrix
from lrc.compressors.planning.weight_groups import Unit
from lrc.compressors.solvers.quantization_grid import ScaleOverflow
from lrc.configs.errors import CheckpointError, ModelError

D_OUT, D_IN, RANK = 48, 64, 16
SCHEMES = ["int8", "int4-g16", "int3-g8-asymmetric", "int5"]
SIZES: dict[str, dict[str, int]] = {
    "low_rank": {"rank": RANK},
    "pivoted_low_rank": {"rank": RANK},
    "shared_low_rank": {"rank": RANK},
    "sparse": {"nonzeros": 900},
    "low_rank_plus_sparse": {"rank": RANK, "nonzeros": 500},
    "dictionary": {"atoms": 32, "nonzeros": 8},
    "shared_dictionary": {"atoms": 32, "nonzeros": 8},
    "integers": {},
    "integers_plus_low_rank": {"rank": 3},
}
WHOLE = ("integers", "integers_plus_low_rank")
NEAREST = Rounding("rtn", "even", True, 0.01)


def test_every_form_is_covered() -> None:
    with_tests_of_their_own = {"group_sparse", "embedded_integers"}
    assert SIZES.keys() | with_tests_of_their_own == FORMS.keys()


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def largest(scores: Tensor, count: int) -> Tensor:
    where = scores.abs().topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, where, True)


def contents(form: str) -> tuple[Tensor, ...]:
    """Return what the form's `encode` takes."""
    sizes = SIZES[form]
    low = (random(D_OUT, RANK), random(RANK, D_IN, seed=1))
    if form.endswith("dictionary"):
        D, S = random(D_IN, sizes["atoms"]), random(sizes["atoms"], D_OUT, seed=1)
        mask = largest(S.T, sizes["nonzeros"]).T
        return D, S * mask, mask
    if form.endswith("sparse"):
        W = random(D_OUT, D_IN, seed=2)
        mask = largest(W.flatten(), sizes["nonzeros"]).view_as(W)
        return (*low, W * mask, mask) if "rank" in sizes else (W * mask, mask)
    return low


def matrix(form: str, scheme: str) -> Matrix:
    bits = D_OUT * D_IN * 16
    bare = Matrix("layer", 0, (D_OUT, D_IN), 0, "mixed", form, None, bits, bits)
    group = "other" if issubclass(FORMS[form], Sharing) else None
    there = Matrix(**{**bare.__dict__, "scheme": scheme, "rounded": 0, "group": group})
    return there.at(SIZES[form])


def parts(form: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weight that parts stand for, and the parts as `encode` writes them."""
    if form in WHOLE:
        return random(D_OUT, D_IN), {}
    tensors = FORMS[form].encode(*contents(form))
    bare = matrix(form, "int8")
    bare = Matrix(**{**bare.__dict__, "scheme": None})
    state = {
        f"layer.{leaf}": t.float() if t.is_floating_point() else t for leaf, t in tensors.items()
    }
    return product(bare, (state | lent(form)).__getitem__).double(), tensors


def lent(
    form: str, scheme: str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return the tensors of the module that a form borrows from."""
    owner = next((owner for owner, member in MEMBERS.items() if member == form), None)
    if owner is None:
        return {}
    tensors = FORMS[owner].encode(*contents(owner))
    if scheme is not None:
        tensors = round_parts(
            matrix(owner, scheme), random(D_OUT, D_IN), tensors, None, NEAREST, dtype=dtype, seed=0
        ).tensors
    rounded = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    return {f"other.{leaf}": tensor for leaf, tensor in rounded.items()}


def rounded(form: str, scheme: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the tensors of a module, every part rounded to the nearest by itself."""
    W, tensors = parts(form)
    found = round_parts(matrix(form, scheme), W, tensors, None, NEAREST, dtype=dtype, seed=0)
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in found.tensors.items()}


each_form = pytest.mark.parametrize("form", SIZES)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@each_form
@each_scheme
def test_what_is_written_is_what_is_declared_and_held(form: str, scheme: str) -> None:
    spec = {"form": form, **SIZES[form], "scheme": scheme, "shape": [D_OUT, D_IN]}
    declared = FORMS[form].stored(D_OUT, D_IN, spec, bias=False)
    written = rounded(form, scheme, torch.bfloat16)
    assert {name: ([*t.shape], t.dtype) for name, t in written.items()} == {
        name: (shape, dtype or torch.bfloat16) for name, (shape, dtype) in declared.items()
    }
    linear = nn.Linear(D_IN, D_OUT, bias=False, dtype=torch.bfloat16)
    held = FORMS[form].empty(linear, spec)
    assert held.state_dict().keys() == written.keys()
    held.load_state_dict(written)
    assert expected_tensors("m", D_OUT, D_IN, spec, bias=False).keys() == {
        f"m.{n}" for n in written
    }


@each_form
@each_scheme
def test_counted_bits_are_those_of_the_file(form: str, scheme: str) -> None:
    written = rounded(form, scheme, torch.bfloat16)
    stored = sum(t.numel() * t.element_size() * 8 for t in written.values())
    assert stored == matrix(form, scheme).bits
    assert stored == FORMS[form].stored_bits(D_OUT, D_IN, bits=16, scheme=scheme, **SIZES[form])


def assert_near(number: Tensor, exact: Tensor, step: Tensor, scheme: Scheme) -> None:
    """Demand half a step, and a step where a number may lie beyond the end of the range."""
    end = (number / step).abs() >= scheme.highest - 0.5
    end = end if scheme.symmetric else torch.ones_like(end)
    assert bool(((number - exact).abs() <= step * torch.where(end, 1.01, 0.501)).all())


@each_form
@each_scheme
def test_every_number_is_within_half_a_step_of_the_part_it_was_made_of(
    form: str, scheme: str
) -> None:
    how, written = Scheme.read(scheme), rounded(form, scheme)
    W, tensors = parts(form)
    for leaf, exact in (tensors or {"weight": W}).items():
        if not exact.is_floating_point():
            continue
        step, number = written[f"{leaf}_scale"].abs().double(), meant(leaf, written, exact, how)
        if leaf == "values":
            each = step.repeat_interleave(how.group_size or 128)[: exact.numel()].view_as(exact)
            assert_near(number, exact, each, Scheme(how.bits))
        else:
            assert_near(
                number, exact, step.repeat_interleave(exact.shape[1] // step.shape[1], 1), how
            )


@each_scheme
def test_a_branch_mends_what_rounding_lost(scheme: str) -> None:
    W, lost = random(D_OUT, D_IN), []
    for form in WHOLE:
        tensors = {f"layer.{n}": t for n, t in rounded(form, scheme).items()}
        lost.append(float((product(matrix(form, scheme), tensors.__getitem__) - W).norm()))
    assert lost[1] < lost[0]


def meant(leaf: str, written: dict[str, Tensor], exact: Tensor, scheme: Scheme) -> Tensor:
    """Return the numbers that the integers of one part stand for."""
    if leaf == "values":
        packed, scale = written["values_packed"], written["values_scale"]
        return read_values(packed, scale.double(), exact.numel(), scheme).view_as(exact)
    module = PackedMatrix(*exact.shape, scheme, dtype=torch.float32)
    names = [name for name in written if name.startswith(f"{leaf}_")]
    stem = leaf.removesuffix("weight")
    module.load_state_dict({name.removeprefix(stem): written[name] for name in names})
    return module.weight.detach().double()


@each_form
@each_scheme
def test_the_layer_computes_its_product_and_becomes_dense(
    form: str, scheme: str, rounding: Callable[..., float]
) -> None:
    model = nn.Module()
    model.layer, model.other = nn.Linear(D_IN, D_OUT), nn.Linear(D_IN, D_OUT, bias=False)
    spec: dict[str, Any] = {"form": form, **SIZES[form], "scheme": scheme, "shape": [D_OUT, D_IN]}
    spec |= FORMS[form].extra(D_OUT, D_IN)
    table = {"layer": spec}
    owner = next((owner for owner, member in MEMBERS.items() if member == form), None)
    if owner is not None:
        spec["shares"] = "other"
        table["other"] = {**spec, "form": owner}
        del table["other"]["shares"]
    check_modules(table, "config.json")
    swap_in_forms(model, table)
    state = {f"layer.{n}": t for n, t in rounded(form, scheme).items()} | lent(form, scheme)
    bias = torch.linspace(-1, 1, D_OUT)
    own = {"layer." + FORMS[form].BIAS: bias}
    missing = model.load_state_dict(state | own, strict=False).missing_keys
    assert all(name.startswith("other.") for name in missing)
    assert owner is None or not missing
    x = random(3, 5, D_IN, seed=3).float()
    W_hat = product(matrix(form, scheme), state.__getitem__)
    expected = x @ W_hat.T + bias
    close = rounding(D_IN + RANK, torch.float32) * float(expected.abs().max())
    torch.testing.assert_close(model.layer(x), expected, rtol=0, atol=close)
    dense = model.layer.dense()
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(x), expected, rtol=0, atol=close)
    assert scheme in repr(model.layer)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no shape": (lambda s: s.pop("shape"), r"must hold 'shape': \[d_out, d_in\] with a 'scheme'"),
    "shape of three": (lambda s: s.update(shape=[1, 2, 3]), "must hold 'shape'"),
    "shape of a text": (lambda s: s.update(shape="48x64"), "must hold 'shape'"),
    "no such scheme": (lambda s: s.update(scheme="fp4"), "has a 'scheme' that must be written"),
    "too many bits": (lambda s: s.update(scheme="int9"), r"has a 'scheme' that .*in \[2, 8\]"),
    "a number": (lambda s: s.update(scheme=4), "has a 'scheme' that"),
}


@pytest.mark.parametrize("case", WRONG)
@each_form
def test_wrong_specs_are_refused_in_words(form: str, case: str) -> None:
    spoil, words = WRONG[case]
    spec: dict[str, Any] = {"form": form, **SIZES[form], "scheme": "int4", "shape": [D_OUT, D_IN]}
    spec |= FORMS[form].extra(D_OUT, D_IN) | {"shares": "other"}
    assert FORMS[form].problem(spec) is None
    spoil(spec)
    with pytest.raises(CheckpointError, match=rf"modules\['m'\] {words}"):
        check_modules({"m": spec}, "config.json")


@each_form
def test_a_shape_of_another_layer_and_groups_that_do_not_divide_are_refused(form: str) -> None:
    spec = {"form": form, **SIZES[form], "scheme": "int4", "shape": [D_OUT, D_IN + 1]}
    with pytest.raises(ValueError, match=r"shape must be \[48, 64\], got \[48, 65\]"):
        FORMS[form].stored(D_OUT, D_IN, spec, bias=False)
    if form == "sparse":  # whose groups end anywhere
        return
    spec |= {"scheme": "int4-g7", "shape": [D_OUT, D_IN]}
    if form != "shared_dictionary":  # which has values alone
        with pytest.raises(ValueError, match="no multiple of the group size 7"):
            FORMS[form].stored(D_OUT, D_IN, spec, bias=False)


def test_integers_need_a_scheme() -> None:
    for form in WHOLE:
        spec = {"form": form, **SIZES[form]}
        assert FORMS[form].problem(spec) == "must hold a 'scheme'"


def test_scales_that_overflow_are_the_fault_of_one_linear() -> None:
    W = random(D_OUT, D_IN) * 1e8
    unit = Unit((matrix("integers", "int4-g16"),))
    ending = Ending([W], [], torch.float16, NEAREST, 0)
    object.__setattr__(ending, "known", [Known()])
    with pytest.raises(
        ModelError, match=r"layer \[48, 64\]: cannot be rounded to int4-g16: scales"
    ):
        ending.integers(unit)
    tensors = FORMS["low_rank"].encode(random(D_OUT, RANK) * 1e6, random(RANK, D_IN) * 1e6)
    H = torch.eye(D_IN, dtype=torch.float64)
    for gauge in ("measured", "first"):
        how = Rounding("rtn", gauge, True, 0.01)  # type: ignore[arg-type]
        with pytest.raises(ScaleOverflow, match="overflow"):
            round_parts(
                matrix("low_rank", "int4"), W, dict(tensors), H, how, dtype=torch.float16, seed=0
            )


class Known:
    """Statistics of a linear that no token has come to."""

    inputs = None
