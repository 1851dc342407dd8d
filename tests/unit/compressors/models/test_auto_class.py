"""The Auto class that builds and loads a model."""

import pytest
from transformers import AutoConfig

from lrc.compressors.models.auto_class import auto_class

CASES = {
    "text": ({"model_type": "llama"}, "AutoModelForCausalLM"),
    "images": ({"model_type": "qwen2_5_vl"}, "AutoModelForImageTextToText"),
    "sound": ({"model_type": "qwen2_audio"}, "AutoModelForMultimodalLM"),
    "one class for both": (
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
        "AutoModelForImageTextToText",
    ),
    "the text model alone": (
        {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForCausalLM"]},
        "AutoModelForCausalLM",
    ),
    "with its tower": (
        {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]},
        "AutoModelForImageTextToText",
    ),
    "own code": (
        {"model_type": "mine", "auto_map": {"AutoModelForImageTextToText": "mine.Mine"}},
        "AutoModelForImageTextToText",
    ),
    "no model of text": ({"model_type": "vit", "architectures": ["ViTModel"]}, None),
    "unknown": ({"model_type": "mine"}, None),
}


@pytest.mark.oldest
@pytest.mark.parametrize("case", CASES)
def test_the_class_is_the_one_that_has_all_parts_of_the_saved_model(case: str) -> None:
    values, expected = CASES[case]
    found = auto_class(values)
    assert getattr(found, "__name__", None) == expected
    if values["model_type"] != "mine":  # the same for the config that is read from it
        config = AutoConfig.for_model(**values)
        assert auto_class(config) is found
