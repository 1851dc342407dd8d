"""Compress one model in many ways and print one table: the quality section of BENCHMARKS.md.

usage: python tests/benchmarks/table.py RECIPE FOLDER [KEY=VALUE ...]
           [--seconds N] [--jobs N] [--rows PATTERN ...] [--checkpoints]

RECIPE gives model, calibration text and evaluation, as tests/benchmarks/protocol_a.yaml does; the
rows below replace its stage. Rows that want the same calibration share its statistics. A row that
is finished in FOLDER is not run again, and one that was begun goes on, so that the table can be
made in pieces of N seconds.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from lrc.compressors import pipeline
from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_windows import FILE as WINDOWS
from lrc.compressors.calibrate.calibration_windows import take_windows
from lrc.compressors.evaluate.scores import evaluate_model
from lrc.compressors.io.journal import Journal, open_journal
from lrc.compressors.io.machine import release_memory
from lrc.compressors.models.source import convert_gguf, load_dense, load_tokenizer, locate
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.prepare import prepare
from lrc.compressors.session import identity
from lrc.compressors.stages import STAGES
from lrc.configs.decompose import DecomposeBase
from lrc.configs.decompose_methods import Decompose
from lrc.configs.load import LoadedRecipe, load_recipe
from lrc.configs.recipe import Recipe

METHODS = ["svd", "asvd", "fwsvd", "lord", "svd-llm", "basis-sharing", "kfac"]
EVERYTHING = frozenset(
    {"inputs", "whole_inputs", "gradients", "whole_gradients"}
    | {"input_mean", "input_magnitude", "row_fisher"}
)
Stages = list[dict[str, Any]]
Row = tuple[str, list[str], Stages]
"""Name, overrides of the recipe, stages."""
DENSE_BYTES = 269_030_016
"""Of SmolLM2-135M's tensors in 16 bits."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield name, options and changes of the calibration; what matters most comes first."""
    for keep in (0.8, 0.6):
        best = {
            "method": "kfac",
            "keep": keep,
            "storage": "pivoted_low_rank",
            "allocation": "lagrangian",
        }
        yield f"kfac, lagrangian, pivot, {keep}", best, {}
        for mix in (0.2, 0.3, 0.4, 0.5):
            name = f"kfac, lagrangian, pivot, compensate {mix}, {keep}"
            yield name, best | {"compensate": {"mix": mix, "residual": 0}}, {}
        for mix, residual in ((0.3, 0.25), (0.3, 0.5), (0.3, 0.75), (0.5, 0.5)):
            name = f"kfac, lagrangian, pivot, compensate {mix}, residual {residual}, {keep}"
            yield name, best | {"compensate": {"mix": mix, "residual": residual}}, {}
        yield f"kfac, real labels, lagrangian, pivot, {keep}", best, {"labels": "real"}
        for method in METHODS:
            for allocation in ("uniform", "lagrangian"):
                stage = {"method": method, "keep": keep, "allocation": allocation}
                if method != "basis-sharing":
                    stage["storage"] = "low_rank"
                changes = {"labels": "real"} if method == "fwsvd" else {}
                yield f"{method}, {allocation}, factors, {keep}", stage, changes
        yield f"kfac, uniform, pivot, {keep}", best | {"allocation": "uniform"}, {}
        pivot = {
            "method": "svd-llm",
            "keep": keep,
            "storage": "pivoted_low_rank",
            "allocation": "uniform",
        }
        yield f"svd-llm, uniform, pivot, {keep}", pivot, {}
        welore = {"method": "svd", "keep": keep, "allocation": "heavy-tail"}
        yield f"svd, heavy-tail, factors, {keep}", welore, {}
    plain = {"method": "kfac", "keep": 0.8}
    for damp in (1e-4, 1e-2, 1.0):
        yield f"kfac, gradient damp {damp:g}, 0.8", plain | {"gradient_damp": damp}, {}
    for share in (0.3, 0.5):
        yield f"kfac, min_keep {share}, 0.8", plain | {"min_keep": share}, {}
    yield "kfac, max_relative_error 0.02, 0.8", plain | {"max_relative_error": 0.02}, {}
    yield "kfac, rank multiples of 8, 0.8", plain | {"rank_multiple": 8}, {}
    yield "kfac, factors, 0.8", plain | {"storage": "low_rank"}, {}
    yield "kfac, sampled labels, 0.8", plain, {"labels": "sampled"}
    for method, keep in (("svd-llm", 0.8), ("kfac", 0.8), ("svd-llm", 0.6), ("kfac", 0.6)):
        stage = {"method": method, "keep": keep}
        if method == "kfac":
            stage["compensate"] = {}
        other = {"source": "data/wikitext2/validation.jsonl"}
        yield f"{method} on WikiText-2, {keep}", stage, other
    yield from other_forms()


