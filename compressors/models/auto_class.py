"""Which Auto class of transformers builds and loads a model that predicts the next token."""

from collections.abc import Mapping
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)

CLASSES: dict[Any, Any] = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING,
}
"""Auto class -> the classes of models that it has for classes of configs."""


def auto_class(config: Mapping[str, Any] | PreTrainedConfig) -> Any:
    """Return the Auto class for a model, or None if none of `CLASSES` knows it.

    Parameters
    ----------
    config : mapping or PreTrainedConfig
        The content of its ``config.json``, or the config that was read from it. For some types
        transformers has a class with and one without the towers for images and sound:
        `architectures` states which of them was saved. The `auto_map` names classes that come with
        the model.
    """
    if isinstance(config, Mapping):
        values, model_type = config, str(config.get("model_type"))
        # Its `get` does not load the classes.
        known = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401
    else:
        values, known = vars(config), type(config)
    own, saved = values.get("auto_map") or {}, values.get("architectures") or []
    fitting = [each for each, models in CLASSES.items() if each.__name__ in own or known in models]
    if fitting[:1] == [AutoModelForCausalLM]:
        for each in fitting[1:]:
            if known in CLASSES[each] and CLASSES[each][known].__name__ in saved:
                return each
    return fitting[0] if fitting else None
