"""The stages of one run: what each is given, and where what it makes is kept."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lrc.compressors import report
from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.activation_cache import cache_files
from lrc.compressors.calibrate.sequential_calibration import SequentialCalibration
from lrc.compressors.checkpoint.assemble import write_checkpoint
from lrc.compressors.checkpoint.reader import load_checkpoint, load_tokenizer
from lrc.compressors.checkpoint.writer import new_folder
from lrc.compressors.compress.embeddings import round_outside
from lrc.compressors.compress.layerwise import decompose, executed, factors_file
from lrc.compressors.compress.profile import Profile, profile_plan
from lrc.compressors.corpus.documents import fingerprint
from lrc.compressors.evaluate.evaluator import Evaluator
from lrc.compressors.io.journal import Journal, open_journal, write_text
from lrc.compressors.io.machine import Clock, Machine
from lrc.compressors.model_versions import Lineage
from lrc.compressors.planning.allocate import allocate_ranks
from lrc.compressors.planning.plan import Matrix, Plan, read_matrices
from lrc.compressors.planning.required_statistics import collected, compensation
from lrc.compressors.prepare import Prepared, planned_again
from lrc.compressors.solvers.moments import Statistics
from lrc.configs.load import LoadedRecipe


@dataclass(frozen=True)
class Run:
    """A prepared recipe at work in its output folder."""

    prepared: Prepared
    journal: Journal
    machine: Machine
    clock: Clock

    @cached_property
    def lineage(self) -> Lineage:
        """The models that the run starts from."""
        return Lineage(self.prepared, self.journal, self.machine, self.clock)

    @cached_property
    def plan(self) -> Plan:
        """The plan, on the shapes that the slicing stages have left."""
        return planned_again(self.prepared, self.lineage.architecture)

    @property
    def executed(self) -> Plan | None:
        """The plan as it was carried out, if it has been."""
        if not self.journal.has("executed.json"):
            return None
        done = self.journal.read_json("executed.json")
        records = [*done["matrices"], *done.get("outside", [])]
        return self.prepared.plan.with_matrices(read_matrices(records))

    def calibrate(self) -> None:
        """Slice, then collect what the methods need to know of layers that are not factored yet."""
        self.lineage.slice()
        plan, calibration = self.plan, self.prepared.recipe.calibration
        homes = plan.homes()
        left = {m.layer for m in plan.matrices if not self.journal.has(factors_file(homes[m.name]))}
        recipe = self.prepared.recipe
        asked = {m.name: collected(m, recipe) for m in plan.matrices if m.layer in left}
        needs = {name: needed for name, needed in asked.items() if needed}
        with self.clock("calibrate"):
            if not needs:
                return
            statistics.collect(
                self.lineage.architecture,
                self.lineage.reader,
                self.lineage.windows(),
                needs,
                self.journal,
                labels=calibration.labels,
                seed=self.prepared.recipe.seed,
                device=self.machine.chosen,
                memory_limit_gib=calibration.memory_limit_gib,
                on_step=self.machine.on_step,
            )
            self.journal.forget(*cache_files(self.journal))

    def allocate(self) -> Plan:
        """Fill in the ranks that shapes did not tell; the plan is written for people to edit."""
        with self.clock("allocate"):
            if self.journal.has("plan.json"):
                records = self.journal.read_json("plan.json")["matrices"]
                return self.plan.with_matrices(read_matrices(records))
            plan = self._ranks(self.plan)
            text = json.dumps(plan.to_json(), indent=1) + "\n"
            write_text(self.journal.output / "plan.json", text)
            self.journal.write_json("plan.json", plan.to_json())
        return plan

    def predict(self, plan: Plan) -> Plan:
        """Fill in the losses that no allocation has asked for; layers that are done know theirs."""
        done = {m.layer for m in plan.matrices if self.journal.has(factors_file(m.layer))}
        known = plan.with_matrices(m for layer in done for m in executed(self.journal, layer))
        return self._ranks(known, every=True)

    def profile(self, plan: Plan, windows: int) -> Profile:
        """Measure on the first `windows` calibration windows what every matrix really loses."""
        self.lineage.slice()
        return profile_plan(
            plan,
            self.prepared.recipe,
            self.lineage.reader,
            self.journal,
            self._known,
            self.lineage.windows()[:windows],
            # In 16 bits, rounding would move the loss more than most matrices do.
            dense=lambda: self.lineage.load_sliced(torch.float32),
            device=self.machine.chosen,
            on_step=self.machine.on_step,
        )

    def decompose(self, plan: Plan) -> Plan:
        """Factor every matrix; what is known of a layer is forgotten when it is done."""

        def finished(layer: int) -> None:
            self.journal.forget(statistics.inputs_file(layer), statistics.gradients_file(layer))

        plan = replace(plan, slices=self.lineage.slice())
        if plan.outside:
            with self.clock("decompose"):
                reader, device = self.lineage.reader, self.machine.chosen
                plan = round_outside(plan, reader, self.journal, device=device)
        if not plan.matrices:
            self.journal.write_json("executed.json", plan.to_json())
            return plan
        with self.clock("decompose"):
            plan = decompose(
                plan,
                self.prepared.recipe,
                self.lineage.reader,
                self.journal,
                self._known,
                device=self.machine.chosen,
                on_step=self.machine.on_step,
                prefix=self._prefix(plan),
                finished=finished,
            )
        self.journal.write_json("executed.json", plan.to_json())
        return plan

    def save(self, plan: Plan, loaded: LoadedRecipe) -> None:
        """Write the checkpoint, whole or not at all."""
        with self.clock("save"), new_folder(self._checkpoint) as folder:
            write_checkpoint(
                folder,
                plan=plan,
                loaded=loaded,
                source=self.prepared.source,
                architecture=self.lineage.architecture,
                reader=self.lineage.reader,
                tokenizer=self.prepared.tokenizer,
                factors=lambda layer, name: self.journal.read_tensor(factors_file(layer), name),
            )

    def evaluate(self) -> dict[str, Any]:
        """Score the dense and the compressed model and the baselines."""
        lineage, recipe = self.lineage, self.prepared.recipe
        evaluator = Evaluator(
            recipe.evaluate,
            recipe.seed,
            self.journal,
            self.clock,
            self.machine.on_step,
            load_tokenizer=lambda: load_tokenizer(self._checkpoint),
            load_dense=lambda: lineage.load_dense(lineage.dtype),
            load_compressed=lambda: load_checkpoint(
                self._checkpoint, dtype=lineage.dtype, device=self.machine.chosen
            ),
        )
        plan = self.journal.read_json("executed.json")
        targets = report.baseline_targets(plan, self.prepared.dense, self.prepared.source.dtype)
        return evaluator.add_baselines(evaluator.evaluate(), targets)

    @property
    def _checkpoint(self) -> Path:
        return self.journal.output / "checkpoint"

    def _ranks(self, plan: Plan, *, every: bool = False) -> Plan:
        return allocate_ranks(
            plan,
            self.prepared.recipe,
            self.lineage.reader,
            self.journal,
            self._known,
            device=self.machine.chosen,
            on_step=self.machine.on_step,
            every=every,
        )

    def _known(self, matrix: Matrix) -> Statistics:
        return statistics.load(self.journal, matrix.layer, matrix.name)

    def _prefix(self, plan: Plan) -> SequentialCalibration | None:
        recipe = self.prepared.recipe
        refitted = {m.layer for m in plan.matrices if compensation(m, recipe)}
        if all(self.journal.has(factors_file(layer)) for layer in refitted):
            return None
        return SequentialCalibration(
            self.lineage.architecture,
            self.lineage.reader,
            self.lineage.windows(),
            self.journal,
            device=self.machine.chosen,
            memory_limit_gib=self.prepared.recipe.calibration.memory_limit_gib,
        )


@contextmanager
def open_run(prepared: Prepared, machine: Machine) -> Iterator[Run]:
    """Enter the output folder of a recipe, see `open_journal`; raises the same."""
    output = Path(prepared.recipe.output).expanduser()
    with open_journal(output, identity(prepared), overwrite=machine.overwrite) as journal:
        yield Run(prepared, journal, machine, Clock(journal))


def identity(prepared: Prepared) -> dict[str, Any]:
    """Return what decides the bytes of the checkpoint."""
    recipe = prepared.recipe.model_dump(mode="json", include={"calibration", "stages", "seed"})
    del recipe["calibration"]["memory_limit_gib"]
    source = prepared.source
    installed = report.versions()
    versions = {name: installed[name] for name in ("lrc", "torch", "transformers")}
    model = source.fingerprint() | {"dtype": source.spec.dtype, "tokenizer": source.spec.tokenizer}
    text = {"calibration_text": fingerprint(prepared.recipe.calibration.source)}
    plans = {"given_plans": prepared.plan.given_hashes()}
    return {"model": model, **recipe, **text, **plans, "versions": versions}
