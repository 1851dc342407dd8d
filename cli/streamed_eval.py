"""`lrc eval` one decoder layer at a time: perplexities and predictions without whole models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lrc.compressors.corpus.windows import evaluation_windows
from lrc.compressors.evaluate.scores import Scores, unmeasured
from lrc.compressors.evaluate.side_by_side import unmeasured_pair
from lrc.compressors.evaluate.streaming_rule import Unmeasured
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import Machine
from lrc.compressors.streamed.stored_models import open_model
from lrc.compressors.streamed.streamed_evaluation import StreamedEvaluation
from lrc.compressors.streamed.streamed_model import ModelFiles
from lrc.configs.errors import CheckpointError, ModelError
from lrc.configs.recipe import Calibration, Evaluate


@dataclass(frozen=True)
class StreamedScores:
    """Scores of checkpoints; tasks have not been measured."""

    models: dict[str, Scores]
    """By checkpoint, see `unmeasured`."""
    pairs: dict[str, Scores]
    """Of the first checkpoint and another one, by the other."""


def stream(
    tokenizers: Mapping[str, Any],
    comparable: Sequence[str],
    request: Evaluate,
    machine: Machine,
    scratch: Path,
    *,
    trusted: bool,
) -> StreamedScores | None:
    """Measure the perplexities of checkpoints, and how their predictions differ from the first's.

    Each layer is read once, except that the first checkpoint is read again for those to whose
    tokenizers the texts are other tokens.

    Parameters
    ----------
    tokenizers : mapping of str to PreTrainedTokenizerBase
        Of every checkpoint.
    comparable : sequence of str
        Checkpoints with the vocabulary of the first, without the first.
    scratch : Path
        Empty folder for converted models and for hidden states.

    Returns
    -------
    StreamedScores or None
        None if `request` does not insist on streaming and one of the checkpoints cannot be read
        layer by layer, of which there is a warning.

    Raises
    ------
    CheckpointError, ModelError
    """
    opened: dict[str, ModelFiles] = {}
    for number, name in enumerate(tokenizers):
        try:
            opened[name] = open_model(
                name, scratch / str(number), device=machine.chosen, trust_remote_code=trusted
            )
        except (CheckpointError, ModelError) as error:
            if request.streaming == "always":
                raise
            machine.on_warning(f"{name}: whole models are loaded: {error}")
            return None
    journal = Journal(scratch)
    journal.work.mkdir()
    evaluation = StreamedEvaluation(
        {name: lambda name=name: opened[name] for name in opened},  # type: ignore[misc]
        journal=journal,
        device=machine.chosen,
        memory_limit_gib=Calibration().memory_limit_gib,
        on_step=machine.on_step,
    )
    pairs = comparable if request.compared_texts else []
    scores = StreamedScores(
        {name: unmeasured(request) for name in opened},
        {name: unmeasured_pair(request) for name in pairs},
    )
    for reference, others in _passes(tokenizers, pairs, request):
        models = [reference, *others]
        evaluation.measure_(
            Unmeasured(
                request,
                tokenizers[models[-1]],
                reference,
                {name: scores.models[name] for name in models},
                {name: scores.pairs[name] for name in others},
            )
        )
    return scores


def _passes(
    tokenizers: Mapping[str, Any], pairs: Sequence[str], request: Evaluate
) -> list[tuple[str, list[str]]]:
    """Return the checkpoints of every pass: a reference, and those compared with it."""

    def tokens(name: str) -> list[torch.Tensor]:
        return [evaluation_windows(s, tokenizers[name]).tokens for s in request.perplexity]

    first, *others = tokenizers
    same = [name for name in pairs if all(map(torch.equal, tokens(first), tokens(name)))]
    rest = [name for name in others if name not in same]
    return [(first, same), *((first, [n]) if n in pairs else (n, []) for n in rest)]
