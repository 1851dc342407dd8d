"""What a recipe may contain for an encoder, and what only for a causal language model."""

from typing import Any

from lrc.compressors.corpus.examples import read_examples
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.model_kinds import longest_input, problem_type
from lrc.compressors.planning.encoder_decoder_recipe import check_encoder_decoder
from lrc.compressors.planning.problems import Problems
from lrc.configs.recipe import Recipe
from lrc.configs.sources import fractions

CODE = "unsupported-by-model"


def check_recipe_kind(recipe: Recipe, architecture: Architecture, problems: Problems) -> None:
    """Report what a recipe requests and this kind of model does not support."""
    if architecture.kind.encoder:
        _check_encoder(recipe, architecture, problems)
        return
    if architecture.kind.translates:
        check_encoder_decoder(recipe, architecture, problems)
        return
    requested = {
        "calibration.task": recipe.calibration.task,
        "evaluate.task": recipe.evaluate.task,
    }
    for where, value in requested.items():
        if value is not None:
            problems.add(
                CODE,
                where,
                "is for encoders and encoder-decoder models, got it for "
                f"{_name(architecture)}, a causal language model; use "
                f"{'source' if 'calibration' in where else 'tasks or perplexity'} instead",
            )


def _check_encoder(recipe: Recipe, architecture: Architecture, problems: Problems) -> None:
    name, calibration, evaluate = _name(architecture), recipe.calibration, recipe.evaluate
    causal = {
        "evaluate.perplexity": evaluate.perplexity,
        "evaluate.tasks": evaluate.tasks.names,
        "evaluate.generations": evaluate.generations.prompts or evaluate.generations.file,
        **{f"stages[{i}].slice": True for i in recipe.stages_of("slice")},
        **{f"stages[{i}].heal": True for i in recipe.stages_of("heal")},
    }
    for where, requested in causal.items():
        if requested:
            use = "; measure with 'evaluate.task' instead" if "evaluate" in where else ""
            problems.add(
                CODE,
                where,
                f"is for causal language models, got it for {name}, an encoder; remove it{use}",
            )
    if calibration.task is None:
        if "self" in fractions(calibration.source):
            problems.add(
                CODE,
                "calibration.source",
                f"must not be 'self' for {name}, an encoder, which writes no text; give a text or "
                "a 'task'",
            )
        if calibration.chat_template:
            problems.add(
                CODE,
                "calibration.chat_template",
                f"is for causal language models, got it for {name}, an encoder; remove it",
            )
    for where, task in (("calibration", calibration.task), ("evaluate", evaluate.task)):
        if task is not None and task.target is not None:
            problems.add(
                CODE,
                f"{where}.task.target",
                f"is for encoder-decoder models, got it for {name}, an encoder; remove it",
            )
    _check_labels(recipe, architecture, problems)
    _check_lengths(recipe, architecture, problems)


def _check_labels(recipe: Recipe, architecture: Architecture, problems: Problems) -> None:
    calibration, evaluate = recipe.calibration, recipe.evaluate
    problem = problem_type(architecture.model.config, architecture.kind)
    what = f"{_name(architecture)} has {problem.replace('_', ' ') or 'no classification head'}"
    classes = problem == "single_label_classification"
    if calibration.labels != "model" and not classes:
        problems.add(
            CODE,
            "calibration.labels",
            f"must be 'model' without single-label classification, got '{calibration.labels}', and "
            f"{what}; choose 'model'",
        )
    elif calibration.labels == "real" and calibration.task is None:
        problems.add(
            CODE,
            "calibration.labels",
            "must be 'model' or 'sampled' without labelled examples, got 'real'; give a 'task' "
            "with a 'label'",
        )
    if evaluate.task is not None and evaluate.task.label is not None and not classes:
        problems.add(
            CODE,
            "evaluate.task.label",
            f"needs single-label classification, got a label, and {what}; remove the key, which "
            "leaves the similarity of embeddings",
        )
    if evaluate.task is not None and evaluate.task.label is None and not evaluate.dense:
        problems.add(
            "contradiction",
            "evaluate.task",
            "compares embeddings with the dense model, but evaluate.dense is false and there is no "
            "'label'; change one of them",
        )


def _check_lengths(recipe: Recipe, architecture: Architecture, problems: Problems) -> None:
    longest = longest_input(architecture.model)
    calibration, evaluate = recipe.calibration, recipe.evaluate
    lengths = {"calibration.length": calibration.length}
    if calibration.task is not None:
        lengths = {"calibration.task.length": calibration.task.length}
    if evaluate.task is not None:
        lengths["evaluate.task.length"] = evaluate.task.length
    for where, length in lengths.items():
        if longest is not None and length > longest:
            problems.add(
                "invalid-value",
                where,
                f"must be at most {longest:,}, the model's context, got {length:,}; lower length",
            )


def check_examples(recipe: Recipe, model: Any) -> None:
    """Read the first example of local tables, and all of those that are to be scored.

    Raises
    ------
    DataError
        If columns are missing, or labels are no classes of the model.
    """
    classes = getattr(model.config, "id2label", None)
    if recipe.calibration.task is not None:
        read_examples(recipe.calibration.task, "calibration", classes=classes, limit=1)
    task = recipe.evaluate.task
    if task is not None:
        read_examples(task, "evaluation", classes=classes, limit=task.samples)


def _name(architecture: Architecture) -> str:
    return type(architecture.model).__name__
