"""Build the result of a plan from its config, without weights, before any work starts."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from lrc.compressors.checkpoint.companions import copy_companions
from lrc.compressors.checkpoint.format import quantization_config
from lrc.compressors.checkpoint.quantizer import LrcConfig, LrcQuantizer
from lrc.compressors.checkpoint.writer import write_config
from lrc.compressors.layers import ComponentConfig, WeightConfig
from lrc.compressors.layers.model_shapes import tables_of
from lrc.compressors.models.configuration import first_line
from lrc.compressors.models.source import Source
from lrc.compressors.planning.plan import Plan
from lrc.configs.errors import ModelError

PLACEHOLDER = (ComponentConfig("low_rank", {"rank": 1}),)
"""For weights whose components an allocation will choose."""


def rehearse_loading(plan: Plan, model: Any, source: Source) -> None:
    """Write the config of the result, read it back, and replace the layers that it lists.

    Parameters
    ----------
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
    block = quantization_config(modules, tables_of(model.config))
    trusted = source.spec.trust_remote_code
    try:
        with TemporaryDirectory() as folder:
            write_config(Path(folder), model.config, block, plan.model.dtype)
            copy_companions(source, Path(folder), code_only=True)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
            with init_empty_weights(include_buffers=False):
                result: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        if block:
            stored = config.quantization_config
            options = LrcConfig(**{k: v for k, v in stored.items() if k != "quant_method"})
            LrcQuantizer(options).rebuild_(result)
    except Exception as error:  # transformers raises nearly anything
        raise ModelError(
            f"model: transformers could not load the result of {type(model).__name__} from its "
            f"config.json ({first_line(error)}); give other targets or another model"
        ) from error