def other_forms() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield the rows of pruning, dictionaries and mixed plans, as `rows` does."""
    every = ["pivoted_low_rank", "sparse", "dictionary"]
    for keep in (0.8, 0.6):
        stage = {"method": "cospadi", "keep": keep, "rounds": 20}
        yield f"cospadi, 20 rounds, uniform, {keep}", stage, {}
    for keep in (0.8, 0.6, 0.5):
        mixed = {"method": "mixed", "keep": keep}
        more = mixed | {"components": every, "compensate": {}}
        yield f"mixed with dictionaries, compensate, {keep}", more, {}
        yield f"mixed, compensate, {keep}", mixed | {"compensate": {}}, {}
        yield f"mixed, {keep}", mixed, {}
        sums = mixed | {"components": ["pivoted_low_rank", "sparse", "pivoted_low_rank+sparse"]}
        yield f"mixed with sums, compensate, {keep}", sums | {"compensate": {}}, {}
        yield f"mixed with sums, {keep}", sums, {}
        sparse = {"method": "sparse", "keep": keep}
        yield f"sparse, compensate, {keep}", sparse | {"compensate": {}}, {}
        for method in ("sparse", "dictionary", "compot", "rocket"):
            for allocation in ("lagrangian", "uniform"):
                stage = {"method": method, "keep": keep, "allocation": allocation}
                yield f"{method}, {allocation}, {keep}", stage, {}
        eights = sparse | {"pattern": "n:8"}
        yield f"sparse, n:8, compensate, {keep}", eights | {"compensate": {}}, {}
        for allocation in ("lagrangian", "uniform"):
            yield f"sparse, n:8, {allocation}, {keep}", eights | {"allocation": allocation}, {}
        either = mixed | {"components": ["pivoted_low_rank", "semi_structured"]}
        yield f"mixed with n:8, compensate, {keep}", either | {"compensate": {}}, {}
        for method in ("wanda", "magnitude"):
            yield f"{method}, uniform, {keep}", {"method": method, "keep": keep}, {}
    for method in ("sparse", "wanda", "magnitude"):
        stage = {"method": method, "keep": 0.563, "pattern": "2:4", "allocation": "uniform"}
        yield f"{method}, 2:4, 0.563", stage, {}
        if method == "sparse":
            yield "sparse, 2:4, compensate, 0.563", stage | {"compensate": {}}, {}
            for pattern in ("n:8", "unstructured"):  # the same bits
                other = stage | {"pattern": pattern}
                yield f"sparse, {pattern}, 0.563", other, {}
                yield f"sparse, {pattern}, compensate, 0.563", other | {"compensate": {}}, {}


def every_row() -> Iterator[tuple[str, Stages, dict[str, Any]]]:
    """Yield name, stages and changes of the calibration."""
    for name, options, changes in rows():
        yield name, [{"decompose": options}], changes
    for name, options, changes in slices():
        yield name, [options if "slice" in options else {"decompose": options}], changes
    for name, stages in [*integers(), *healed()]:
        yield name, stages, {}
    for name, options in timed():
        yield name, [{"decompose": options}], {}


def healed() -> Iterator[tuple[str, Stages]]:
    """Yield rows that are trained after compression, next to those that are not."""

    def low_rank(keep: float) -> dict[str, Any]:
        return {"decompose": {"method": "kfac", "keep": keep, "compensate": {}}}

    def joint(keep: float) -> dict[str, Any]:
        schemes = ["int8", "int6-g64", "int5-g64", "int4-g64", "int3-g64", "int3-g32"]
        return {"decompose": mixed(keep)["decompose"] | {"schemes": schemes}}

    def mixed(keep: float) -> dict[str, Any]:
        return {"decompose": {"method": "mixed", "keep": keep, "compensate": {}}}

    def integer(method: str, bits: int, group: int, **options: Any) -> dict[str, Any]:
        return {"quantize": {"method": method, "bits": bits, "group_size": group, **options}}

    distill: dict[str, Any] = {"method": "distill", "tokens": 1_200_000}
    scales = distill | {"method": "scales"}
    for name, stage, heal in (
        ("mixed 0.5", mixed(0.5), distill),
        ("mixed 0.6", mixed(0.6), distill),
        ("joint 0.203", joint(0.203125), scales),
        ("int3-g64", integer("gptq", 3, 64, compensate={}), scales),
        ("kfac 0.8", low_rank(0.8), distill),
        ("kfac 0.6", low_rank(0.6), distill),
        ("modegpt 0.7", {"slice": {"method": "modegpt", "keep": 0.7}}, distill),
        ("dictionary 0.6", {"decompose": {"method": "dictionary", "keep": 0.6}}, distill),
        ("gqsa W4S50", integer("gqsa", 4, 16, sparsity=0.5, compensate={}), scales),
        ("int2-g32", integer("gptq", 2, 32, compensate={}), scales),
    ):
        yield f"before healing: {name}", [stage]
        yield f"healed: {name}", [stage, {"heal": heal}]
        long = heal | {"tokens": 20_000_000}
        yield f"healed with 20 million tokens: {name}", [stage, {"heal": long}]


def timed() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows whose products take the same time, by latency.json, which `lrc latency` writes."""
    time = {"measure": "latency", "latency_table": "latency.json", "compensate": {}}
    forms = ["pivoted_low_rank", "sparse", "semi_structured"]
    for keep in (0.77, 0.6):
        for name, options in {
            "mixed": {"method": "mixed", "components": forms},
            "pivoted low rank": {"method": "kfac", "storage": "pivoted_low_rank"},
            "low rank": {"method": "kfac", "storage": "low_rank"},
            "unstructured": {"method": "sparse"},
            "n:8": {"method": "sparse", "pattern": "n:8"},
        }.items():
            yield f"time {keep}: {name}", {**options, "keep": keep, **time}


