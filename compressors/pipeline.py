"""One run, from recipe to report; this file is the table of contents of the library."""

import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lrc.compressors import report
from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.prefix import CompressedPrefix
from lrc.compressors.calibrate.states import state_files
from lrc.compressors.calibrate.windows import take_windows
from lrc.compressors.checkpoint.assemble import write_checkpoint
from lrc.compressors.checkpoint.reader import load_checkpoint
from lrc.compressors.checkpoint.reader import load_tokenizer as load_checkpoint_tokenizer
from lrc.compressors.checkpoint.writer import new_folder
from lrc.compressors.corpus import fingerprint
from lrc.compressors.decompose import METHODS, Statistics
from lrc.compressors.evaluate import check_gates, check_texts, compare, evaluate_model
from lrc.compressors.execute import decompose, executed, factors_file
from lrc.compressors.journal import Journal, open_journal, write_text
from lrc.compressors.memory import release_memory
from lrc.compressors.models.source import Source, convert_gguf, load_dense
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.planning.plan import Matrix, Plan, read_matrices
from lrc.compressors.planning.ranks import allocate_ranks
from lrc.compressors.prepare import Prepared, prepare
from lrc.compressors.profile import Profile, profile_plan
from lrc.compressors.progress import OnStep
from lrc.configs.errors import GateMissed
from lrc.configs.load import LoadedRecipe


@dataclass(frozen=True)
class Machine:
    """How to run, as opposed to what: the same recipe gives the same result elsewhere.

    `device` is a torch device or ``auto``; `on_step` is told (stage, done, total) and may raise
    `Stopped`.
    """

    device: str = "auto"
    overwrite: bool = False
    on_step: OnStep = field(default=lambda stage, done, total: None)

    @property
    def chosen(self) -> str:
        """The device that ``auto`` stands for."""
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"


def compress(loaded: LoadedRecipe, machine: Machine | None = None) -> dict[str, Any]:
    """Run a recipe: calibrate, decompose, save, evaluate, report.

    What an earlier, interrupted run of the same recipe has finished is taken over.

    Returns
    -------
    dict
        The report, as written to ``OUTPUT/report.json``.

    Raises
    ------
    LrcError
        One of its kinds; the state is saved, and the same call continues.
    """
    machine = machine or Machine()
    recipe = loaded.recipe
    prepared = prepare(recipe)
    with _opened(prepared, machine) as journal:
        result = report.stored(prepared, journal)
        if result is None:
            clock = _Clock(journal)
            if not (journal.output / "checkpoint").is_dir():
                _make_checkpoint(loaded, prepared, journal, clock, machine)
            journal.forget("statistics", "energies", *state_files(journal))
            with clock("evaluate"):
                evaluation = _evaluate(prepared, journal, clock, machine)
            result = report.write(prepared, journal, evaluation, clock.seconds, machine.chosen)
        journal.forget("factors", "source")
    missed = check_gates(recipe.evaluate.gates, result["evaluation"])
    if missed:
        raise GateMissed(missed, result)
    return result


def measure(loaded: LoadedRecipe, machine: Machine | None = None) -> Plan:
    """Run a recipe as far as its ranks, and predict what every matrix loses at its rank.

    `compress` goes on from there. Where it has been already, its own predictions are read.

    Raises
    ------
    LrcError
        One of its kinds; the state is saved, and the same call continues.
    """
    machine = machine or Machine()
    prepared = prepare(loaded.recipe)
    with _opened(prepared, machine) as journal:
        clock = _Clock(journal)
        return _executed(prepared, journal) or _measure(
            prepared, _reader(prepared, journal, clock), journal, clock, machine
        )


def profile(
    loaded: LoadedRecipe, windows: int, machine: Machine | None = None
) -> tuple[Plan, Profile]:
    """As `measure`; then hold the predictions against the dense model, see `profile_plan`.

    Parameters
    ----------
    windows : int
        How many of the calibration windows the losses are taken over, the first ones.

    Raises
    ------
    LrcError
        One of its kinds; the state is saved, and the same call continues.
    """
    machine = machine or Machine()
    prepared = prepare(loaded.recipe)
    with _opened(prepared, machine) as journal:
        clock = _Clock(journal)
        reader = _reader(prepared, journal, clock)  # before calibration makes the skeleton float32
        plan = _executed(prepared, journal) or _measure(prepared, reader, journal, clock, machine)
        measured = profile_plan(
            plan,
            prepared.recipe,
            reader,
            journal,
            _known(journal),
            _windows(prepared, reader, journal, machine)[:windows],
            # In 16 bits, rounding would move the loss more than most matrices do.
            dense=lambda: load_dense(
                prepared.source, reader.folder, dtype=torch.float32, device=machine.chosen
            ),
            device=machine.chosen,
            on_step=machine.on_step,
        )
        return plan, measured


