"""Evaluation one decoder layer at a time: when it is used, and what it measures.

A whole model is in memory for lm-eval tasks and for generated text only. Everything else follows
from the hidden states after the last layer, which `lrc.compressors.streamed` computes.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from lrc.compressors.evaluate.baselines import Baseline
from lrc.compressors.evaluate.scores import Scores
from lrc.compressors.io.machine import free_memory
from lrc.configs.recipe import Evaluate
from lrc.configs.size import GIB

FRACTION = 0.8
"""Largest fraction of the free memory that the weights of whole models may take. Hidden states and
logits need the rest: less than 1 GiB, but free memory also changes while a run is going on."""


@dataclass(frozen=True)
class ModelBytes:
    """Memory that the weights of whole models take at least, bytes."""

    dense: int
    compressed: int

    @property
    def both(self) -> int:
        """Of both models together."""
        return self.dense + self.compressed

    def needed(self, options: Evaluate) -> int:
        """Return the memory of the models that are in memory together for an evaluation.

        The dense and the compressed model if their predictions are compared, else one of them:
        baselines are made from the dense model, in place. Tasks and generated text do not count.
        """
        if not options.perplexity:
            return 0
        if options.compared_texts:
            return self.both
        return max(self.compressed, self.dense if options.dense or options.baselines else 0)


def streams(options: Evaluate, sizes: ModelBytes, free: int) -> bool:
    """Return whether to evaluate one layer at a time, with `free` bytes of memory.

    With ``streaming: auto``, if whole models would take more than `FRACTION` of it.
    """
    if options.streaming != "auto":
        return options.streaming == "always" and bool(options.perplexity)
    return sizes.needed(options) > FRACTION * free


def why_too_large(n_bytes: int, name: str, device: str) -> str | None:
    """Return why lm-eval tasks cannot run with a model of `n_bytes`; None if they can."""
    free = free_memory(device)
    if n_bytes <= free:
        return None
    return (
        f"the {name} model does not fit into memory (it takes at least {n_bytes / GIB:.1f} GiB,"
        f" and {free / GIB:.1f} GiB are free), and lm-eval tasks need the whole model; use a"
        " device with more memory, or remove the tasks"
    )


@dataclass(frozen=True)
class Unmeasured:
    """The scores of an evaluation, some of which are missing; they are filled in."""

    options: Evaluate
    tokenizer: Any
    reference: str
    """Name of the model that others are compared with, and that baselines are made of."""
    models: dict[str, Scores]
    """Name -> scores from `unmeasured`."""
    pairs: dict[str, Scores]
    """Name -> scores of the reference and that model, from `unmeasured_pair`."""
    baselines: dict[str, Baseline] = field(default_factory=dict)
    """Baselines to measure, by their names in the recipe."""
    baseline_scores: dict[str, dict[str, Scores | None]] = field(default_factory=dict)
    """The same names -> perplexities by text, as from `measure`."""

    def unmeasured_models(self) -> list[str]:
        """Return the names in `models` of those whose predictions are missing anywhere."""
        compared = {
            name
            for other, scores in self.pairs.items()
            if any(key.startswith("kl.") for key in scores["missing"])
            for name in (self.reference, other)
        }
        return [
            name
            for name, scores in self.models.items()
            if name in compared or any(key.startswith("perplexity.") for key in scores["missing"])
        ]

    def texts(self) -> list[str]:
        """Return the names of texts on which something is missing."""
        return [
            spec.name
            for spec in self.options.perplexity
            if self.baselines
            or any(f"perplexity.{spec.name}" in each["missing"] for each in self.models.values())
            or any(f"kl.{spec.name}" in each["missing"] for each in self.pairs.values())
        ]


class Streaming(Protocol):
    """Measures models one decoder layer at a time."""

    def measure_(self, wanted: Unmeasured) -> None:
        """Measure what is missing: perplexities, predictions and baselines, in one pass.

        The reason for what cannot be measured is noted in its place.
        """
