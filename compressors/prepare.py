"""Look up every name in a recipe before anything expensive starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig

from lrc.compressors.corpus.documents import check_source
from lrc.compressors.evaluate.gates import check_gate_names
from lrc.compressors.evaluate.harness import check_tasks
from lrc.compressors.evaluate.perplexity import check_window
from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.source import Source, load_tokenizer, locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.compile import make_plan
from lrc.compressors.planning.plan import Plan
from lrc.compressors.slicing.slice_stage import PENDING, plan_slices, warnings
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """A recipe whose every name has been looked up, and the plan that follows; no weight read.

    `architecture` is what is decomposed: that of the source, or what the slicing stages make of it.
    """

    recipe: Recipe
    source: Source
    architecture: Architecture
    plan: Plan
    dense: Architecture
    """Of the source."""
    sliced: list[PreTrainedConfig] = field(default_factory=list)
    """The config behind every slicing stage, as planned."""

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the source, loaded once."""
        return load_tokenizer(self.source)


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
    problems: list[str] = []
    for spec in recipe.evaluate.perplexity:
        with _noted(problems):
            check_source(spec.source, part="evaluation")
    with _noted(problems):
        check_source(recipe.calibration.source, part="calibration")
    with _noted(problems):
        source = locate(recipe.model, weights=weights)
    if problems:
        raise RecipeError(problems)
    for number, spec in enumerate(recipe.evaluate.perplexity):
        with _noted(problems):
            check_window(source.config, spec.window, f"evaluate.perplexity[{number}].window")
    with _noted(problems):
        check_window(source.config, recipe.calibration.length, "calibration.length")
    dense = architecture = build(source)
    with _noted(problems):
        cuts, configs, architecture = plan_slices(recipe, source, dense)
        plan = make_plan(recipe, source, architecture)
        noted = [*warnings(recipe, dense), *plan.warnings]
        plan = replace(plan, slices=cuts, warnings=noted)
    with _noted(problems):
        check_tasks(recipe.evaluate.tasks)
        check_gate_names(recipe.evaluate.gates, recipe.evaluate)
    if problems:
        raise RecipeError(problems)
    prepared = Prepared(recipe, source, architecture, plan, dense, configs)
    if source.gguf is None and source.weights_local:
        WeightReader(source.folder, dense)  # the headers: every file whole, every tensor
        _ = prepared.tokenizer
    return prepared


def planned_again(prepared: Prepared, architecture: Architecture) -> Plan:
    """Return the plan on the shapes that data have chosen, where a slicing stage left them pending.

    Raises
    ------
    RecipeError
        If a decomposition does not fit those shapes.
    """
    plan = prepared.plan
    if not any(PENDING in cut.facts for cut in plan.slices):
        return plan
    again = make_plan(prepared.recipe, prepared.source, architecture)
    return replace(again, slices=plan.slices, warnings=plan.warnings)


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Let the checks after this one run too: all problems of a recipe are shown at once."""
    try:
        yield
    except RecipeError as error:
        problems += error.problems
