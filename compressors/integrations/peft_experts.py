"""Names of compressed experts in adapters of PEFT.

For some families, PEFT replaces targets such as ``down_proj``, and names in files of adapters, by
those of 3-D parameters, which newer versions of transformers have for all experts of a layer.
Models with compressed experts have separate layers instead, under the names that are replaced:
without this module, layers would be left out, and adapters not loaded, without a message.
"""

from functools import wraps
from importlib import import_module
from typing import Any

from lrc.compressors.layers.experts import split_modules
from lrc.compressors.models.expert_tensors import own_conversions


def register() -> None:
    """Make adapters keep the names of separate experts, once."""
    conversion: Any = import_module("peft.utils.transformers_weight_conversion")
    original = getattr(conversion, "convert_peft_config_for_transformers", None)
    if original is None or hasattr(original, "__wrapped__"):  # not all versions of PEFT have it
        return
    users: list[Any] = [conversion, import_module("transformers.integrations.peft")]
    for module in users:
        module.get_model_conversion_mapping = own_conversions

    @wraps(original)
    def convert_config(peft_config: Any, model: Any, *args: Any, **options: Any) -> None:
        if next(split_modules(model), None) is None:
            original(peft_config, model, *args, **options)

    conversion.convert_peft_config_for_transformers = convert_config