def _opened(prepared: Prepared, machine: Machine) -> AbstractContextManager[Journal]:
    output = Path(prepared.recipe.output).expanduser()
    return open_journal(output, _identity(prepared), overwrite=machine.overwrite)


def _executed(prepared: Prepared, journal: Journal) -> Plan | None:
    if not journal.has("executed.json"):
        return None
    records = journal.read_json("executed.json")["matrices"]
    return prepared.plan.with_matrices(read_matrices(records))


def _measure(
    prepared: Prepared,
    reader: WeightReader,
    journal: Journal,
    clock: "_Clock",
    machine: Machine,
) -> Plan:
    with clock("calibrate"):
        _calibrate(prepared, reader, journal, machine)
    with clock("allocate"):
        plan = _allocate(prepared, reader, journal, machine)
    return _predict(plan, prepared, reader, journal, machine)


def _make_checkpoint(
    loaded: LoadedRecipe, prepared: Prepared, journal: Journal, clock: "_Clock", machine: Machine
) -> None:
    check_texts(prepared.architecture.model, prepared.tokenizer, prepared.recipe.evaluate)
    reader = _reader(prepared, journal, clock)
    with clock("calibrate"):
        _calibrate(prepared, reader, journal, machine)
    with clock("allocate"):
        plan = _allocate(prepared, reader, journal, machine)
    with clock("decompose"):
        plan = _decompose(plan, prepared, reader, journal, machine)
    journal.write_json("executed.json", plan.to_json())
    with clock("save"), new_folder(journal.output / "checkpoint") as folder:
        write_checkpoint(
            folder,
            plan=plan,
            loaded=loaded,
            source=prepared.source,
            architecture=prepared.architecture,
            reader=reader,
            tokenizer=prepared.tokenizer,
            factors=lambda layer, name: journal.read_tensor(factors_file(layer), name),
        )


def _calibrate(
    prepared: Prepared, reader: WeightReader, journal: Journal, machine: Machine
) -> None:
    """Collect what the methods need to know of layers that are not factored yet."""
    plan = prepared.plan
    homes = plan.homes()
    left = {m.layer for m in plan.matrices if not journal.has(factors_file(homes[m.name]))}
    needs = _needs(plan, left)
    if not needs:
        return
    statistics.collect(
        prepared.architecture,
        reader,
        _windows(prepared, reader, journal, machine),
        needs,
        journal,
        labels=prepared.recipe.calibration.labels,
        seed=prepared.recipe.seed,
        device=machine.chosen,
        memory_limit_gib=prepared.recipe.calibration.memory_limit_gib,
        on_step=machine.on_step,
    )
    journal.forget(*state_files(journal))


def _windows(
    prepared: Prepared, reader: WeightReader, journal: Journal, machine: Machine
) -> torch.Tensor:
    return take_windows(
        prepared.recipe.calibration,
        prepared.tokenizer,
        journal,
        seed=prepared.recipe.seed,
        embedding=prepared.architecture.model.get_input_embeddings(),
        dense=lambda: load_dense(
            prepared.source, reader.folder, dtype=_dtype(prepared, machine), device=machine.chosen
        ),
        on_step=machine.on_step,
    )


def _needs(plan: Plan, layers: Collection[int]) -> dict[str, frozenset[str]]:
    """Return linear -> what its method wants to know of it, for those that are not kept dense."""
    needs = {}
    for matrix in plan.matrices:
        method = METHODS[matrix.method]
        if matrix.factored and method.needs and matrix.layer in layers:
            needs[matrix.name] = method.needs | ({"whole_inputs"} if method.shared else set())
    return needs


def _allocate(
    prepared: Prepared,
    reader: WeightReader,
    journal: Journal,
    machine: Machine,
) -> Plan:
    """Fill in the ranks that shapes did not tell; the plan is written for its reader to edit."""
    if journal.has("plan.json"):
        return prepared.plan.with_matrices(
            read_matrices(journal.read_json("plan.json")["matrices"])
        )
    plan = allocate_ranks(
        prepared.plan,
        prepared.recipe,
        reader,
        journal,
        _known(journal),
        device=machine.chosen,
        on_step=machine.on_step,
    )
    write_text(journal.output / "plan.json", json.dumps(plan.to_json(), indent=1) + "\n")
    journal.write_json("plan.json", plan.to_json())
    return plan


