"""The stage ``quantize``: integers for what earlier stages leave."""

from collections.abc import Mapping
from dataclasses import replace
from math import lcm

from lrc.compressors.layers import QuantizationArgs, WeightConfig
from lrc.compressors.planning.compile import Draft
from lrc.compressors.planning.plan import Plan
from lrc.compressors.planning.quantization import (
    check_correction,
    check_groups,
    check_growth,
    check_shared,
    check_sparsity,
)
from lrc.compressors.planning.targets import match_targets
from lrc.compressors.planning.tasks import LayerTask, QuantizationTask, Weight
from lrc.compressors.session import Session
from lrc.compressors.stages.compress_weights import compress_weights
from lrc.compressors.stages.decompose_stage import compensation
from lrc.compressors.stages.embeddings import add_embeddings
from lrc.configs.quantize import Quantize


class QuantizeStage:
    """Compilation and execution of ``quantize`` stages."""

    def announce(self, draft: Draft, stages: Mapping[int, Quantize]) -> None:
        """Add embeddings; note what ranks must be multiples of."""
        for index, options in stages.items():
            add_embeddings(
                draft, index, "quantize", embeddings=options.embeddings, lm_head=options.lm_head
            )
            if options.serve is not None:
                draft.served[f"stages[{index}].quantize.serve"] = options.serve
            draft.quantizes_linears |= options.rounds_linears
            draft.compensates |= options.compensate is not None
            draft.group_multiple = lcm(draft.group_multiple, options.group_size or 1)

    def compile(self, draft: Draft, stages: Mapping[int, Quantize]) -> None:
        """Quantize targeted matrices, as earlier stages leave them or dense."""
        for index, options in stages.items():
            if options.rounds_linears:
                _compile(draft, index, options)

    def check(self, session: Session, stages: Mapping[int, Quantize]) -> None:
        """Check nothing: calibration reads the text first."""

    def run(self, session: Session, plan: Plan) -> Plan:
        """Compress the weights."""
        return compress_weights(session, plan)


def _compile(draft: Draft, index: int, options: Quantize) -> None:
    where, problems = f"stages[{index}].quantize", draft.problems
    correction = options.low_rank_correction
    quantize = QuantizationTask(
        stage=index,
        quantizer="rtn" if options.method == "rtn" else "gptq",
        args=QuantizationArgs.parse(options.scheme),
        act_order=options.act_order,
        damp=options.damp,
        balance=options.balance,
        correction=None if correction is None else correction.method,
        correction_rank=0 if correction is None else correction.rank,
        sparsity=options.sparsity,
    )
    before = len(problems)
    matched = match_targets(
        options.targets,
        options.ignore,
        draft.architecture.linears,
        where,
        problems,
        unused=draft.architecture.unused,
    )
    found: dict[str, LayerTask] = {}
    for linear in matched:
        task = draft.tasks.get(linear.name) or LayerTask(
            weights=(Weight(linear.name, linear.layer),),
            config=WeightConfig((linear.d_out, linear.d_in)),
            number_bits=draft.number_bits,
            stage=index,
            method=options.method,
            source_bias=linear.bias,
        )
        earlier = task.quantize
        if earlier is not None and (task.pending or task.config.quantization is not None):
            problems.add(
                "already-quantized",
                f"{where}.targets",
                f"{linear.name} is already quantized by stages[{earlier.stage}]; list it under one "
                "of the two 'ignore', or leave out 'schemes' there, if it has any",
            )
        else:
            found.setdefault(task.name, task)
    taken = [*found.values()]
    linears = {linear.name: linear for linear in matched}
    for task in taken:
        left = [w.name for w in task.weights if w.name not in linears]
        if left:
            problems.add(
                "shared-factor",
                f"{where}.targets",
                f"must contain all layers that share a factor, got {task.name} without {left[0]}; "
                "target both or none",
            )
    if not taken and len(problems) == before:
        problems.add(
            "no-match",
            f"{where}.targets",
            "must leave at least one linear layer to quantize, got none that 'ignore' does not "
            "list; change 'targets' or 'ignore', or remove the stage",
        )
    check_correction(where, quantize, taken, problems)
    check_sparsity(where, quantize, taken, problems)
    assert quantize.args is not None
    check_groups(where, quantize.args, taken, problems)
    if options.compensate is not None:
        check_shared(where, taken, problems)
    # Marked even if there are problems, so that a second stage reports that it quantizes twice.
    marked = [
        replace(
            task,
            quantize=quantize,
            compensate=task.compensate
            or compensation(options.compensate, linears[task.name], draft.architecture),
        )
        for task in taken
    ]
    if len(problems) == before:
        done = [_quantized(task, quantize) for task in marked]
        check_growth(where, quantize, taken, done, problems)
        marked = done
    for task in marked:
        for weight in task.weights:
            draft.tasks[weight.name] = task


def _quantized(task: LayerTask, quantize: QuantizationTask) -> LayerTask:
    """Return the task with its configuration quantized, or a smaller estimate while pending."""
    args = quantize.args
    assert args is not None
    if task.estimated_bits is None:
        return replace(task, config=quantize.applied_to(task.config), note=None)
    scales = task.number_bits + (0 if args.symmetric else args.bits)
    per_number = args.bits + scales / (args.group_size or task.shape[1])
    return replace(task, estimated_bits=int(task.estimated_bits * per_number / task.number_bits))
