"""How good the models of a run are; what is known already is not measured again."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lrc.compressors.checkpoint.reader import load_checkpoint, load_tokenizer
from lrc.compressors.evaluate import compare, evaluate_model
from lrc.compressors.evaluate.baseline_comparison import verdict
from lrc.compressors.evaluate.baselines import (
    Alternative,
    Targets,
    measure,
    plan_alternative,
    record,
)
from lrc.compressors.io.journal import Journal
from lrc.compressors.io.machine import OnStep, release_memory
from lrc.compressors.model_versions import Lineage
from lrc.configs.recipe import Evaluate


@dataclass(frozen=True)
class Judge:
    """Scores one model after the other; every one that is done is on disk."""

    lineage: Lineage

    def evaluate(self) -> dict[str, Any]:
        """Judge dense and compressed model one after the other; what is judged already is kept."""
        with self.lineage.clock("evaluate"):
            asked = self._asked
            if not asked.perplexity and not asked.tasks.names:
                return compare(None, {"perplexity": {}, "tasks": {}})
            scores = {"perplexity", "tasks"}
            dense = None
            if asked.dense:
                dense = self._judged("dense", scores, partial(self._scored, self._load_dense))
            compressed = self._judged(
                "compressed", scores, partial(self._scored, self._load_compressed)
            )
            return compare(dense, compressed)

    def beside_alternatives(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        """Add what plain forms of the dense model score on the same texts, and which one wins."""
        asked = self._asked
        if not asked.perplexity or not asked.alternatives:
            return evaluation | {"alternatives": [], "verdict": None}
        prepared = self.lineage.prepared
        plan = self._journal.read_json("executed.json")
        targets = Targets.of(plan, prepared.dense, prepared.source.dtype)
        perplexity = evaluation["perplexity"]
        with self.lineage.clock("alternatives"):
            records = []
            for written in asked.alternatives:
                alternative = plan_alternative(written, targets)
                scores = self._judged(written, {"perplexity"}, partial(self._measured, alternative))
                records.append(record(alternative, scores, perplexity))
        ours = {text: entry["compressed"] for text, entry in perplexity.items()}
        said = verdict(targets.compressed_bytes, ours, records)
        return evaluation | {"alternatives": records, "verdict": said}

    def _judged(
        self, name: str, keys: set[str], judge: Callable[[OnStep], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return what `judge` finds of one model, once for what the recipe says under `keys`."""
        file = f"evaluation-{name}.json"
        asked = self._asked.model_dump(mode="json", include=keys)
        if not self._journal.has(file) or self._journal.read_json(file)["asked"] != asked:
            block = judge(
                lambda stage, done, total: self.lineage.machine.on_step(
                    f"evaluate {name}: {stage}", done, total
                )
            )
            self._journal.write_json(file, {"asked": asked, "block": block})
            release_memory()
        judged: dict[str, Any] = self._journal.read_json(file)["block"]
        return judged

    def _scored(self, load: Callable[[], Any], on_step: OnStep) -> dict[str, Any]:
        recipe = self.lineage.prepared.recipe
        tokenizer = load_tokenizer(self._checkpoint)
        return evaluate_model(load(), tokenizer, recipe.evaluate, seed=recipe.seed, on_step=on_step)

    def _measured(self, alternative: Alternative, on_step: OnStep) -> dict[str, Any]:
        tokenizer = load_tokenizer(self._checkpoint)
        dense = self._load_dense()  # anew for each: no second copy of any weight is kept
        return measure(alternative, dense, tokenizer, self._asked, on_step)

    @property
    def _asked(self) -> Evaluate:
        return self.lineage.prepared.recipe.evaluate

    @property
    def _journal(self) -> Journal:
        return self.lineage.journal

    @property
    def _checkpoint(self) -> Path:
        return self._journal.output / "checkpoint"

    def _load_dense(self) -> Any:
        return self.lineage.load_dense(self.lineage.dtype)

    def _load_compressed(self) -> Any:
        return load_checkpoint(
            self._checkpoint, dtype=self.lineage.dtype, device=self.lineage.machine.chosen
        )
