"""What a recipe may contain for an encoder-decoder model."""

from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.model_kinds import longest_input
from lrc.compressors.planning.problems import Problems
from lrc.configs.recipe import Recipe
from lrc.configs.sources import fractions

CODE = "unsupported-by-model"


def check_encoder_decoder(recipe: Recipe, architecture: Architecture, problems: Problems) -> None:
    """Report what a recipe requests and encoder-decoder models do not support."""
    calibration, evaluate = recipe.calibration, recipe.evaluate
    model = f"{type(architecture.model).__name__}, an encoder-decoder model"
    decomposed = recipe.stages_of("decompose")
    causal = {
        "evaluate.tasks": evaluate.tasks.names,
        "evaluate.streaming": evaluate.streaming == "always",
        "calibration.chat_template": calibration.chat_template,
        **{f"stages[{i}].slice": True for i in recipe.stages_of("slice")},
        **{f"stages[{i}].heal": True for i in recipe.stages_of("heal")},
        **{f"stages[{i}].decompose.elastic": bool(o.elastic) for i, o in decomposed.items()},
        **{f"stages[{i}].decompose.drafter": bool(o.drafter) for i, o in decomposed.items()},
        **{f"stages[{i}].decompose.measure": o.measure == "latency" for i, o in decomposed.items()},
        **{
            f"stages[{i}].{kind}.{key}": getattr(options, key, None) is not None
            for kind in ("decompose", "quantize")
            for i, options in recipe.stages_of(kind).items()
            for key in ("embeddings", "lm_head", "serve")
        },
    }
    for where, requested in causal.items():
        if requested:
            problems.add(CODE, where, f"is for decoder-only models, got it for {model}; remove it")
    if calibration.task is None and "self" in fractions(calibration.source):
        problems.add(
            CODE,
            "calibration.source",
            f"must not be 'self' for {model}, which writes no text without a source; give a text "
            "or a 'task'",
        )
    for name, task in (("calibration", calibration.task), ("evaluate", evaluate.task)):
        if task is not None and task.target is None:
            problems.add(
                CODE,
                f"{name}.task.target",
                f"must name the column of the texts to write for {model}, got none; write pairs "
                "of texts in two columns, such as 'text' and 'target'",
            )
    _check_lengths(recipe, architecture, problems)


def _check_lengths(recipe: Recipe, architecture: Architecture, problems: Problems) -> None:
    longest = longest_input(architecture.model)
    if longest is None:
        return
    calibration, evaluate = recipe.calibration, recipe.evaluate
    lengths = {"calibration.task.length": calibration.task, "evaluate.task.length": evaluate.task}
    for where, task in lengths.items():
        if task is not None and task.length >= longest:  # one position may be added as padding
            problems.add(
                "invalid-value",
                where,
                f"must be below {longest:,}, the positions of the model, got {task.length:,}; "
                "lower length",
            )
