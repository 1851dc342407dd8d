"""Check a recipe against the model and all data before any work starts."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lrc.compressors.calibrate.layer_check import check_layers
from lrc.compressors.checkpoint.loading_check import check_loading
from lrc.compressors.checkpoint.plain import is_plain, loads_packed
from lrc.compressors.corpus.documents import check_source
from lrc.compressors.corpus.examples import check_task_data
from lrc.compressors.evaluate.gates import check_gate_names
from lrc.compressors.evaluate.generations import read_prompts
from lrc.compressors.evaluate.harness import check_tasks
from lrc.compressors.evaluate.perplexity import check_halves, check_window
from lrc.compressors.io.journal import RESULTS, WORK
from lrc.compressors.layers.experts import ordinary_linears
from lrc.compressors.models.architecture import Architecture, build
from lrc.compressors.models.model_kinds import kind_of
from lrc.compressors.models.source import Source, load_tokenizer, locate
from lrc.compressors.models.source_check import check_contents
from lrc.compressors.planning.compile import Compiled, StageCompiler, compile_plan
from lrc.compressors.planning.encoder_recipe import check_examples, check_recipe_kind
from lrc.compressors.planning.problems import Problems
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Recipe
from lrc.configs.sources import fractions


@dataclass(frozen=True)
class CheckedModel:
    """A source whose files and layers have been checked; no weight has been read."""

    source: Source
    architecture: Architecture
    warnings: Sequence[str]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the source, loaded once."""
        return load_tokenizer(self.source)


