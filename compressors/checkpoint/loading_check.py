"""Check, before any work starts, that transformers can build the planned checkpoint."""

import json
from typing import Any

from accelerate import init_empty_weights

from lrc.compressors.checkpoint.elastic_budgets import elastic_table
from lrc.compressors.checkpoint.format import quantization_config
from lrc.compressors.checkpoint.lrc_config import LrcConfig
from lrc.compressors.checkpoint.quantizer import LrcQuantizer
from lrc.compressors.checkpoint.writer import config_text
from lrc.compressors.layers import ComponentConfig, WeightConfig
from lrc.compressors.layers.experts import split_modules
from lrc.compressors.layers.model_shapes import tables_of
from lrc.compressors.models.configuration import first_line
from lrc.compressors.planning.plan import Plan
from lrc.configs.errors import ModelError

PLACEHOLDER = (ComponentConfig("low_rank", {"rank": 1}),)
"""For weights whose components an allocation will choose."""


def check_loading(plan: Plan, model: Any) -> None:
    """Build the compressed model, without weights, from the config.json that the plan would write.

    Parameters
    ----------
    plan : Plan
        Gives the compressed layers; those that an allocation will choose are taken as low rank.
    model : PreTrainedModel
        Skeleton of the model that is decomposed.

    Raises
    ------
    ModelError
        If transformers could not load the result.
    """
    modules = plan.modules() | {
        weight.name: WeightConfig(task.shape, PLACEHOLDER)
        for task in plan.tasks
        for weight in task.weights
        if task.pending
    }
    # All experts are alike, and there can be thousands.
    others = {
        f"{name}.{number}."
        for name, experts in split_modules(model)
        for number in range(1, experts.n_experts)
    }
    modules = {name: c for name, c in modules.items() if f"{_parent(name)}." not in others}
    tables = {**tables_of(model.config), **elastic_table(modules, plan.elastic)}
    block = quantization_config(modules, tables)
    try:
        text = config_text(model, block, plan.model.dtype)
        config = type(model.config).from_dict(json.loads(text, object_hook=_special_float))
        with init_empty_weights(include_buffers=False):
            result = type(model)(config)
        if block:
            stored = config.quantization_config
            options = LrcConfig(**{k: v for k, v in stored.items() if k != "quant_method"})
            LrcQuantizer(options).rebuild_(result)
    except Exception as error:  # transformers raises nearly anything
        raise ModelError(
            f"model: transformers could not load the result of {type(model).__name__} from its "
            f"config.json ({first_line(error)}); exclude the layers named above "
            "with 'ignore', or use another model"
        ) from error


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _special_float(content: dict[str, Any]) -> Any:
    """Decode ``{"__float__": "Infinity"}``, as transformers does when it reads a config.json."""
    return float(content["__float__"]) if content.keys() == {"__float__"} else content
