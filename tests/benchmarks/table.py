"""Compress one model in many ways and print one table: the quality section of BENCHMARKS.md.

usage: python tests/benchmarks/table.py RECIPE FOLDER [KEY=VALUE ...]
           [--seconds N] [--jobs N] [--rows PATTERN ...] [--checkpoints]

RECIPE gives model, calibration text and evaluation, as tests/benchmarks/protocol_a.yaml does; rows
of table_rows.py replace its stages. Rows that want the same calibration share its statistics. Rows
that train the same decomposed weights share these: their seconds of compression are those of the
first row only. A row that is finished in FOLDER is not run again, and one that was begun goes on,
so that the table can be made in pieces of N seconds.
A small model leaves most of a GPU idle: several rows may be made side by side, at the expense of
the column of seconds.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from table_rows import Stages, every_row

from lrc.compressors import pipeline
from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_windows import FILE as WINDOWS
from lrc.compressors.calibrate.calibration_windows import take_windows
from lrc.compressors.checkpoint.gguf_conversion import convert_gguf
from lrc.compressors.compress.layerwise import COMPRESSED
from lrc.compressors.evaluate.scores import evaluate_model
from lrc.compressors.io.journal import Journal, open_journal
from lrc.compressors.io.machine import Machine, release_memory
from lrc.compressors.models.source import load_dense, load_tokenizer, locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.prepare import prepare
from lrc.compressors.run_identity import identity
from lrc.compressors.stages import STAGES
from lrc.configs.decompose import DecomposeBase
from lrc.configs.decompose_methods import Decompose
from lrc.configs.load import LoadedRecipe, load_recipe
from lrc.configs.recipe import Recipe

EVERYTHING = frozenset(
    {"inputs", "whole_inputs", "gradients", "whole_gradients"}
    | {"input_mean", "input_magnitude", "row_fisher"}
)
Row = tuple[str, list[str], Stages]
"""Name, overrides of the recipe, stages."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Run what is not finished, then print the table of all that is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument("--jobs", type=int, default=1, help="rows made side by side")
    parser.add_argument(
        "--checkpoints", action="store_true", help="keep them in FOLDER/checkpoints"
    )
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    deadline = time.time() + asked.seconds
    asked.overrides += _as_folder(load_recipe(asked.recipe, asked.overrides), asked.folder)
    if not (asked.folder / "dense.json").is_file():
        _dense(load_recipe(asked.recipe, asked.overrides), asked.folder)
    wanted = [
        (name, [f"calibration.{key}={value}" for key, value in calibration.items()], stages)
        for name, stages, calibration in every_row()
        if any(fnmatchcase(name, pattern) for pattern in asked.rows)
        and not (asked.folder / f"{name}.json").is_file()
    ]
    collecting = [row for row in wanted if "slice" not in row[2][0]]
    for changes in dict.fromkeys(tuple(changes) for _, changes, _ in collecting):
        _calibrate(load_recipe(asked.recipe, [*asked.overrides, *changes]), asked.folder)
    release_memory()
    families: dict[str, list[Row]] = {}
    for row in wanted:
        families.setdefault(_family(row), []).append(row)
    keep = asked.folder / "checkpoints" if asked.checkpoints else None
    make = partial(_make, asked.recipe, asked.folder, asked.overrides, deadline, keep)
    context = multiprocessing.get_context("spawn")  # CUDA survives no fork
    share = (asked.jobs, context.Value("i", 0))
    with ProcessPoolExecutor(asked.jobs, context, _share_machine, share) as pool:
        if not _make_all(pool, make, list(families.values())):
            print("time is up; the same command goes on", file=sys.stderr)
    _print(asked.folder)


def _as_folder(recipe: LoadedRecipe, folder: Path) -> list[str]:
    """Dequantize a GGUF model once for all rows; return the override that names the result."""
    source = locate(recipe.recipe.model)
    if source.gguf is None:
        return []
    model = folder / "model"
    if not model.is_dir():
        partial_copy = folder / "model.partial"
        shutil.rmtree(partial_copy, ignore_errors=True)
        partial_copy.mkdir(parents=True)
        convert_gguf(source, partial_copy)
        load_tokenizer(source).save_pretrained(partial_copy)
        partial_copy.rename(model)
    return [f"model={model}"]


