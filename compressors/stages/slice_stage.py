"""The stage ``slice``: a smaller dense model."""

from collections.abc import Mapping
from dataclasses import replace

from lrc.compressors.planning.compile import Draft, compile_plan
from lrc.compressors.planning.plan import Plan
from lrc.compressors.session import Session
from lrc.compressors.slicing.slices import PENDING, plan_slices, slice_warnings
from lrc.configs.slice import SliceBase


class SliceStage:
    """Compilation and execution of ``slice`` stages."""

    def announce(self, draft: Draft, stages: Mapping[int, SliceBase]) -> None:
        """Replace the architecture of the draft by that of the smaller model.

        This happens before other stages are compiled, which depend on its shapes.
        """
        if draft.executed_slices:
            return
        draft.warnings += slice_warnings(stages, draft.tokens, draft.architecture)
        records, configs, architecture = plan_slices(stages, draft.source, draft.architecture)
        draft.slices, draft.sliced, draft.architecture = records, configs, architecture

    def compile(self, draft: Draft, stages: Mapping[int, SliceBase]) -> None:
        """Add nothing: slicing is planned before all other stages."""

    def check(self, session: Session, stages: Mapping[int, SliceBase]) -> None:
        """Check nothing: calibration reads the text first."""

    def run(self, session: Session, plan: Plan) -> Plan:
        """Slice the model; shapes that calibration chooses require a new plan for later stages."""
        records = session.models.slice()
        if not any(PENDING in record.facts for record in plan.slices):
            return replace(plan, slices=records)
        from lrc.compressors.stages import STAGES

        prepared, architecture = session.prepared, session.models.architecture
        again = compile_plan(prepared.recipe, prepared.source, architecture, STAGES, records).plan
        return replace(again, slices=records, warnings=plan.warnings)
