"""From a recipe and the shapes of a model to a plan; what cannot work is refused here.

No weight is read. Ranks that the singular values of the weights or statistics decide stay pending:
known are their budget and that it can be met.
"""

from bisect import bisect_left
from collections import Counter

from lrc.compressors.layers import FORMS, RankForm
from lrc.compressors.methods.table import METHODS
from lrc.compressors.models.architecture import Architecture
from lrc.compressors.models.source import Source
from lrc.compressors.planning.budget import Whole, cheapest, even_share, unreachable
from lrc.compressors.planning.embedding_tasks import plan_outside, refuse_other
from lrc.compressors.planning.patterns import refuse_shapes, refuse_share
from lrc.compressors.planning.plan import Matrix, Plan
from lrc.compressors.planning.quantization import (
    explained,
    plan_rounding,
    refuse_before_rounding,
    refuse_schemes,
)
from lrc.compressors.planning.required_statistics import method_needs
from lrc.compressors.planning.targets import Stage, find_stages
from lrc.compressors.planning.user_plan import GivenPlan, apply_given, read_given, refuse_strangers
from lrc.compressors.planning.weight_groups import WORDS, Measure, Unit, ratios_of
from lrc.configs.decompose import DecomposeBase
from lrc.configs.decompose_methods import Learning
from lrc.configs.errors import RecipeError
from lrc.configs.recipe import Recipe


def make_plan(recipe: Recipe, source: Source, architecture: Architecture) -> Plan:
    """Decide what happens to every linear.

    Raises
    ------
    RecipeError
        Every refusal at once: patterns that match nothing, a matrix claimed by two stages, ranks
        that do not exist, budgets that cannot be met, plan files that do not fit the model, a plan
        that makes nothing smaller.
    """
    problems: list[str] = []
    number_bits = source.dtype.itemsize * 8
    outside = plan_outside(recipe, architecture, number_bits, problems)
    whole = Whole(architecture.stored_parameters(), outside)
    stages = find_stages(recipe, source, architecture, problems)
    claimed = {m.name for stage in stages for m in stage.matrices}
    known = {linear.name for linear in architecture.linears}
    decided: dict[str, Matrix] = {}
    budgets: list[int | None] = [None for _ in recipe.stages]
    texts: dict[int, str] = {}
    for stage in stages:
        _refuse_options(recipe, stage, problems)
        budget = None
        if stage.options.plan is not None:
            given = read_given(stage.options.plan, stage.where, problems)
            units = [unit.dense() for unit in stage.units]
            if given is not None:
                texts[stage.number] = given.text
                units = _apply(given, stage, claimed, known, problems)
        else:
            units, budget = _decide(stage, whole, problems)
        budgets[stage.number] = budget
        decided |= {m.name: m for unit in units for m in unit.members}
    refuse_other(texts, outside, problems)
    decided = plan_rounding(recipe, architecture, number_bits, decided, problems)
    # A size may ask for no more than an embedding saves; a 'keep' is of the linears alone.
    met = outside and any(stage.options.size is not None for stage in stages)
    smaller = met or any(m.factored for m in decided.values())
    if stages and not problems and not smaller:
        problems.append(
            "stages: every targeted matrix stays dense, so nothing would be smaller; "
            f"{_why_dense(stages[0])}"
        )
    if problems:
        raise RecipeError(explained(_without_repeats(problems), recipe))
    ordered = [decided[lin.name] for lin in architecture.linears if lin.name in decided]
    return Plan(
        matrices=ordered,
        parameters=whole.parameters,
        bytes=whole.bytes,
        source=recipe.model.path,
        source_file_bytes=source.file_bytes,
        source_quantized=source.gguf is not None,
        dtype=recipe.model.dtype,
        architecture=type(architecture.model).__name__,
        warnings=_warnings(recipe, ordered),
        budgets=budgets,
        given=texts,
        outside=outside,
    )


def _refuse_options(recipe: Recipe, stage: Stage, problems: list[str]) -> None:
    """Refuse options that do not go together."""
    options, where = stage.options, stage.where
    if options.max_loss < 1 and options.allocation != "lagrangian" and options.plan is None:
        problems.append(
            f"{where}.max_loss: needs allocation: lagrangian, which predicts losses, got "
            f"{options.allocation}; change allocation or leave max_loss out"
        )
    refuse_before_rounding(where, options, recipe, problems)
    refuse_schemes(f"{where}.schemes", getattr(options, "schemes", []), stage.matrices, problems)
    if options.size is not None and len(recipe.decompositions) > 1:
        problems.append(
            f"{where}.size: must be the budget of a single stage, got "
            f"{len(recipe.decompositions)} stages; give every stage its 'keep'"
        )
    compensates = any(each.compensate is not None for each in recipe.works.values())
    if METHODS[options.method].has_bias and compensates:
        problems.append(
            f"{where}.method: {options.method} cannot stand beside 'compensate', because the means "
            "behind its biases are those of the dense model's inputs; leave compensate out or take "
            "another method"
        )


