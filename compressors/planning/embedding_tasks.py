"""Tasks for the matrices outside the decoder layers: input embedding and output head."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from lrc.compressors.layers import ComponentConfig, QuantizationArgs, WeightConfig
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.planning.problems import Problems
from lrc.compressors.planning.tasks import LayerTask, QuantizationTask, Weight

GETTERS = {"embeddings": "get_input_embeddings", "lm_head": "get_output_embeddings"}
"""Recipe key -> method of the model."""


def embedding_task(
    key: str,
    args: QuantizationArgs,
    where: str,
    stage: int,
    architecture: Architecture,
    number_bits: int,
    problems: Problems,
) -> LayerTask | None:
    """Return the task that quantizes embedding or head, or None with the reason in `problems`.

    Its results are stored in the journal as those of one more layer, after the last one.
    """
    model = architecture.model
    module: Any = None
    with suppress(NotImplementedError):  # some classes do not implement it
        module = getattr(model, GETTERS[key])()
    name = next((name for name, each in model.named_modules() if each is module), "")
    problem = _unsupported(key, module, name, architecture)
    if problem is not None:
        problems.add("unsupported-embedding", where, problem)
        return None
    d_out, d_in = module.weight.shape
    if not args.divides(d_in):
        problems.add(
            "indivisible-rows",
            where,
            f"must have groups that divide its rows of {d_in}, got {args} for [{d_out}, {d_in}]; "
            "change the number after -g, or leave it out for one scale per row",
        )
        return None
    config = WeightConfig((d_out, d_in), (ComponentConfig("dense", {}, args),))
    task = LayerTask(
        weights=(Weight(name, len(architecture.layer_names)),),
        config=config,
        number_bits=number_bits,
        stage=stage,
        method="rtn",
        quantize=QuantizationTask(stage, "rtn", args),
    )
    if task.bits >= task.dense_bits:
        problems.add(
            "no-saving",
            where,
            f"must take fewer bits than the {number_bits} of the model's numbers, got {args}; "
            "lower the bits, or raise the group size",
        )
        return None
    return task


def check_user_embeddings(
    stage: int,
    configs: Mapping[tuple[str, ...], WeightConfig],
    tasks: list[LayerTask],
    problems: Problems,
) -> None:
    """Report user plans whose embedding or head is quantized differently than in the recipe.

    The recipe decides how these are quantized; edits of the plan would be ignored.
    """
    planned = {task.name: task.config for task in tasks}
    for (name, *_), found in configs.items():
        if planned.get(name) != found:
            got = planned[name].quantization if name in planned else "nothing"
            problems.add(
                "user-plan-mismatch",
                f"stages[{stage}].decompose.plan",
                f"quantizes {name} to {found.quantization}, got {got} in the recipe; set the same "
                "in both",
            )


def _unsupported(key: str, module: Any, name: str, architecture: Architecture) -> str | None:
    """Return why a module cannot be quantized; None if it can."""
    stored = f"{name}.weight"
    other = architecture.tied.get(stored, "").removesuffix(".weight")
    if key == "embeddings":
        if type(module) is not nn.Embedding:
            return (
                f"needs an embedding that only looks up rows, got a {type(module).__name__}; leave "
                "the key out"
            )
        if other:
            return f"needs an embedding that is stored under its own name, got one tied to {other}"
        for tied in (name for name, owner in architecture.tied.items() if owner == stored):
            head = tied.removesuffix(".weight")
            if getattr(architecture.model.get_submodule(head), "bias", None) is not None:
                return f"needs a tied head without a bias, got {head} with one; leave the key out"
        return None
    if not isinstance(module, nn.Linear):
        got = "none" if module is None else f"a {type(module).__name__}"
        return f"needs a linear layer that computes the logits, got {got}; leave the key out"
    if other:
        embedding = architecture.model.get_submodule(other)
        both = _unsupported("embeddings", embedding, other, architecture)
        remedy = "leave the key out" if both else "set 'embeddings', which quantizes both"
        return f"needs a separate head, got one that is tied to {other}; {remedy}"
    return None
