"""The stage ``heal``: train what is stored in floating point."""

from collections.abc import Mapping, Sequence

from lrc.compressors.calibrate.calibration_windows import SELF
from lrc.compressors.corpus.documents import check_source
from lrc.compressors.evaluate.perplexity import check_window
from lrc.compressors.heal.adapter_checks import (
    Form,
    added_bytes,
    check_elastic,
    check_merge,
    finds_adaptable,
)
from lrc.compressors.heal.adapter_kinds import ADAPTERS
from lrc.compressors.heal.held_out import check_held_out, repetition_warning
from lrc.compressors.heal.run import read_text, requests_of, run_training
from lrc.compressors.heal.text_request import check_evaluation_texts
from lrc.compressors.layers import COMPONENTS
from lrc.compressors.layers.low_rank import LowRank
from lrc.compressors.layers.masked_entries import MaskedEntries
from lrc.compressors.layers.masked_weight import MaskedWeight
from lrc.compressors.methods.base import LOW_RANK_TYPES
from lrc.compressors.planning.compile import Draft
from lrc.compressors.planning.plan import Plan, TrainingRecord
from lrc.compressors.planning.refinements import is_refined
from lrc.compressors.planning.tasks import LayerTask
from lrc.compressors.session import Session
from lrc.compressors.slicing import METHODS as SLICERS
from lrc.configs.errors import RecipeError
from lrc.configs.heal import Block, Distill, HealBase, LogitFit
from lrc.configs.sources import fractions

# In forward passes: the dense model's, the compressed model's, and two for its gradients. The fit
# of a layer takes the dense layer's only once.
DISTILL_PASSES, BLOCK_PASSES = 4.0, 3.0
NAMES = {
    "factors": "low-rank components",
    "values": "masks",
    "scales": "integers",
    "lora": "matrix or mask that absorbs adapters",
    "s2ft": "MLP or attention matrices in 16 bits with that 'fraction' of channels or heads",
    "compacter": "16-bit matrices with sides that 'terms' divides",
}


class HealStage:
    """Compilation and execution of ``heal`` stages."""

    def announce(self, draft: Draft, stages: Mapping[int, HealBase]) -> None:
        """Check the names of the texts."""
        for index, options in stages.items():
            where = f"stages[{index}].heal"
            try:
                for name in fractions(options.source or {}):
                    check_source(name, part="calibration", key=f"{where}.source")
                if options.length is not None:
                    check_window(draft.source.config, options.length, f"{where}.length")
            except RecipeError as error:
                draft.problems += error.problems

    def compile(self, draft: Draft, stages: Mapping[int, HealBase]) -> None:
        """Add the records of the stages."""
        for index, options in stages.items():
            if not draft.problems:  # earlier stages are as they were meant
                _check(draft, index, options)
                check_merge(draft, f"stages[{index}].heal", options)
            length = options.length or draft.window
            steps = options.number_of_steps(length)
            block = isinstance(options, Block)
            draft.training.append(
                TrainingRecord(
                    stage=index,
                    kind="heal",
                    method=options.method,
                    options=options.model_dump(mode="json"),
                    steps=steps,
                    tokens=None if steps is None else steps * options.batch * length,
                    minutes=options.minutes,
                    passes=BLOCK_PASSES if block else DISTILL_PASSES,
                    added_bytes=added_bytes(draft, options),
                )
            )

    def check(self, session: Session, stages: Mapping[int, HealBase]) -> None:
        """Refuse texts that are evaluated on, or too short, before any stage runs."""
        for index, options in stages.items():
            for request in requests_of(session, index, options):
                check_evaluation_texts(request, session.prepared.recipe.evaluate.perplexity)
                if request.source == SELF:  # it is sampled when it is needed
                    check_held_out(request.available, request)
                elif not session.checkpoint.exists():
                    text = read_text(session, request)
                    steps = options.number_of_steps(request.length)
                    if warning := repetition_warning(request, text, steps):
                        session.machine.on_warning(warning)

    def run(self, session: Session, plan: Plan) -> Plan:
        """Train."""
        return run_training(session, plan, session.prepared.recipe.stages_of("heal"))


