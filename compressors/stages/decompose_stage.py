"""The stage ``decompose``: replace weights by sums of components.

Like every kind of stage (see `StageCompiler`), it is compiled in two steps: `announce` is called
for all stages of the recipe before any `compile`, which adds this stage's tasks to a `Draft` of the
plan. `run` executes the plan later.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from lrc.compressors.layers import QuantizationArgs, WeightConfig
from lrc.compressors.layers.experts import GroupedExperts
from lrc.compressors.layers.gguf_types import EXACT_SCHEMES, BlockType, block_type
from lrc.compressors.methods.base import LOW_RANK_TYPES
from lrc.compressors.methods.table import METHODS
from lrc.compressors.models.architecture import Architecture, Linear
from lrc.compressors.planning.compile import Draft
from lrc.compressors.planning.embedding_tasks import check_user_embeddings
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.targets import layer_groups, match_targets
from lrc.compressors.planning.tasks import Compensation, LayerTask, QuantizationTask, Weight
from lrc.compressors.planning.user_plan import apply_user_plan, check_names, read_user_plan
from lrc.compressors.session import Session
from lrc.compressors.stages.budgets import DecomposeTargets, add_products, spend_budget
from lrc.compressors.stages.compress_weights import compress_weights
from lrc.compressors.stages.embeddings import add_embeddings
from lrc.compressors.stages.measured_times import read_given_table
from lrc.configs.decompose import Compensate, DecomposeBase
from lrc.configs.decompose_methods import Mixed


class DecomposeStage:
    """Compilation and execution of ``decompose`` stages."""

    def announce(self, draft: Draft, stages: Mapping[int, DecomposeBase]) -> None:
        """Add the tasks of embeddings, and record which options other stages must know of."""
        for index, options in stages.items():
            draft.sized |= options.size is not None
            _announce_budgets(draft, index, options)
            if options.measure == "latency":
                draft.timed.append(index)
                if draft.table is None:
                    where = f"stages[{index}].decompose"
                    draft.table = read_given_table(options, where, draft.problems)
            draft.compensates |= options.compensate is not None
            if isinstance(options, Mixed):
                if options.serve is not None:
                    draft.served[f"stages[{index}].decompose.serve"] = options.serve
                add_embeddings(
                    draft,
                    index,
                    "decompose",
                    embeddings=options.embeddings,
                    lm_head=options.lm_head,
                )

    def compile(self, draft: Draft, stages: Mapping[int, DecomposeBase]) -> None:
        """Add the tasks of every stage.

        A task has either its final configuration or, if that depends on calibration, the number of
        the allocation that will choose it.

        Targets of all stages are resolved first, because a user plan may also list weights of other
        stages.
        """
        found = [
            _claim_targets(draft, index, options, alone=len(stages) == 1)
            for index, options in stages.items()
        ]
        for each in found:
            before = len(draft.problems)
            _check_options(draft, each)
            decided = (
                _from_user_plan(draft, each) if each.options.plan else spend_budget(draft, each)
            )
            if each.options.plan and each.options.measure == "latency":
                add_products(draft, each, decided)
            for task in decided:
                for weight in task.weights:
                    draft.tasks[weight.name] = task
            remedy, keep = _no_saving_advice(each.options), each.options.largest_keep or 1
            dense = decided and not any(task.compressed for task in decided)
            if keep < 1 and dense and each.options.plan is None and len(draft.problems) == before:
                reasons = dict.fromkeys(task.note for task in decided if task.note)
                why = f" ({'; '.join(reasons)})" if len(reasons) == 1 else ""
                draft.problems.add(
                    "nothing-smaller",
                    "stages" if each.alone else each.where,
                    f"every targeted matrix stays dense{why}, so nothing would become smaller; "
                    f"{remedy}",
                )
            draft.no_saving_advice = draft.no_saving_advice or remedy
            _warn(draft, each)

    def check(self, session: Session, stages: Mapping[int, DecomposeBase]) -> None:
        """Check nothing: calibration reads the text first."""

    def run(self, session: Session, plan: Plan) -> Plan:
        """Execute all tasks of the plan that are not done yet, of whichever stage."""
        return compress_weights(session, plan)


def _announce_budgets(draft: Draft, index: int, options: DecomposeBase) -> None:
    """Record the budgets of an elastic checkpoint, which must be the same for all stages."""
    budgets = tuple(options.elastic or ())
    if budgets and draft.elastic not in ((), budgets):
        draft.problems.add(
            "contradiction",
            f"stages[{index}].decompose.elastic",
            f"must be [{', '.join(f'{each:g}' for each in draft.elastic)}] as in an earlier stage, "
            f"got [{', '.join(f'{each:g}' for each in budgets)}]; a checkpoint has one list of "
            "budgets: make them equal",
        )
    draft.elastic = draft.elastic or budgets


def compensation(
    options: Compensate | None, linear: Linear, architecture: Architecture
) -> Compensation | None:
    """Return the options of error compensation as the task of a linear stores them.

    None for experts that do not get the selection of the router as an argument, so that it cannot
    be kept. No expert alone writes to the residual stream.
    """
    if options is None:
        return None
    if linear.expert is None:
        return Compensation(**options.model_dump())
    experts = linear.name.rsplit(".", 2)[0]
    if isinstance(architecture.model.get_submodule(experts), GroupedExperts):
        return None
    return Compensation(mix=options.mix, residual=0.0, damp=options.damp, routed=True)


def _claim_targets(
    draft: Draft, index: int, options: DecomposeBase, *, alone: bool
) -> DecomposeTargets:
    """Create a dense task for every group of targets of a stage, and add it to `draft.tasks`.

    A weight that several stages target belongs to the first one; this is reported as a problem.
    """
    where, problems = f"stages[{index}].decompose", draft.problems
    matched = match_targets(
        options.targets,
        options.ignore,
        draft.architecture.linears,
        where,
        problems,
        {f"overrides[{i}].match": o.match for i, o in enumerate(options.overrides)},
        draft.architecture.unused,
    )
    linears = []
    for linear in matched:
        if linear.name in draft.tasks:
            problems.add(
                "already-targeted",
                f"{where}.targets",
                f"{linear.name} is already targeted by stages[{draft.tasks[linear.name].stage}]; "
                "add it to 'ignore' in one of the two stages",
            )
        else:
            linears.append(linear)
    overrides = {}
    for linear in linears:
        matching = (i for i, o in enumerate(options.overrides) if fnmatchcase(linear.name, o.match))
        if (first := next(matching, None)) is not None:
            overrides[linear.name] = first
    layers, size = draft.architecture.layer_names, options.group_layers
    if size > len(layers):
        problems.add(
            "out-of-range",
            f"{where}.layers_per_group",
            f"must be at most {len(layers)}, the number of layers, got {size}; lower it",
        )
        size = 1
    n_experts = max((number for number, _ in draft.architecture.experts.values()), default=1)
    if options.group_experts > n_experts:
        problems.add(
            "out-of-range",
            f"{where}.experts_per_group",
            f"must be at most {n_experts}, the number of experts of a layer, got "
            f"{options.group_experts}; lower it",
        )
    groups = layer_groups(
        linears, size, layers, overrides, where, problems, n_experts=options.group_experts
    )
    tasks = [_task(draft, index, options, group) for group in groups]
    for task in tasks:
        for weight in task.weights:
            draft.tasks[weight.name] = task
    return DecomposeTargets(index, where, options, tasks, overrides, alone)


def _task(draft: Draft, index: int, options: DecomposeBase, group: list[Linear]) -> LayerTask:
    method, shape = METHODS[options.method], (group[0].d_out, group[0].d_in)
    selected = method.select({**options.solver_options, "seed": draft.seed})
    quantize = None
    if isinstance(options, Mixed) and (options.schemes or options.plan):
        quantize = QuantizationTask(
            index, options.quantizer, act_order=options.act_order, balance=options.balance
        )
    # Until an allocation chooses: low rank, whose sizes an estimate can interpolate.
    low_rank = next((t for t in options.component_types if t in LOW_RANK_TYPES), None)
    return LayerTask(
        weights=tuple(Weight(linear.name, linear.layer) for linear in group),
        config=WeightConfig(shape, bias=method.has_bias),
        number_bits=draft.number_bits,
        stage=index,
        method=options.method,
        types=low_rank or next(iter(options.component_types), "dense"),
        options=selected,
        pattern=options.zero_pattern or method.pattern_of(*shape, selected),
        ratio=options.ratios[0],
        source_bias=group[0].bias,
        quantize=quantize,
        compensate=compensation(options.compensate, group[0], draft.architecture),
    )


def _check_options(draft: Draft, found: DecomposeTargets) -> None:
    """Report options that conflict with each other or with options of other stages."""
    options, where, problems = found.options, found.where, draft.problems
    if (
        options.max_relative_error < 1
        and options.allocation != "lagrangian"
        and options.plan is None
    ):
        problems.add(
            "contradiction",
            f"{where}.max_relative_error",
            "needs allocation: lagrangian, which predicts losses, got "
            f"{options.allocation}; change allocation or leave max_relative_error out",
        )
    if draft.group_multiple > 1 and any("+" in types for types in options.component_types):
        problems.add(
            "contradiction",
            f"{where}.components",
            "pivoted_low_rank+sparse cannot be combined with a later 'quantize' with group_size "
            f"{draft.group_multiple}, because its ranks are not multiples of it; remove "
            "pivoted_low_rank+sparse, or remove group_size",
        )
    if options.elastic is not None and draft.quantizes_linears:
        problems.add(
            "contradiction",
            f"{where}.elastic",
            "cannot be combined with a later 'quantize', because integers cannot be cut; remove "
            "the 'quantize' stage, or replace elastic by 'keep'",
        )
    predicts = METHODS[options.method].predicted_increase(0.0, 1) is not None
    if options.drafter is not None and not (predicts and found.alone):
        what = "a single 'decompose', got several" if predicts else "a method that predicts losses"
        problems.add(
            "contradiction",
            f"{where}.drafter",
            f"needs {what}; use method: kfac or mixed in one stage, or give 'keep'",
        )
    if options.size is not None and draft.quantizes_linears:
        problems.add(
            "contradiction",
            f"{where}.size",
            "is computed before quantization and cannot be combined with a later 'quantize'; use "
            "'keep', which is before quantization too, or method: mixed with 'schemes'",
        )
    if options.measure == "latency" and draft.quantizes_linears:
        problems.add(
            "contradiction",
            f"{where}.measure",
            "latency is computed before quantization and cannot be combined with a later "
            "'quantize'; use method: mixed with 'schemes'",
        )
    if options.size is not None and not found.alone:
        problems.add(
            "contradiction",
            f"{where}.size",
            "needs a recipe with a single 'decompose', got several; give each of them 'keep'",
        )
    if METHODS[options.method].has_bias and draft.compensates:
        problems.add(
            "contradiction",
            f"{where}.method",
            f"{options.method} cannot be combined with 'compensate', which changes the mean inputs "
            "that its biases are computed from; remove compensate or use another method",
        )
    for number, scheme in enumerate(options.scheme_choices):
        args = QuantizationArgs.parse(scheme)
        widths = sorted({task.shape[1] for task in found.tasks})
        if widths and not any(args.divides(width) for width in widths):
            problems.add(
                "indivisible-rows",
                f"{where}.schemes[{number}]",
                "must have a group size that divides the row length of a targeted matrix "
                f"(row lengths: {', '.join(map(str, widths))}), got {scheme}; change the number "
                "after -g, or remove the scheme",
            )
        elif options.measure == "gguf" and widths:
            types = [block_type(args, width) for width in widths]
            if not any(isinstance(each, BlockType) for each in types):
                problems.add(
                    "no-block-type",
                    f"{where}.schemes[{number}]",
                    f"must be stored exactly by a block type of GGUF, got {scheme}: {types[0]}; "
                    f"use some of {', '.join(map(str, EXACT_SCHEMES))}",
                )


def _from_user_plan(draft: Draft, found: DecomposeTargets) -> list[LayerTask]:
    assert found.options.plan is not None
    plan = read_user_plan(found.options.plan, found.where, draft.problems)
    if plan is None:
        return found.tasks
    draft.user_plans[found.index] = plan.text
    known = {linear.name for linear in draft.architecture.linears}
    check_names(plan, draft.tasks, known, draft.problems)
    check_user_embeddings(found.index, plan.embeddings, draft.embeddings, draft.problems)
    return apply_user_plan(plan, found.tasks, METHODS[found.options.method], draft.problems)


def _no_saving_advice(options: DecomposeBase) -> str:
    """Return what to change if no weight becomes smaller."""
    if options.plan is not None:
        return f"assign components to at least one weight in {options.plan}"
    if options.keep == 1:
        return "lower 'keep'"
    if options.rank_multiple > 1:
        return "lower 'rank_multiple', or raise 'keep' or 'size'"
    dictionary = "dictionary" in options.component_types
    return "raise 'keep' or 'size'" + (", or lower 'ratio'" if dictionary else "")


def _warn(draft: Draft, found: DecomposeTargets) -> None:
    """Warn if losses that are not comparable between weights are minimized together."""
    options = found.options
    weighted = METHODS[options.method].statistics & {"gradients", "row_fisher"}
    if options.allocation == "lagrangian" and options.plan is None and not weighted:
        draft.warnings.append(
            f"{found.where}.allocation: lagrangian compares losses between weights, but those of "
            f"{options.method} ignore the importance of outputs; expect worse results than with "
            "uniform"
        )