@dataclass(frozen=True)
class Prepared(Compiled):
    """A recipe whose names have all been looked up, and its plan; no weight has been read."""

    recipe: Recipe
    checked: CheckedModel

    @property
    def source(self) -> Source:
        """Files of the source."""
        return self.checked.source

    @property
    def dense(self) -> Architecture:
        """Architecture of the source."""
        return self.checked.architecture

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the source."""
        return self.checked.tokenizer


def prepare(
    recipe: Recipe,
    stages: Mapping[str, StageCompiler],
    *,
    weights: bool = True,
    checked: MutableMapping[str, CheckedModel] | None = None,
) -> Prepared:
    """Look up the names in a recipe and compile it; everything invalid is rejected here.

    Parameters
    ----------
    stages : mapping of str to StageCompiler
        The registry of stages.
    weights : bool
        Whether to download weights from the Hub now.
    checked : mutable mapping, optional
        Models of earlier calls, which are not read and checked again; new ones are added. Reading
        the metadata of a GGUF file takes seconds.

    Raises
    ------
    RecipeError, ModelError, DataError
    """
    problems = Problems()
    for spec in recipe.evaluate.perplexity:
        with _collected(problems):
            check_source(spec.source, part="evaluation")
    with _collected(problems):
        read_prompts(recipe.evaluate.generations)
    with _collected(problems):
        if recipe.calibration.task is not None:
            check_task_data(recipe.calibration.task, "calibration")
    with _collected(problems):
        if recipe.evaluate.task is not None:
            check_task_data(recipe.evaluate.task, "evaluation")
    if recipe.calibration.task is None:
        for name in fractions(recipe.calibration.source):
            with _collected(problems):
                check_source(name, part="calibration")
    known = {} if checked is None else checked
    model = recipe.model.model_dump_json()
    with _collected(problems):
        source = known[model].source if model in known else locate(recipe.model, weights=weights)
    _check_output(recipe, problems)
    problems.raise_if_any()
    kind = kind_of(source.config)
    if not kind.encoder:
        windows = {
            f"evaluate.perplexity[{number}].window": spec.window
            for number, spec in enumerate(recipe.evaluate.perplexity)
        }
        if recipe.calibration.task is None:
            windows["calibration.length"] = recipe.calibration.length
        for key, window in windows.items():
            with _collected(problems):
                check_window(source.config, window, key)
                check_halves(kind, window, key)
    if model not in known:
        known[model] = _checked(source)
    found = known[model]
    source, dense, warnings = found.source, found.architecture, found.warnings
    before = len(problems)
    check_recipe_kind(recipe, dense, problems)
    if len(problems) > before:
        problems.raise_if_any()
    if dense.kind.padded:
        check_examples(recipe, dense.model)
    with _collected(problems):
        compiled = compile_plan(recipe, source, dense, stages)
    with _collected(problems):
        check_tasks(recipe.evaluate.tasks)
        check_gate_names(recipe.evaluate.gates, recipe.evaluate)
    if problems:
        raise RecipeError(problems)
    warnings = [*warnings, *compiled.plan.warnings, *_needs_lrc(compiled)]
    compiled = replace(compiled, plan=replace(compiled.plan, warnings=warnings))
    check_loading(compiled.plan, compiled.architecture.model)
    prepared = Prepared(**vars(compiled), recipe=recipe, checked=known[model])
    if source.gguf is None and source.weights_local:
        _ = prepared.tokenizer
    return prepared


def _checked(source: Source) -> CheckedModel:
    dense, warnings = build(source), list[str]()
    if source.weights_local:  # reads headers only
        source, dense, warnings = check_contents(source, dense)
    return CheckedModel(source, check_layers(dense), warnings)


def _check_output(recipe: Recipe, problems: Problems) -> None:
    """Report inputs that the run itself would delete or replace, as with ``--overwrite``."""
    texts = {
        "calibration.source": recipe.calibration.source,
        "calibration.task.data": recipe.calibration.task and recipe.calibration.task.data,
        "evaluate.task.data": recipe.evaluate.task and recipe.evaluate.task.data,
        **{f"stages[{i}].heal.source": o.source for i, o in recipe.stages_of("heal").items()},
    }
    inputs = [(key, name) for key, source in texts.items() if source for name in fractions(source)]
    inputs += {
        "model.path": recipe.model.path,
        "model.tokenizer": recipe.model.tokenizer,
        **{
            f"evaluate.perplexity[{i}].source": spec.source
            for i, spec in enumerate(recipe.evaluate.perplexity)
        },
        "evaluate.generations.file": recipe.evaluate.generations.file,
        "evaluate.tasks.include_path": recipe.evaluate.tasks.include_path,
        **{
            f"stages[{i}].decompose.plan": stage.plan
            for i, stage in recipe.stages_of("decompose").items()
        },
        **{
            f"stages[{i}].decompose.latency_table": stage.latency_table
            for i, stage in recipe.stages_of("decompose").items()
        },
    }.items()
    output = Path(recipe.output).expanduser()
    owned = [(output / name).resolve() for name in (WORK, *RESULTS)]
    for key, given in inputs:
        path = Path(given or "").expanduser()
        if given and path.exists() and any(path.resolve().is_relative_to(one) for one in owned):
            problems.add(
                "contradiction",
                "output",
                f"must not contain what the run reads, got {recipe.output} with {key} in it, "
                f"{given}; choose another output, or move that first",
            )


def _needs_lrc(compiled: Compiled) -> list[str]:
    """Return a warning if only the model class prevents a plain checkpoint of integers."""
    model, modules = compiled.architecture.model, compiled.plan.modules()
    linears = [linear.name for linear in compiled.architecture.linears]
    if not modules or not is_plain(modules, [*linears, *ordinary_linears(model)]):
        return []
    experts = modules.keys() - {*ordinary_linears(model)}
    if not experts and loads_packed(model, modules):
        return []
    return [
        f"stages: {type(model).__name__} cannot be loaded with packed integers by transformers "
        "alone, so loading the result needs `import lrc`"
    ]


@contextmanager
def _collected(problems: Problems) -> Iterator[None]:
    """Collect the problems of a check, so that later checks run too."""
    try:
        yield
    except RecipeError as error:
        problems += error.problems
