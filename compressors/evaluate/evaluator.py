"""Score the models of a run; a score that is on disk is not measured again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lrc.compressors.corpus.documents import source_identity
from lrc.compressors.evaluate.baseline_comparison import compare_with_baselines
from lrc.compressors.evaluate.baselines import Baseline, Targets, measure, plan_baseline, record
from lrc.compressors.evaluate.scores import Scores, compare, evaluate_model
from lrc.compressors.io.fingerprint import fingerprints
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import Clock, OnStep, release_memory
from lrc.configs.recipe import Evaluate

ALL = {"perplexity", "tasks"}
"""Options of an evaluation that a score depends on."""

TASK_FILES = ("**/*.yaml", "**/*.yml", "**/*.py", "**/*.json*", "**/*.txt", "**/*.csv")


def score_options(options: Evaluate, keys: set[str]) -> dict[str, Any]:
    """Return the options in `keys`, and what identifies the content of their files."""
    found = options.model_dump(mode="json", include=keys)
    found["texts"] = [source_identity(spec.source) for spec in options.perplexity]
    folder = options.tasks.include_path
    if "tasks" in keys and folder is not None:
        found["task_files"] = fingerprints(Path(folder).expanduser(), *TASK_FILES)
    return found


def is_current(journal: Journal, options: Evaluate) -> bool:
    """Return whether the scores of the compressed model are those of the present texts."""
    if not options.perplexity and not options.tasks.names:
        return True
    file = "evaluation-compressed.json"
    current = score_options(options, ALL)
    return journal.has(file) and bool(journal.read_json(file)["options"] == current)


@dataclass(frozen=True)
class Evaluator:
    """Scores one model after the other, with at most one in memory.

    The functions that load the tokenizer and the models are called once per score.
    """

    options: Evaluate
    seed: int
    """For the tasks' few-shot examples and sampling."""
    journal: Journal
    clock: Clock
    on_step: OnStep
    load_tokenizer: Callable[[], Any]
    load_dense: Callable[[], Any]
    load_compressed: Callable[[], Any]

    def evaluate(self) -> dict[str, Any]:
        """Score the dense and the compressed model, and compare them."""
        with self.clock("evaluate"):
            if not self.options.perplexity and not self.options.tasks.names:
                return compare(None, {"perplexity": {}, "tasks": {}})
            dense = None
            if self.options.dense:
                dense = self._once("dense", ALL, partial(self._score, self.load_dense))
            compressed = self._once("compressed", ALL, partial(self._score, self.load_compressed))
            return compare(dense, compressed)

    def add_baselines(self, evaluation: dict[str, Any], targets: Targets) -> dict[str, Any]:
        """Add the scores of the baselines to the result of `evaluate`, and the comparison."""
        if not self.options.perplexity or not self.options.baselines:
            return evaluation | {"baselines": [], "baseline_comparison": None}
        perplexity = evaluation["perplexity"]
        records = []
        with self.clock("baselines"):
            for written in self.options.baselines:
                baseline = plan_baseline(written, targets)
                scores = self._once(written, {"perplexity"}, partial(self._measure, baseline))
                records.append(record(baseline, scores, perplexity))
        ours = {text: entry["compressed"] for text, entry in perplexity.items()}
        sentence = compare_with_baselines(targets.compressed_bytes, ours, records)
        return evaluation | {"baselines": records, "baseline_comparison": sentence}

    def _once(self, name: str, keys: set[str], score: Callable[[OnStep], Scores]) -> Scores:
        """Score a model unless the journal has its scores for the same options in `keys`."""
        file = f"evaluation-{name}.json"
        options = score_options(self.options, keys)
        if not self.journal.has(file) or self.journal.read_json(file)["options"] != options:
            scores = score(
                lambda stage, done, total: self.on_step(f"evaluate {name}: {stage}", done, total)
            )
            self.journal.write_json(file, {"options": options, "scores": scores})
            release_memory()
        stored: Scores = self.journal.read_json(file)["scores"]
        return stored

    def _score(self, load: Callable[[], Any], on_step: OnStep) -> Scores:
        tokenizer = self.load_tokenizer()
        return evaluate_model(load(), tokenizer, self.options, seed=self.seed, on_step=on_step)

    def _measure(self, baseline: Baseline, on_step: OnStep) -> Scores:
        # The dense model is loaded for each baseline: no second copy of its weights is kept.
        tokenizer, dense = self.load_tokenizer(), self.load_dense()
        return measure(baseline, dense, tokenizer, self.options, on_step)
