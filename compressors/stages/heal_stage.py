"""The stage ``heal``: train what is stored in floating point."""

from collections.abc import Mapping

from lrc.compressors.corpus.documents import check_source
from lrc.compressors.evaluate.perplexity import check_window
from lrc.compressors.heal.adapter_checks import added_bytes, check_merge, finds_adaptable
from lrc.compressors.heal.adapter_kinds import ADAPTERS
from lrc.compressors.heal.held_out import SELF, check_evaluation_texts, repetition_warning
from lrc.compressors.heal.run import read_text, run_training, text_request
from lrc.compressors.layers import COMPONENTS
from lrc.compressors.layers.masked_weight import MaskedWeight
from lrc.compressors.methods.base import LOW_RANK_TYPES
from lrc.compressors.planning.compile import Draft
from lrc.compressors.planning.plan import Plan, TrainingRecord
from lrc.compressors.planning.tasks import LayerTask
from lrc.compressors.session import Session
from lrc.configs.errors import DataError, RecipeError
from lrc.configs.heal import Block, HealBase

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
                if options.source is not None:
                    check_source(options.source, part="calibration", key=f"{where}.source")
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
                    tokens=steps * options.batch * length,
                    passes=BLOCK_PASSES if block else DISTILL_PASSES,
                    added_bytes=added_bytes(draft, options),
                )
            )

    def check(self, session: Session, stages: Mapping[int, HealBase]) -> None:
        """Refuse texts that are evaluated on, or too short, before any stage runs."""
        for index, options in stages.items():
            request = text_request(session, index, options)
            check_evaluation_texts(request, session.prepared.recipe.evaluate.perplexity)
            if request.source == SELF:
                samples = session.calibration.samples
                if options.length not in (None, session.calibration.length):
                    raise RecipeError(
                        f"{request.where}.length: must be calibration.length with source: self, "
                        f"got {options.length}; leave it out"
                    )
                if samples <= request.n_held_out:
                    raise DataError(
                        f"{request.where}.held_out: must leave some of the {samples} windows of "
                        f"source: self, got {options.held_out:,} tokens; lower it to at most "
                        f"{(samples - 1) * request.length:,}, or raise calibration.samples"
                    )
            elif not session.checkpoint.exists():
                text = read_text(session, request)
                if warning := repetition_warning(request, text):
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
    found = [_possible(draft, task) for task in tasks]
    types = {each for kinds, _ in found for each in kinds}
    present = {
        "factors": not types.isdisjoint(LOW_RANK_TYPES),
        "values": any(issubclass(COMPONENTS[each], MaskedWeight) for each in types),
        "scales": any(quantized for _, quantized in found),
    }
    train = getattr(options, "train", "all")
    if train in ADAPTERS:
        present[train] = finds_adaptable(draft, options, found)
    if not present.get(train, True):
        key = "method" if options.method == train else "train"
        draft.problems.add(
            "nothing-to-train",
            f"{where}.{key}",
            f"must select something that earlier stages leave, got '{train}' and no "
            f"{NAMES[train]}; choose another value, such as "
            f"{'distill' if key == 'method' else 'all'}, or remove the stage",
        )


def _possible(draft: Draft, task: LayerTask) -> tuple[set[str], bool]:
    """Return the component types that a weight may have, and whether it may be quantized."""
    if task.allocation is None:
        components = task.config.components
        return {c.type for c in components}, any(c.quantization for c in components)
    allocation = draft.allocations[task.allocation]
    later = task.quantize is not None and task.quantize.args is not None
    types = {each for types in allocation.types for each in types.split("+")}
    return types, later or bool(allocation.quantization)
