"""Components with a mask and their fast paths."""

import copy
import pickle

import pytest
import torch

from lrc.compressors.kernels import masked_csr
from lrc.compressors.kernels.masked import EIGHT_OF, FREE, Masked
from lrc.compressors.layers import COMPONENTS, ComponentConfig, QuantizationArgs
from lrc.compressors.layers.bitmask import pack_bits

pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="compressed rows need a torch with MKL"
)
D_OUT, D_IN = 24, 40


def sparse(dtype=torch.float32, pattern=None):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(D_OUT, D_IN, generator=generator)
    if pattern is None:
        mask = torch.rand(D_OUT, D_IN, generator=generator) < 0.6
    else:
        kept = torch.rand(D_OUT, D_IN // 4, 4, generator=generator).argsort(2) < 2
        mask = kept.flatten(1)
    config = ComponentConfig("sparse", {"nonzeros": int(mask.sum())}, pattern=pattern)
    return filled(config, dtype, W_hat=W.to(dtype), mask=mask)


def semi_structured(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(D_OUT, D_IN, generator=generator)
    mask = (torch.rand(D_OUT, D_IN // 8, 8, generator=generator).argsort(2) < 5).flatten(1)
    return filled(ComponentConfig("semi_structured", {"n": 5}), dtype, W_hat=W.to(dtype), mask=mask)


def dictionary(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    D = torch.randn(D_IN, 20, generator=generator).to(dtype)
    S = torch.randn(20, D_OUT, generator=generator).to(dtype)
    mask = torch.rand(20, D_OUT, generator=generator).argsort(0) < 8
    config = ComponentConfig("dictionary", {"atoms": 20, "nonzeros": 8})
    return filled(config, dtype, D=D, S=S, mask=mask)


def filled(config, dtype, **parts):
    kind = COMPONENTS[config.type]
    component = kind((D_OUT, D_IN), config, dtype=dtype)
    component.load_state_dict(kind.encode(**parts))
    return component.eval().requires_grad_(False)


FORMS = {
    "sparse": sparse,
    "2:4": lambda dtype=torch.float32: sparse(dtype, "2:4"),
    "n:8": semi_structured,
    "dictionary": dictionary,
}


@pytest.mark.parametrize("rows", [1, 2, 17, 40])
@pytest.mark.parametrize("form", FORMS)
def test_compressed_rows_differ_from_the_plain_product_by_rounding(form, rows, rounding):
    component = FORMS[form]()
    x = torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(rows))
    exact = x.double() @ component.matrix().double().T
    assert component.optimize() is None
    assert component.entry.name == "compressed rows (MKL)"
    scale = float(exact.abs().max())
    error = (component(x) - exact).abs().max()
    assert error <= rounding(2 * D_IN, torch.float32) * scale * 2
    assert component(x.view(1, rows, D_IN)).shape == (1, rows, D_OUT)


@pytest.mark.parametrize("form", FORMS)
def test_a_fast_path_leaves_the_state_dict_alone_and_can_be_undone(form):
    component = FORMS[form]()
    before = {name: tensor.clone() for name, tensor in component.state_dict().items()}
    x = torch.randn(3, D_IN)
    plain = component(x)
    component.optimize()
    after = component.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    component.restore()
    assert torch.equal(component(x), plain)
    assert not component._non_persistent_buffers_set


def test_loading_other_tensors_finds_other_places():
    component = sparse()
    component.optimize()
    state = {name: tensor.clone() for name, tensor in component.state_dict().items()}
    state["mask"] = state["mask"].flip(0)
    component.load_state_dict(state)
    x = torch.randn(2, D_IN)
    assert component.entry is not None
    torch.testing.assert_close(component(x), x @ component.matrix().T)


def test_copies_and_pickles_are_as_fast():
    component = sparse()
    component.optimize()
    x = torch.randn(2, D_IN)
    for other in (copy.deepcopy(component), pickle.loads(pickle.dumps(component))):
        assert other.entry is not None
        assert torch.equal(other(x), component(x))


def test_training_uses_the_plain_product():
    component = sparse().requires_grad_(True)
    component.optimize()
    x = torch.randn(2, D_IN)
    component(x).sum().backward()
    assert component.values.grad is not None
    with torch.no_grad():  # a step of an optimizer is seen at once
        component.values.add_(1)
        torch.testing.assert_close(component(x), x @ component.matrix().T)


def test_another_dtype_has_no_fast_path_and_says_why():
    component = sparse()
    component.optimize()
    component.to(torch.bfloat16)
    assert component.entry is None
    assert component.reason == (
        "compressed rows (MKL): needs float32, and the weights are in bfloat16"
    )
    component.float()
    assert component.entry is not None


def test_quantized_values_have_no_fast_path_on_the_cpu():
    config = ComponentConfig("sparse", {"nonzeros": 30}, QuantizationArgs.parse("int4-g32"))
    component = COMPONENTS["sparse"]((D_OUT, D_IN), config)
    assert component.optimize() == "compressed rows (MKL): codec 4 is not supported"


def test_dictionaries_with_indices_say_so():
    config = ComponentConfig("dictionary", {"atoms": 200, "nonzeros": 2})
    component = COMPONENTS["dictionary"]((256, 256), config)
    assert component.optimize() == "positions are stored as indices"


@pytest.mark.parametrize("rows", [1, 3, 33])
def test_the_operator_agrees_with_its_fake_kernel(rows):
    mask = torch.rand(6, 27, generator=torch.Generator().manual_seed(0)) < 0.4
    places = masked_csr.find_places(pack_bits(mask), 27)
    arguments = torch.randn(rows, 27), torch.randn(int(mask.sum())), *places.values(), 27
    torch.library.opcheck(
        masked_csr.csr_linear, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_2_of_4_in_all_units_of_eight_is_4_of_8():
    assert sparse(pattern="2:4").layout()[:3] == (EIGHT_OF, D_IN, 4)
    assert sparse().layout()[:3] == (FREE, D_IN, 0)
    assert Masked(FREE, 8, torch.ones(1), torch.ones(1, 1)).dtype == torch.float32