def _dense(recipe: LoadedRecipe, folder: Path) -> None:
    """Evaluate the model as it is."""
    prepared = prepare(recipe.recipe, STAGES)
    source = prepared.source
    model = load_dense(source, source.folder, dtype=source.dtype, device=DEVICE)
    block = evaluate_model(
        model, prepared.tokenizer, recipe.recipe.evaluate, seed=0, on_step=lambda *_: None
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dense.json").write_text(json.dumps(block))


def _share_machine(jobs: int, turn: Any) -> None:
    """Give a new job its share of the cores, and the GPUs in turn."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    with turn.get_lock():
        number, turn.value = turn.value, turn.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _shared(recipe: Recipe, folder: Path) -> Journal:
    calibration = recipe.calibration
    key = f"{Path(calibration.source).parent.name}-{calibration.labels}"
    return Journal(folder / "calibration" / key)


def _calibrate(loaded: LoadedRecipe, folder: Path) -> None:
    """Collect what any method may ask for, once for every calibration."""
    shared = _shared(loaded.recipe, folder)
    if shared.has("whole.json"):
        return
    shutil.rmtree(shared.work, ignore_errors=True)
    prepared = prepare(loaded.recipe, STAGES)
    calibration, architecture = loaded.recipe.calibration, prepared.architecture
    started = time.monotonic()
    shared.work.mkdir(parents=True)
    windows = take_windows(
        calibration,
        prepared.tokenizer,
        shared,
        seed=loaded.recipe.seed,
        embedding=architecture.model.get_input_embeddings(),
        sample=lambda *_: torch.empty(0),
    )
    context = CalibrationContext(
        architecture,
        WeightReader(prepared.source.folder, architecture),
        lambda: windows,
        shared,
        device=DEVICE,
        memory_limit_gib=32,
        seed=loaded.recipe.seed,
        on_step=lambda *_: None,
        labels=calibration.labels,
    )
    statistics.collect(context, {linear.name: EVERYTHING for linear in architecture.linears})
    shared.write_json("whole.json", {})
    print(f"statistics {shared.output.name}: {time.monotonic() - started:.1f} s", flush=True)


def _family(row: Row) -> str:
    """Name what rows have in common that want the same curves: all but what is decided by them."""
    name, changes, stages = row
    stage = stages[0].get("decompose")
    if stage is None:  # has no curves
        return hashlib.sha256(name.encode()).hexdigest()[:16]
    options: DecomposeBase = TypeAdapter(Decompose).validate_python(stage)
    decided = {"keep", "compensate", "min_keep", "max_relative_error", "rank_multiple"}
    shared = options.model_dump(exclude=set() if options.allocation == "uniform" else decided)
    return hashlib.sha256(json.dumps([changes, shared]).encode()).hexdigest()[:16]


def _same_weights(row: Row) -> str:
    """Name what rows have in common that train the same compressed weights."""
    _, changes, stages = row
    return hashlib.sha256(json.dumps([changes, stages[:-1]]).encode()).hexdigest()[:16]


def _make_all(
    pool: ProcessPoolExecutor, make: Callable[[list[Row]], bool], families: list[list[Row]]
) -> bool:
    """Make every row: the first of a family measures its curves, then go the others."""
    firsts = {pool.submit(make, rows[:1]): rows[1:] for rows in families}
    others = [pool.submit(make, [row]) for first in as_completed(firsts) for row in firsts[first]]
    return all([row.result() for row in [*firsts, *others]])


def _make(
    recipe: Path,
    folder: Path,
    overrides: list[str],
    deadline: float,
    keep: Path | None,
    rows: list[Row],
) -> bool:
    """Make rows; one that fails is told of and does not end the others."""
    for row in rows:
        if time.time() > deadline:
            return False
        try:
            _row(recipe, folder, overrides, row, keep)
        except Exception:
            print(f"{row[0]}: failed", traceback.format_exc(), sep="\n", file=sys.stderr)
    return True


def _row(recipe: Path, folder: Path, overrides: list[str], row: Row, keep: Path | None) -> None:
    """Compress and evaluate one row; curves are the first row's of the family, and their time."""
    name, changes, stages = row
    output = folder / "runs" / name.replace(" ", "-")
    changes = [
        *changes,
        f"stages={json.dumps(stages)}",
        "evaluate.dense=false",
        "evaluate.baselines=[]",
    ]
    loaded = load_recipe(recipe, [*overrides, *changes, f"output={output}"])
    shared, prepared = _shared(loaded.recipe, folder), prepare(loaded.recipe, STAGES)
    curves, before = folder / "curves" / _family(row), 0.0
    if (curves / "seconds.json").is_file():
        before = json.loads((curves / "seconds.json").read_text())
    with open_journal(output, identity(prepared)) as journal:
        if "slice" not in stages[0] and not journal.has(WINDOWS):
            if "quantize" not in stages[0]:  # integers alone have statistics with capped tokens
                _link(shared.path("statistics"), journal.path("statistics"))
            if before:
                _link(curves, journal.path("energies"))
            os.link(shared.path(WINDOWS), journal.path(WINDOWS))
    started = time.monotonic()
    decomposed = loaded.recipe.stages_of("decompose").get(0)
    if not before and decomposed is not None and decomposed.allocation != "uniform":
        pipeline.measure(loaded)
        _link(journal.path("energies"), curves)
        (curves / "seconds.json").write_text(json.dumps(time.monotonic() - started))
    compressed = folder / "compressed" / _same_weights(row)
    shares = "decompose" in stages[0] and "heal" in stages[-1]
    if shares and compressed.is_dir() and not journal.path(COMPRESSED).exists():
        _link(compressed, journal.path(COMPRESSED))

    def share(stage: str, *_: object) -> None:
        if shares and stage == "heal" and not compressed.exists():
            partial_copy = compressed.with_name(f"{compressed.name}.{os.getpid()}")
            _link(journal.path(COMPRESSED), partial_copy)
            with suppress(OSError):  # another row was faster
                partial_copy.rename(compressed)

    report = pipeline.compress(loaded, Machine(on_step=share))
    seconds = report["timing"]["seconds"]
    seconds["allocate"] = seconds.get("allocate", 0) + before
    seconds["compress"] = seconds.get("compress", 0) + seconds.get("slice", 0)
    facts = {
        "kept": report["size"]["targeted"]["kept"],  # with the embedding, where it is rounded
        "parameters": report["size"]["model"]["parameters"]["compressed"],
        "bytes": report["size"]["model"]["file_bytes"]["compressed"],
        "seconds": {k: seconds.get(k, 0) for k in ("allocate", "compress", "save", "evaluate")},
        "dense": sum(not layer["config"]["components"] for layer in report["layers"]),
        "evaluation": report["evaluation"],
        "training": report["training"],
        "latency": report["latency"],
    }
    (folder / f"{name}.json").write_text(json.dumps(facts))
    p = {k: round(v["compressed"], 2) for k, v in report["evaluation"]["perplexity"].items()}
    print(f"{name}: {p} {time.monotonic() - started:.1f} s", flush=True)
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (output / "checkpoint").rename(keep / output.name)
    shutil.rmtree(output)


def _link(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)


def _print(folder: Path) -> None:
    dense = json.loads((folder / "dense.json").read_text())
    texts = list(dense["perplexity"])
    accuracies = [(t, "acc,none" if "acc,none" in m else "acc") for t, m in dense["tasks"].items()]
    print("| row | kept | " + " | ".join([*texts, *(t for t, _ in accuracies)]) + " | s |")
    print("|---" * (3 + len(texts) + len(accuracies)) + "|")
    cells = [f"{dense['perplexity'][t]['perplexity']:.2f}" for t in texts]
    cells += [f"{dense['tasks'][t][m]['value']:.3f}" for t, m in accuracies]
    print("| dense | 1.000 | " + " | ".join(cells) + " | |")
    for name, _, _ in every_row():
        if not (folder / f"{name}.json").is_file():
            continue
        row = json.loads((folder / f"{name}.json").read_text())
        measured = row["evaluation"]
        cells = [_number(measured["perplexity"][t]["compressed"]) for t in texts]
        tasks = measured["tasks"]
        cells += [f"{tasks[t][m]['compressed']:.3f}" if t in tasks else "" for t, m in accuracies]
        seconds = row["seconds"]["allocate"] + row["seconds"]["compress"]
        print(f"| {name} | {row['kept']:.4f} | " + " | ".join(cells) + f" | {seconds:.0f} |")


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e3 else f"{value:.1e}"


if __name__ == "__main__":
    main()
