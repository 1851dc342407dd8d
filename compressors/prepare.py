"""Look up every name in a recipe before anything expensive starts."""

from dataclasses import dataclass

from lrc.compressors.corpus import check_source
from lrc.compressors.evaluate import check_gate_names, check_tasks, check_window
from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.source import Source, locate
from lrc.compressors.plan import Plan, make_plan
from lrc.configs.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """A recipe whose every name has been looked up, and the plan that follows; no weight read."""

    recipe: Recipe
    source: Source
    architecture: Architecture
    plan: Plan


def prepare(recipe: Recipe, *, weights: bool = True) -> Prepared:
    """Look up what a recipe names, and plan; every refusal happens here.

    Parameters
    ----------
    weights : bool
        Whether weights on the Hub are downloaded now; local ones are only looked at.

    Raises
    ------
    RecipeError, ModelError, DataError
    """
    check_gate_names(recipe.evaluate.gates, recipe.evaluate)
    for spec in recipe.evaluate.perplexity:
        check_source(spec.source, part="evaluation")
    if recipe.calibration.source != "self":
        check_source(recipe.calibration.source, part="calibration")
    source = locate(recipe.model, weights=weights)
    for spec in recipe.evaluate.perplexity:
        check_window(source.config, spec.window)
    check_window(source.config, recipe.calibration.length, "calibration.length")
    architecture = build(source)
    plan = make_plan(recipe, source, architecture)
    if recipe.evaluate.tasks.names:
        check_tasks(recipe.evaluate.tasks)
    return Prepared(recipe, source, architecture, plan)