def _apply(
    given: GivenPlan,
    stage: Stage,
    claimed: set[str],
    known: set[str],
    problems: list[str],
) -> list[Unit]:
    refuse_strangers(given, claimed, known, problems)
    return apply_given(given, stage.units, problems)


def _decide(stage: Stage, whole: Whole, problems: list[str]) -> tuple[list[Unit], int | None]:
    """Give every unit its rank, or leave it pending; returns the budget of the pending ones."""
    options, measure = stage.options, stage.options.measure
    units, before = stage.units, len(problems)
    refuse_shapes(stage.where, units, problems)
    if len(problems) > before:
        return [u.dense() for u in units], None
    fixed = [_overridden(u, stage, problems) for u in units if u.first.name in stage.overrides]
    rest = [u for u in units if u.first.name not in stage.overrides]
    spent = sum(u.spent(measure) for u in fixed)
    before = len(problems)
    if options.size is not None:
        schemes = getattr(options, "schemes", [])
        budget = whole.budget_bits(options.size, stage.matrices, stage.where, problems, schemes)
        budget -= spent
    else:
        assert options.keep is not None
        if options.keep == 1:
            return fixed + [u.dense(note="keep is 1") for u in rest], None
        budget = int(options.keep * sum(u.dense_cost(measure) for u in units)) - spent
    if rest:
        _refuse_multiple(stage, rest, problems)
        _refuse_ratios(stage, rest, problems)
    if len(problems) > before or not rest:
        return fixed + [u.dense() for u in rest], None
    smallest = cheapest(rest, options)
    if smallest > budget and not (options.allocation == "uniform" and options.keep):
        problems.append(unreachable(stage.where, options, units, budget, smallest))
        return fixed + [u.dense() for u in rest], None
    if options.allocation == "uniform":
        if options.keep:
            refuse_share(f"{stage.where}.keep", rest, options.keep, measure, problems)
        share = options.keep or even_share(budget, rest, options)
        if share <= options.min_keep and options.size is not None:
            problems.append(
                f"{stage.where}.size: leaves every matrix a share of {max(share, 0):.4g} alike, "
                f"with 'min_keep' {options.min_keep:g} and 'rank_multiple' "
                f"{options.rank_multiple}; raise size, or take allocation: lagrangian"
            )
            return fixed + [u.dense() for u in rest], None
        return fixed + [_even(u, share, stage, problems) for u in rest], None
    share = budget / sum(u.dense_cost(measure) for u in rest)
    pending = [Unit(tuple(m.undecided(options.allocation, share) for m in u.members)) for u in rest]
    return fixed + pending, budget


def _overridden(unit: Unit, stage: Stage, problems: list[str]) -> Unit:
    number = stage.overrides[unit.first.name]
    override, options = stage.options.overrides[number], stage.options
    if override.rank is None:
        assert override.keep is not None
        key = f"{stage.where}.overrides[{number}].keep"
        refuse_share(key, [unit], override.keep, options.measure, problems)
        return _within(unit, override.keep, options)
    d_out, d_in = unit.first.shape
    if not issubclass(FORMS[unit.first.form], RankForm):
        problems.append(
            f"{stage.where}.overrides[{number}].rank: {options.method} has no ranks; give 'keep'"
        )
        return unit.dense()
    if override.rank > unit.largest_step:
        problems.append(
            f"{stage.where}.overrides[{number}].rank: must be in [1, {unit.largest_step}] for "
            f"{unit.first.name} [{d_out}, {d_in}], got {override.rank}; lower rank or list the "
            "layer under 'ignore'"
        )
        return unit.dense()
    if unit.bits({"rank": override.rank}) >= unit.source_bits:
        return unit.dense(note=f"factors of rank {override.rank} would be larger than the matrix")
    return unit.at(override.rank)


