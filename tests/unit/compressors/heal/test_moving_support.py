from typing import Any

import pytest
import torch
from torch import Tensor

from lrc.compressors.heal.budget import StepBudget
from lrc.compressors.heal.descent import Descent
from lrc.compressors.heal.moving_support import MovingSupport, move_supports_
from lrc.compressors.heal.parameters import TrainedParameters
from lrc.compressors.layers import COMPONENTS, CompressedLinear
from lrc.compressors.layers.component import ComponentConfig
from lrc.compressors.layers.config import WeightConfig
from lrc.compressors.layers.masked_entries import MaskedEntries

D_OUT, D_IN = 12, 16
FORMS = {
    "sparse": ComponentConfig("sparse", {"nonzeros": 77}),
    "sparse 2:4": ComponentConfig("sparse", {"nonzeros": D_OUT * D_IN // 2}, pattern="2:4"),
    "semi_structured": ComponentConfig("semi_structured", {"n": 3}),
    "dictionary with a mask": ComponentConfig("dictionary", {"atoms": 10, "nonzeros": 4}),
    "dictionary with indices": ComponentConfig("dictionary", {"atoms": 48, "nonzeros": 2}),
    "dictionary 2:4": ComponentConfig("dictionary", {"atoms": 8, "nonzeros": 4}, pattern="2:4"),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def component_of(config: ComponentConfig, seed: int = 0) -> MaskedEntries:
    """Return a component with random tensors."""
    found: Any = COMPONENTS[config.type]((D_OUT, D_IN), config, dtype=torch.float32)
    group, _ = found.support
    columns = config.sizes.get("atoms", D_IN)
    entries = torch.randn(D_OUT, columns, generator=generator(seed))
    tensors = found.encode_entries(entries, found.largest(entries))
    if config.type == "dictionary":
        tensors["a.weight"] = torch.randn(columns, D_IN, generator=generator(seed + 1))
    found.load_state_dict(tensors)
    assert not found.problems()
    assert entries.numel() % group == 0
    return found.requires_grad_(False)


@pytest.fixture(params=FORMS)
def component(request: pytest.FixtureRequest) -> MaskedEntries:
    return component_of(FORMS[request.param])


X = torch.randn(5, D_IN, generator=generator(9))


def test_every_form_with_free_places_is_tested() -> None:
    movable = {name for name, each in COMPONENTS.items() if issubclass(each, MaskedEntries)}
    assert movable == {config.type for config in FORMS.values()}


def test_a_support_starts_where_the_values_are_and_is_restored(component: MaskedEntries) -> None:
    before, stored = component(X), {k: v.clone() for k, v in component.state_dict().items()}
    support = MovingSupport(component)
    torch.testing.assert_close(component(X), before)
    with torch.no_grad():
        support.entries.add_(1.0)
    assert not torch.allclose(component(X), before)
    support.restore_()
    assert torch.equal(component(X), before)
    assert {*component.state_dict()} == {*stored}
    assert all(torch.equal(component.state_dict()[k], v) for k, v in stored.items())


@pytest.mark.parametrize("equal", [False, True])
def test_exactly_as_many_values_as_before_are_stored(component: MaskedEntries, equal: bool) -> None:
    support = MovingSupport(component)
    moved = torch.randn(support.entries.shape, generator=generator(3))
    with torch.no_grad():
        support.entries.copy_(moved.sign() if equal else moved)
    group, count = component.support
    assert (support.mask.view(-1, group).sum(dim=1) == count).all()
    expected = component(X)
    selected = support.selected()
    if not equal:  # an independent way to find the largest
        _, places = moved.abs().view(-1, group).topk(count)
        found = torch.zeros_like(moved).view(-1, group).scatter(1, places, 1.0)
        assert torch.equal(found.view(moved.shape) > 0, support.mask)
    shapes = {name: tensor.shape for name, tensor in component.state_dict().items()}
    support.restore_()
    tensors = {**component.state_dict(), **support.encode(selected)}
    assert {n: t.shape for n, t in tensors.items() if n != "values"} == {
        n: s for n, s in shapes.items() if n != "values"
    }
    component.load_state_dict(tensors)
    assert not component.problems()
    torch.testing.assert_close(component(X), expected)


def test_zeros_are_stored_if_nothing_else_is_left(component: MaskedEntries) -> None:
    support = MovingSupport(component)
    with torch.no_grad():
        support.entries.zero_()
    tensors = support.encode(support.selected())
    support.restore_()
    component.load_state_dict({**component.state_dict(), **tensors})
    assert not component.problems()


def test_gradients_pass_straight_through_the_selection(component: MaskedEntries) -> None:
    support = MovingSupport(component)
    support.entries.requires_grad_(True)
    component(X).square().sum().backward()
    whole = support.selected().requires_grad_(True)
    component.multiply_entries(X, whole).square().sum().backward()
    assert whole.grad is not None
    assert support.entries.grad is not None
    torch.testing.assert_close(support.entries.grad, whole.grad)
    assert (support.entries.grad[~support.mask] != 0).any()


def test_only_values_in_floating_point_move() -> None:
    config = FORMS["sparse"]
    layer = CompressedLinear(WeightConfig((D_OUT, D_IN), (config,)), dtype=torch.float32)
    layer.sparse = component_of(config)
    parameters = {"sparse.values": layer.sparse.values}
    supports = move_supports_(layer, parameters)
    assert parameters["sparse.values"] is supports["sparse.values"].entries
    assert dict(layer.named_parameters())["sparse.values"].shape == (D_OUT, D_IN)


def fit(form: str, *, moving: bool) -> tuple[float, Descent]:
    """Fit a component to the outputs of another one with the same `a` and with other places."""
    target, component = component_of(FORMS[form], seed=5), component_of(FORMS[form], seed=6)
    if "dictionary" in form:
        component.load_state_dict(
            {**component.state_dict(), "a.weight": target.state_dict()["a.weight"]}
        )
    x = torch.randn(256, D_IN, generator=generator(7))
    y = target(x)
    parameters = {"values": component.get_parameter("values")}
    supports = move_supports_(component, parameters) if moving else {}
    dtypes = {"values": torch.float32}
    trained = TrainedParameters(parameters, dtypes, supports)
    descent = Descent(trained, budget=StepBudget(400), rate=0.05)

    def loss() -> Tensor:
        return (component(x) - y).square().sum() / y.square().sum()

    while descent.done < descent.steps:
        loss().backward()
        descent.update_()
        assert (
            int(trained.encoded(trained.rounded())["values"].numel())
            == target.get_parameter("values").numel()
        )
    return float(loss().detach()), descent


@pytest.mark.parametrize("form", FORMS)
def test_planted_places_are_found_from_other_ones(form: str) -> None:
    fixed, _ = fit(form, moving=False)
    moving, descent = fit(form, moving=True)
    assert moving < 0.1 * fixed
    moved = descent.trained.moved(descent.trained.rounded())
    assert moved is not None
    assert moved > 0
