"""Score the models of a run; a score that is on disk is not measured again."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrc.compressors.corpus.documents import source_identity
from lrc.compressors.corpus.examples import task_identity
from lrc.compressors.distributed.processes import ALONE, Processes
from lrc.compressors.evaluate.baseline_comparison import compare_with_baselines
from lrc.compressors.evaluate.baselines import Baseline, Targets, measure, plan_baseline, record
from lrc.compressors.evaluate.generations import read_prompts
from lrc.compressors.evaluate.scores import (
    Scores,
    compare,
    evaluate_model,
    list_missing,
    unmeasured,
)
from lrc.compressors.evaluate.side_by_side import (
    evaluate_pair,
    refuse_pair,
    unmeasured_pair,
)
from lrc.compressors.evaluate.streaming_rule import ModelBytes, Streaming, Unmeasured, why_too_large
from lrc.compressors.io.fingerprint import fingerprints
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import Clock, OnStep, release_memory
from lrc.configs.recipe import Evaluate

ALL = {"perplexity", "tasks", "task"}
"""Options of an evaluation that a score of one model depends on."""
BOTH = {"perplexity", "kl_tokens", "generations", "task"}
"""Options that the scores of both models together depend on."""
PAIR = "pair"
"""Name of the scores of both models together."""

TASK_FILES = ("**/*.yaml", "**/*.yml", "**/*.py", "**/*.json*", "**/*.txt", "**/*.csv")


def score_options(options: Evaluate, keys: set[str]) -> dict[str, Any]:
    """Return the options in `keys`, and what identifies the content of their files."""
    found = options.model_dump(mode="json", include=keys)
    found["texts"] = [source_identity(spec.source) for spec in options.perplexity]
    if options.task is not None and "task" in keys:
        found["task"]["data"] = task_identity(options.task)
    folder = options.tasks.include_path
    if "tasks" in keys and folder is not None:
        found["task_files"] = fingerprints(Path(folder).expanduser(), *TASK_FILES)
    if "generations" in keys:
        found["prompts"] = read_prompts(options.generations)
    return found


def is_current(journal: Journal, options: Evaluate) -> bool:
    """Return whether all scores are those of the present texts, tasks and prompts."""
    wanted = {}
    if options.scores_models:
        wanted["compressed"] = ALL
    if unmeasured_pair(options)["missing"]:
        wanted[PAIR] = BOTH
    return all(
        journal.has(file := f"evaluation-{name}.json")
        and journal.read_json(file)["options"] == score_options(options, keys)
        for name, keys in wanted.items()
    )


@dataclass(frozen=True)
class Evaluator:
    """Scores one model after the other, and then both together.

    Until then at most one is in memory. The functions that load the tokenizer and the models are
    called once per score. With `streaming`, whole models are loaded for tasks and generated text
    only, after everything else has been measured layer by layer.
    """

    options: Evaluate
    seed: int
    """For the tasks' few-shot examples and sampling."""
    journal: Journal
    clock: Clock
    on_step: OnStep
    precision: dict[str, str]
    """Dtype and kind of device, on which scores depend: those of another are measured again."""
    sizes: ModelBytes
    load_tokenizer: Callable[[], Any]
    load_dense: Callable[[], Any]
    load_compressed: Callable[[], Any]
    streaming: Streaming | None = None
    """Measures the models layer by layer; None to load them whole."""
    processes: Processes = ALONE
    """Processes that all measure together; the first one stores the scores."""

    def evaluate(self, targets: Targets) -> dict[str, Any]:
        """Score the dense and the compressed model, and compare them.

        Baselines compress `targets`. Layer by layer, they are measured in the same pass.
        """
        with self.clock("evaluate"):
            if self.streaming is not None:
                self._stream(self.streaming, targets)
            models = {}
            if self.options.scores_models:
                if self.options.dense:
                    models["dense"] = self._score("dense", self.load_dense)
                models["compressed"] = self._score("compressed", self.load_compressed)
            pair = self._score_pair()
        compressed = models.get("compressed") or unmeasured(self.options)
        comparison = compare(models.get("dense"), compressed, pair)
        missing = list_missing(models) + list_missing({"compressed": pair})
        return comparison | {"missing": missing}

    def add_baselines(self, evaluation: dict[str, Any], targets: Targets) -> dict[str, Any]:
        """Add the scores of the baselines to the result of `evaluate`, and the comparison."""
        perplexity = evaluation["perplexity"]
        if not perplexity or not self.options.baselines:
            return evaluation | {"baselines": [], "baseline_comparison": None}
        records = []
        with self.clock("baselines"):
            for written in self.options.baselines:
                baseline = plan_baseline(written, targets)
                scores = self._stored(written, {"perplexity"})
                if scores is None:
                    scores = self._measure(baseline, self._labelled(written))
                    self._store(written, {"perplexity"}, scores)
                records.append(record(baseline, scores, perplexity))
        ours = {text: entry["compressed"] for text, entry in perplexity.items()}
        sentence = compare_with_baselines(targets.compressed_bytes, ours, records)
        return evaluation | {"baselines": records, "baseline_comparison": sentence}

    def _stream(self, streaming: Streaming, targets: Targets) -> None:
        """Measure layer by layer what the journal lacks, except tasks and generated text."""
        names = ["dense", "compressed"] if self.options.dense else ["compressed"]
        wanted = Unmeasured(
            self.options,
            self.load_tokenizer(),
            "dense",
            models={name: self._stored(name, ALL) or unmeasured(self.options) for name in names},
            pairs={"compressed": self._stored(PAIR, BOTH) or unmeasured_pair(self.options)},
            baselines={
                written: plan_baseline(written, targets)
                for written in self.options.baselines
                if self._stored(written, {"perplexity"}) is None
            },
        )
        if not wanted.texts():
            return
        streaming.measure_(wanted)
        for name, scores in wanted.models.items():
            self._store(name, ALL, scores)
        self._store(PAIR, BOTH, wanted.pairs["compressed"])
        for name, found in wanted.baseline_scores.items():
            self._store(name, {"perplexity"}, found)

    def _score(self, name: str, load: Callable[[], Any]) -> Scores:
        """Score a model on what the journal lacks."""
        scores, options = self._stored(name, ALL), self.options
        if self.streaming is not None:  # has measured or given up all perplexities
            options = options.model_copy(update={"perplexity": []})
        wanted = unmeasured(options)["missing"]
        if scores is None or {*scores["missing"]} & {*wanted}:
            if self.streaming is not None and (reason := self._why_too_large(name)):
                scores = deepcopy(scores) or unmeasured(self.options)
                scores["missing"] |= dict.fromkeys({*scores["missing"]} & {*wanted}, reason)
                self._store(name, ALL, scores)
                return scores
            tokenizer = self.load_tokenizer()
            scores = evaluate_model(
                load(),
                tokenizer,
                options,
                seed=self.seed,
                on_step=self._labelled(name),
                scores=scores,
                processes=self.processes,
            )
            self._store(name, ALL, scores)
        return scores

    def _score_pair(self) -> Scores:
        """Compare both models on what the journal lacks."""
        wanted, options = unmeasured_pair(self.options), self.options
        if not wanted["missing"]:
            return wanted
        scores = self._stored(PAIR, BOTH) or wanted
        if self.streaming is not None:  # has compared all predictions, or given up
            options = options.model_copy(update={"kl_tokens": 0})
        if {*scores["missing"]} & {*unmeasured_pair(options)["missing"]}:

            def load() -> tuple[Any, Any]:
                refuse_pair(self.sizes.both, self.precision["device"], self.processes)
                return self.load_dense(), self.load_compressed()

            on_step = self._labelled("dense and compressed")
            tokenizer = self.load_tokenizer()
            scores = evaluate_pair(
                load, tokenizer, options, scores, on_step=on_step, processes=self.processes
            )
            self._store(PAIR, BOTH, scores)
        return scores

    def _stored(self, name: str, keys: set[str]) -> Scores | None:
        """Return the scores of a model if they were measured with the same options in `keys`."""
        return self.processes.agree(self._read(name, keys) if self.processes.first else None)

    def _read(self, name: str, keys: set[str]) -> Scores | None:
        file = f"evaluation-{name}.json"
        if not self.journal.has(file):
            return None
        found = self.journal.read_json(file)
        same = found["options"] == score_options(self.options, keys)
        same = same and found["precision"] == self.precision
        stored: Scores | None = found["scores"] if same else None
        return stored

    def _store(self, name: str, keys: set[str], scores: Scores) -> None:
        content = {
            "options": score_options(self.options, keys),
            "precision": self.precision,
            "scores": scores,
        }
        if self.processes.first:
            self.journal.write_json(f"evaluation-{name}.json", content)
        release_memory()

    def _why_too_large(self, name: str) -> str | None:
        n_bytes = self.sizes.dense if name == "dense" else self.sizes.compressed
        return why_too_large(n_bytes, name, self.precision["device"])

    def _labelled(self, name: str) -> OnStep:
        def step(stage: str, done: int, total: int) -> None:
            self.on_step(f"evaluate {name}: {stage}", done, total)

        return step

    def _measure(self, baseline: Baseline, on_step: OnStep) -> Scores:
        # The dense model is loaded for each baseline: no second copy of its weights is kept.
        tokenizer, dense = self.load_tokenizer(), self.load_dense()
        return measure(baseline, dense, tokenizer, self.options, on_step, self.processes)
