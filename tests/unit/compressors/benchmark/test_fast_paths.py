"""Weights without a fast path are named once per form and reason."""

from torch import nn

from lrc.compressors.benchmark.fast_paths import SlowForm, slow_forms
from lrc.compressors.layers import CompressedLinear, WeightConfig
from lrc.compressors.layers.component import Component


def test_forms_are_named_with_their_weights_and_reasons() -> None:
    def layer(**component: object) -> CompressedLinear:
        config = WeightConfig.from_json({"shape": [8, 16], "components": [component]})
        return CompressedLinear(config)

    model = nn.ModuleDict(
        {
            "q": layer(type="low_rank", rank=2),
            "k": layer(type="dense", quantization="int4-g8"),
            "v": layer(type="dense", quantization="int4-g8"),
            "o": nn.Linear(16, 8),
        }
    )

    def refusal(component: Component) -> str | None:
        return None if component.config.type == "low_rank" else "needs Triton"

    assert slow_forms(model, refusal) == [SlowForm("dense int4-g8", "needs Triton", ("k", "v"))]
    assert slow_forms(model, lambda _: None) == []
