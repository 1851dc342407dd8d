"""Pieces of the journal that a stage which trains leaves, and the tensors that it has replaced."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from lrc.compressors.io.journal import Journal
from lrc.compressors.planning.plan import Plan

TRAINED = "trained"
"""Key of the facts about a piece: the names of its tensors."""


def folder(stage: int) -> str:
    """Return the journal's name for the results of a stage."""
    return f"heal-{stage}"


def facts_file(stage: int) -> str:
    """Return the journal's name for the facts of a finished stage."""
    return f"{folder(stage)}/facts.json"


def usage_file(stage: int) -> str:
    """Return the journal's name for memory and speed, which are different in every run."""
    return f"{folder(stage)}/usage.json"


def model_file(stage: int) -> str:
    """Return the journal's name for tensors of the whole model."""
    return f"{folder(stage)}/model.safetensors"


def layer_file(stage: int, layer: int) -> str:
    """Return the journal's name for tensors of one decoder layer."""
    return f"{folder(stage)}/layer-{layer:04d}.safetensors"


def state_file(stage: int) -> str:
    """Return the journal's name for the state of unfinished training."""
    return f"heal-{stage}-state.safetensors"


def text_folder(stage: int) -> str:
    """Return the journal's name for the windows that a stage trains and measures on."""
    return f"heal-{stage}-text"


def write_trained(
    journal: Journal, piece: str, tensors: Mapping[str, Tensor], facts: Mapping[str, object]
) -> None:
    """Write trained tensors under their names in the checkpoint, in their stored dtypes."""
    journal.write_tensors(piece, tensors, {TRAINED: [*tensors], **facts})


def trained_tensors(
    journal: Journal, plan: Plan, before: int | None = None
) -> dict[str, Callable[[], Tensor]]:
    """Return how to read the tensors that stages have trained, by their names in the checkpoint.

    Only stages of which the result is used count, and only those before the stage `before`.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    for record in plan.training:
        if record.facts.get("kept") and (before is None or record.stage < before):
            for path in sorted(journal.path(folder(record.stage)).glob("*.safetensors")):
                piece = f"{folder(record.stage)}/{path.name}"
                for name in journal.read_facts(piece)[TRAINED]:
                    found[name] = partial(journal.read_tensor, piece, name)
    return found