def integers() -> Iterator[tuple[str, Stages]]:
    """Yield the rows of integers: alone, behind low rank and sparsity, and planned jointly."""

    def quantize(method: str, bits: int, group: int | None, **options: Any) -> dict[str, Any]:
        return {"quantize": {"method": method, "bits": bits, "group_size": group, **options}}

    def decompose(method: str, keep: float, **options: Any) -> dict[str, Any]:
        return {"decompose": {"method": method, "keep": keep, "compensate": {}, **options}}

    every = ["int8", "int7-g64", "int6-g64", "int5-g64", "int4-g64", "int4-g32", "int3-g64"]
    every += ["int3-g32", "int2-g32"]
    for keep in (0.5, 0.35, 0.25, 0.203125, 0.2):  # the fourth is what int3-g64 takes
        for name, forms in {"any form": ["pivoted_low_rank", "sparse"], "dense": ["dense"]}.items():
            joint = decompose("mixed", keep, components=forms, schemes=every)
            yield f"integers: joint, {name}, {keep}", [joint]
    for method in ("rtn", "gptq"):
        for bits, group in ((8, None), (4, 64), (4, 32), (4, None), (3, 64), (3, 32), (3, None)):
            scheme = f"int{bits}{f'-g{group}' if group else ''}"
            yield f"integers: {method}, {scheme}", [quantize(method, bits, group)]
            if method == "gptq":
                compensated = quantize(method, bits, group, compensate={})
                yield f"integers: {method}, {scheme}, compensate", [compensated]
    for mix, residual in ((0.3, 0), (0.5, 0.5), (0.3, 1), (0.5, 1)):
        changed = {"compensate": {"mix": mix, "residual": residual}}
        name = f"integers: gptq, int3-g64, compensate {mix}, residual {residual}"
        yield name, [quantize("gptq", 3, 64, **changed)]
    for kind in ("qera", "eora", "lqer"):
        branch = quantize("gptq", 3, 64, low_rank_correction={"method": kind, "rank": 32})
        yield f"integers: gptq, int3-g64, {kind} 32", [branch]
    for rows in ("int8", "int6-g64", "int5-g64", "int4-g64", "int4-g32"):
        rounded = quantize("gptq", 4, 64, compensate={}, embeddings=rows)
        yield f"integers: gptq, int4-g64, compensate, embeddings {rows}", [rounded]
    for size, rows in (("93MiB", "int8"), ("80MiB", "int6-g64"), ("64MiB", "int5-g64")):
        joint = {"method": "mixed", "compensate": {}, "schemes": every, "size": size}
        joint |= {"embeddings": rows, "components": ["pivoted_low_rank", "sparse"]}
        yield f"integers: joint, {size}, embeddings {rows}", [{"decompose": joint}]
    yield "integers: kfac 0.8", [decompose("kfac", 0.8)]
    for method in ("rtn", "gptq"):
        stages = [decompose("kfac", 0.8), quantize(method, 8, None)]
        yield f"integers: kfac 0.8, {method}, int8", stages
    for group in (64, 32):
        stages = [decompose("kfac", 0.8), quantize("gptq", 4, group)]
        yield f"integers: kfac 0.8, int4-g{group}, pivot", stages
        for gauge in ("even", "first", "quarter", "rotated", "measured"):
            factors = decompose("kfac", 0.8, storage="low_rank")
            stages = [factors, quantize("gptq", 4, group, balance=gauge)]
            yield f"integers: kfac 0.8, int4-g{group}, factors, {gauge}", stages
        factors = decompose("kfac", 0.8, storage="low_rank", rank_multiple=group)
        yield f"integers: kfac 0.8, factors of ranks of {group}", [factors]
    # Shares before rounding that give 0.5, 0.35, 0.25 and 0.2 of the bits after it.
    for method, shares in {
        "kfac": (0.98, 0.69, 0.49, 0.39),
        "sparse": (0.93, 0.63, 0.43, 0.33),
    }.items():
        for keep, share in zip((0.5, 0.35, 0.25, 0.2), shares, strict=True):
            stages = [decompose(method, share), quantize("gptq", 8, None)]
            yield f"integers: {method} and int8, {keep}", stages


