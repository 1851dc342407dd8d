"""The kinds of stages of a recipe, in the order of the pipeline.

A stage is compiled into the plan before any work starts, and run later. To add one, add its options
to `lrc.configs.recipe.STAGES` and an entry here.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from lrc.compressors.planning.compile import StageCompiler
from lrc.compressors.planning.plan import Plan
from lrc.compressors.session import Session
from lrc.compressors.stages.decompose_stage import DecomposeStage
from lrc.compressors.stages.heal_stage import HealStage
from lrc.compressors.stages.quantize_stage import QuantizeStage
from lrc.compressors.stages.slice_stage import SliceStage


class Stage(StageCompiler, Protocol):
    """A kind of stage: its compilation and execution."""

    def check(self, session: Session, stages: Mapping[int, Any]) -> None:
        """Reject what only the texts of a run tell, before any stage runs."""

    def run(self, session: Session, plan: Plan) -> Plan:
        """Carry out the stages; what is in the journal already is not done again."""


STAGES: dict[str, Stage] = {
    "slice": SliceStage(),
    "decompose": DecomposeStage(),
    "quantize": QuantizeStage(),
    "heal": HealStage(),
}