def _within(unit: Unit, keep: float, options: DecomposeBase) -> Unit:
    """Give a unit the largest rank within its share."""
    if keep == 1:
        return unit.dense(note="keep is 1")
    step = unit.step_within(keep, options.measure, multiple=options.rank_multiple)
    if step == 0:
        least = unit.sizes_at(options.rank_multiple)
        words = FORMS[unit.first.form].written(*unit.first.shape, least)
        needed = f"{'rank ' if 'rank' in least else ''}{words} needs more than {keep:.0%}"
        return unit.dense(note=f"too small: {needed} of its {WORDS[options.measure]}")
    return unit.at(unit.sizes_at(step))


def _even(unit: Unit, share: float, stage: Stage, problems: list[str]) -> Unit:
    options = stage.options
    decided = _within(unit, share, options)
    floor = options.min_keep * unit.dense_cost(options.measure)
    if decided.sizes is not None and decided.spent(options.measure) < floor:
        problems.append(
            f"{stage.where}.min_keep: {unit.first.name} {list(unit.first.shape)} has no rank that "
            f"keeps between {options.min_keep:g} and {share:g}, with 'rank_multiple' "
            f"{options.rank_multiple}; lower min_keep or rank_multiple"
        )
    return decided


def _refuse_multiple(stage: Stage, units: list[Unit], problems: list[str]) -> None:
    """Refuse a multiple beyond every rank that makes its matrix cheaper."""
    multiple = stage.options.rank_multiple
    largest = max(u.step_within(1, stage.options.measure) for u in units)
    if 0 < largest < multiple:
        problems.append(
            f"{stage.where}.rank_multiple: must be in [1, {largest}], the largest rank that makes "
            f"a matrix of this stage smaller, got {multiple}; lower rank_multiple"
        )


def _refuse_ratios(stage: Stage, units: list[Unit], problems: list[str]) -> None:
    """Refuse ratios at which the atoms for one coefficient alone cost what every matrix does."""
    if not isinstance(stage.options, Learning):
        return
    measure = stage.options.measure
    most = max(_most_atoms(u, measure) for u in units)
    for ratio in ratios_of(stage.options):
        fits = any(u.at_ratio(ratio).step_within(1, measure) for u in units)
        if most > 0 and not fits:
            problems.append(
                f"{stage.where}.ratio: must be in [1, {most}], beyond which the smallest "
                f"dictionaries are as large as the matrices of this stage, got {ratio:g}; lower it"
            )


def _most_atoms(unit: Unit, measure: Measure) -> int:
    """Return the most atoms that one coefficient an output may have in a smaller matrix."""
    return bisect_left(
        range(1, min(unit.first.shape) + 1),
        unit.dense_cost(measure),
        key=lambda atoms: unit.cost({"atoms": atoms, "nonzeros": 1}, measure),
    )


def _why_dense(stage: Stage) -> str:
    if stage.options.plan is not None:
        return f"give some matrices in {stage.options.plan} a form and a rank"
    if stage.options.keep == 1:
        return "lower 'keep'"
    if stage.options.rank_multiple > 1:
        return "lower 'rank_multiple', or raise 'keep' or 'size'"
    return "raise 'keep' or 'size'" + (
        ", or lower 'ratio'" if hasattr(stage.options, "ratio") else ""
    )


def _warnings(recipe: Recipe, matrices: list[Matrix]) -> list[str]:
    """Name what will work but should be known."""
    incomparable = [
        f"stages[{index}].decompose.allocation: lagrangian compares losses between matrices, and "
        f"those of {options.method} leave out what an output matters; mostly far worse than uniform"
        for index, options in recipe.decompositions.items()
        if options.allocation == "lagrangian" and options.plan is None
        if not METHODS[options.method].needs & {"gradients", "row_fisher"}
    ]
    tokens = recipe.calibration.samples * recipe.calibration.length
    measured = [m.shape[1] for m in matrices if method_needs(m, recipe)]
    narrow = Counter(width for width in measured if tokens < 4 * width)
    return incomparable + [
        f"calibration: {tokens} tokens are few for {count} matrices of input width {width}; "
        f"{4 * width} or more are advised"
        for width, count in sorted(narrow.items())
    ]


def _without_repeats(problems: list[str]) -> list[str]:
    """Keep the first of problems that differ only in the layer, and count the rest."""
    kept: dict[str, list[str]] = {}
    for problem in problems:
        kept.setdefault(problem.split(":", 1)[0], []).append(problem)
    return [
        group[0] + (f" (and {len(group) - 1} more of this kind)" if len(group) > 1 else "")
        for group in kept.values()
    ]