def slices() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield the rows that compare at the bytes of the whole model, as `rows` does."""
    for keep in (0.8, 0.7):
        for name, stage in {
            "modegpt": {"method": "modegpt"},
            "modegpt, by layer": {"method": "modegpt", "uniform": False},
            "slicegpt": {"method": "slicegpt", "width_multiple": 1},
            "slicegpt, by block": {"method": "slicegpt", "width_multiple": 1, "rotations": "block"},
            "drop": {"method": "drop"},
            "drop, by perplexity": {"method": "drop", "criterion": "perplexity"},
        }.items():
            # A trial a layer and a layer that goes: on fewer windows.
            changes = {"samples": 16} if "criterion" in stage else {}
            yield f"{name}, whole model {keep}", {"slice": stage | {"keep": keep}}, changes
        size = f"{int(keep * DENSE_BYTES)}B"
        for name, stage in {
            "svd-llm": {"method": "svd-llm"},
            "kfac": {"method": "kfac"},
            "kfac, compensate": {"method": "kfac", "compensate": {}},
            "mixed, compensate": {"method": "mixed", "compensate": {}},
        }.items():
            yield f"{name}, whole model {keep}", stage | {"size": size}, {}


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
        dense=lambda: None,
        on_step=lambda *_: None,
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
    report = pipeline.compress(loaded)
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