def _predict(
    plan: Plan, prepared: Prepared, reader: WeightReader, journal: Journal, machine: Machine
) -> Plan:
    """Fill in the losses that no allocation has asked for; layers that are done know theirs."""
    done = {m.layer for m in plan.matrices if journal.has(factors_file(m.layer))}
    return allocate_ranks(
        plan.with_matrices(m for layer in done for m in executed(journal, layer)),
        prepared.recipe,
        reader,
        journal,
        _known(journal),
        device=machine.chosen,
        on_step=machine.on_step,
        every=True,
    )


def _decompose(
    plan: Plan, prepared: Prepared, reader: WeightReader, journal: Journal, machine: Machine
) -> Plan:
    def finished(layer: int) -> None:
        journal.forget(statistics.inputs_file(layer), statistics.gradients_file(layer))

    return decompose(
        plan,
        prepared.recipe,
        reader,
        journal,
        _known(journal),
        device=machine.chosen,
        on_step=machine.on_step,
        prefix=_prefix(plan, prepared, reader, journal, machine),
        finished=finished,
    )


def _prefix(
    plan: Plan, prepared: Prepared, reader: WeightReader, journal: Journal, machine: Machine
) -> CompressedPrefix | None:
    stages = prepared.recipe.stages
    refitted = {m.layer for m in plan.matrices if stages[m.stage].decompose.compensate is not None}
    if all(journal.has(factors_file(layer)) for layer in refitted):
        return None
    return CompressedPrefix(
        prepared.architecture,
        reader,
        _windows(prepared, reader, journal, machine),
        journal,
        device=machine.chosen,
        memory_limit_gib=prepared.recipe.calibration.memory_limit_gib,
    )


def _known(journal: Journal) -> Callable[[Matrix], Statistics]:
    return lambda matrix: statistics.load(journal, matrix.layer, matrix.name)


def _evaluate(
    prepared: Prepared, journal: Journal, clock: "_Clock", machine: Machine
) -> dict[str, Any]:
    """Judge dense and compressed model one after the other; what is judged already is kept."""
    recipe, chosen = prepared.recipe, machine.chosen
    dtype = _dtype(prepared, machine)
    if not recipe.evaluate.perplexity and not recipe.evaluate.tasks.names:
        return compare(None, {"perplexity": {}, "tasks": {}})

    def dense() -> Any:
        weights = _weights(prepared.source, journal, clock)
        return load_dense(prepared.source, weights, dtype=dtype, device=chosen)

    def compressed() -> Any:
        return load_checkpoint(journal.output / "checkpoint", dtype=dtype, device=chosen)

    blocks: dict[str, dict[str, Any]] = {}
    loaders = {"dense": dense, "compressed": compressed}
    for name, load in loaders.items():
        file = f"evaluation-{name}.json"
        asked = recipe.evaluate.model_dump(mode="json", exclude={"gates", "dense"})
        if name == "dense" and not recipe.evaluate.dense:
            continue
        if not journal.has(file) or journal.read_json(file)["asked"] != asked:
            tokenizer = load_checkpoint_tokenizer(journal.output / "checkpoint")

            def on_step(stage: str, done: int, total: int, name: str = name) -> None:
                machine.on_step(f"evaluate {name}: {stage}", done, total)

            block = evaluate_model(
                load(), tokenizer, recipe.evaluate, seed=recipe.seed, on_step=on_step
            )
            journal.write_json(file, {"asked": asked, "block": block})
            release_memory()
        blocks[name] = journal.read_json(file)["block"]
    return compare(blocks.get("dense"), blocks["compressed"])


def _reader(prepared: Prepared, journal: Journal, clock: "_Clock") -> WeightReader:
    return WeightReader(_weights(prepared.source, journal, clock), prepared.architecture)


def _weights(source: Source, journal: Journal, clock: "_Clock") -> Path:
    """Return a folder of safetensors for the source; a GGUF file is converted once."""
    if source.gguf is None:
        return source.folder
    if not journal.has("source"):
        with clock("convert"), new_folder(journal.path("source")) as folder:
            convert_gguf(source, folder)
    return journal.path("source")


def _dtype(prepared: Prepared, machine: Machine) -> torch.dtype:
    """Choose what a whole model runs in: CPUs are slow and inexact in 16 bits."""
    return torch.float32 if machine.chosen == "cpu" else prepared.source.dtype


def _identity(prepared: Prepared) -> dict[str, Any]:
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


class _Clock:
    """Seconds of each stage, summed over the runs it took."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.seconds: dict[str, float] = (
            journal.read_json("seconds.json") if journal.has("seconds.json") else {}
        )

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            release_memory()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start
            self._journal.write_json("seconds.json", self.seconds)