def _check(draft: Draft, index: int, options: HealBase) -> None:
    """Report options that find nothing to train, whatever allocations choose."""
    where = f"stages[{index}].heal"
    tasks = [task for task in draft.tasks.values() if task.compressed]
    if not tasks and (isinstance(options, Block) or not (draft.slices or draft.embeddings)):
        draft.problems.add(
            "nothing-to-train",
            where,
            "must follow a stage that compresses linear layers, got none; add a 'decompose' or "
            "'quantize' stage before it",
        )
        return
    moved = [each.method for each in draft.slices if not SLICERS[each.method].KEEPS_STREAM]
    if isinstance(options, LogitFit) and options.hidden and moved:
        draft.problems.add(
            "contradiction",
            f"{where}.hidden",
            f"must be 0 after slice.method: {moved[0]}, whose model has other hidden states, got "
            f"{options.hidden:g}; remove the key",
        )
    if draft.elastic and isinstance(options, Block):
        draft.problems.add(
            "contradiction",
            f"{where}.method",
            "must be distill after a stage with 'elastic', got block, which fits each layer for a "
            "single budget; use method: distill, or replace elastic by 'keep'",
        )
    found = [_possible(draft, task) for task in tasks]
    types = {each for kinds, _, _ in found for each in kinds}
    present = {
        "factors": not types.isdisjoint(LOW_RANK_TYPES),
        "values": any(issubclass(COMPONENTS[each], MaskedWeight) for each in types),
        "scales": any(quantized for _, quantized, _ in found),
    }
    movable = any(
        issubclass(COMPONENTS[each], MaskedEntries)
        for kinds, _, exact in found
        for each in kinds
        if exact
    )
    if options.moves_support and not movable:
        draft.problems.add(
            "nothing-to-train",
            f"{where}.support",
            "must be fixed unless earlier stages leave masks or dictionaries in floating point, "
            "got moving; remove the key",
        )
    if isinstance(options, Distill) and options.nuclear_norm:
        _check_nuclear_norm(draft, where, options, found)
    train = getattr(options, "train", "all")
    if train in ADAPTERS:
        forms = [
            Form(task.shape, kinds, quantized)
            for task, (kinds, quantized, _) in zip(tasks, found, strict=True)
        ]
        present[train] = finds_adaptable(draft, options, forms)
        check_elastic(draft, where, options)
    if not present.get(train, True):
        key = "method" if options.method == train else "train"
        draft.problems.add(
            "nothing-to-train",
            f"{where}.{key}",
            f"must select something that earlier stages leave, got '{train}' and no "
            f"{NAMES[train]}; choose another value, such as "
            f"{'distill' if key == 'method' else 'all'}, or remove the stage",
        )


def _check_nuclear_norm(
    draft: Draft, where: str, options: Distill, found: Sequence[tuple[set[str], bool, bool]]
) -> None:
    """Report a penalty on ranks that there is nothing for."""
    exact = any(exact and LowRank.TYPE in kinds for kinds, _, exact in found)
    if exact and options.train in ("all", "factors") and not draft.elastic:
        return
    draft.problems.add(
        "nothing-to-train",
        f"{where}.nuclear_norm",
        "needs low_rank components in floating point for one budget, and train: all or factors, "
        f"got {options.nuclear_norm:g}; set decompose.storage: low_rank, or remove the key",
    )


def _possible(draft: Draft, task: LayerTask) -> tuple[set[str], bool, bool]:
    """Return the component types that a weight may have, and whether in integers and in floats."""
    if task.allocation is None:
        components = task.config.components
        quantized = [c.quantization is not None for c in components]
        return {c.type for c in components}, any(quantized), not all(quantized)
    allocation = draft.allocations[task.allocation]
    later = task.quantize is not None and task.quantize.args is not None
    types = {each for types in allocation.types for each in types.split("+")}
    integers = later or bool(allocation.quantization) or is_refined(allocation)
    return types, integers, not later
