"""The kinds of stages of a recipe, in the order of the pipeline.

A stage is compiled into the plan before any work starts, and run later. To add one, add its options
to `lrc.configs.recipe.STAGES` and an entry here.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from lrc.compressors.planning.compile import Draft
from lrc.compressors.planning.plan import Plan
from lrc.compressors.session import Session
from lrc.compressors.stages.decompose_stage import DecomposeStage
from lrc.compressors.stages.quantize_stage import QuantizeStage
from lrc.compressors.stages.slice_stage import SliceStage


class Stage(Protocol):
    """A kind of stage; `stages` are the options of all of its stages by index in the recipe."""

    def announce(self, draft: Draft, stages: Mapping[int, Any]) -> None:
        """Record what other stages must know, before any stage is compiled."""

    def compile(self, draft: Draft, stages: Mapping[int, Any]) -> None:
        """Add the stages to the draft of the plan; problems are collected there."""

    def run(self, session: Session, plan: Plan) -> Plan:
        """Carry out the stages; what is in the journal already is not done again."""


STAGES: dict[str, Stage] = {
    "slice": SliceStage(),
    "decompose": DecomposeStage(),
    "quantize": QuantizeStage(),
}
