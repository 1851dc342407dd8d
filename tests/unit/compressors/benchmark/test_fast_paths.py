"""Weights without a fast path are named once per form and reason."""

import pytest
from torch import nn

from lrc.compressors.benchmark.fast_paths import REBUILT, SlowForm, slow_forms
from lrc.compressors.kernels import Entry, Need, optimize
from lrc.compressors.layers import CompressedLinear, WeightConfig, packed_weight
from lrc.compressors.layers.component import Component


def layer(**component: object) -> CompressedLinear:
    config = WeightConfig.from_json({"shape": [8, 16], "components": [component]})
    made = CompressedLinear(config)
    for parameter in made.parameters():
        nn.init.ones_(parameter)
    return made


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Have a fast path for 8 bits, none for 4."""
    entry = Entry("bytes", "packed_linear", "cpu", [8], run=lambda *_: None)

    def choose(need: Need) -> Entry | str:
        return entry if need.codec == 8 else "needs Triton"

    monkeypatch.setattr(packed_weight, "select", choose)
    return nn.ModuleDict(
        {
            "q": layer(type="low_rank", rank=8, quantization="int4-g8"),
            "k": layer(type="dense", quantization="int4-g8"),
            "v": layer(type="dense", quantization="int4-g8"),
            "up": layer(type="dense", quantization="int8"),
            "down": layer(type="low_rank", rank=2),
            "o": nn.Linear(16, 8),
        }
    )


def test_forms_are_named_with_their_layers_and_reasons(model: nn.Module) -> None:
    assert slow_forms(model) == []  # nothing was selected yet
    optimize(model)
    assert slow_forms(model) == [
        SlowForm("dense int4-g8", "needs Triton", ("k", "v")),
        SlowForm("low_rank int4-g8", "needs Triton", ("q",)),  # both factors, named once
    ]


def test_json_counts_layers_and_names_one() -> None:
    form = SlowForm("dense int4-g8", "needs Triton", ("k", "v"))
    expected = {"form": "dense int4-g8", "layers": 2, "example": "k", "reason": "needs Triton"}
    assert form.to_json() == expected


def test_a_component_that_rebuilds_its_matrix_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(type="low_rank", rank=2)
    (component,) = made.components
    assert slow_forms(nn.ModuleDict({"q": made})) == []
    monkeypatch.setattr(type(component), "forward", Component.forward)
    assert slow_forms(nn.ModuleDict({"q": made})) == [SlowForm("low_rank", REBUILT, ("q",))]
