"""Compress one model in many ways and print one table: the quality section of BENCHMARKS.md.

usage: python tests/benchmarks/table.py RECIPE FOLDER [--seconds N] [--rows PATTERN] [KEY=VALUE ...]

RECIPE gives model, calibration text and evaluation, as tests/benchmarks/protocol_a.yaml does; the
rows below replace its stage. Rows that want the same calibration share its statistics. A row that
is finished in FOLDER is not run again, so that the table can be made in pieces of N seconds.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from lrc.compressors import pipeline
from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.windows import FILE as WINDOWS
from lrc.compressors.calibrate.windows import take_windows
from lrc.compressors.evaluate import evaluate_model
from lrc.compressors.journal import Journal, open_journal
from lrc.compressors.models.source import load_dense
from lrc.compressors.models.weights import WeightReader
from lrc.compressors.prepare import prepare
from lrc.compressors.run import identity
from lrc.configs.load import LoadedRecipe, load_recipe

METHODS = ["svd", "asvd", "fwsvd", "lord", "svd-llm", "basis-sharing", "kfac"]
EVERYTHING = frozenset(
    {"inputs", "whole_inputs", "gradients", "input_mean", "input_magnitude", "row_fisher"}
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield name, stage and changes of the calibration; what matters most comes first."""
    for keep in (0.8, 0.6):
        best = {"method": "kfac", "keep": keep, "storage": "pivot", "allocation": "lagrangian"}
        yield f"kfac, lagrangian, pivot, {keep}", best, {}
        for mix in (0.2, 0.3, 0.4, 0.5):
            name = f"kfac, lagrangian, pivot, compensate {mix}, {keep}"
            yield name, best | {"compensate": {"mix": mix}}, {}
        yield f"kfac, real labels, lagrangian, pivot, {keep}", best, {"labels": "real"}
        for method in METHODS:
            for allocation in ("uniform", "lagrangian"):
                stage = {"method": method, "keep": keep, "allocation": allocation}
                stage["storage"] = "factors"
                changes = {"labels": "real"} if method == "fwsvd" else {}
                yield f"{method}, {allocation}, factors, {keep}", stage, changes
        yield f"kfac, uniform, pivot, {keep}", best | {"allocation": "uniform"}, {}
        pivot = {"method": "svd-llm", "keep": keep, "storage": "pivot", "allocation": "uniform"}
        yield f"svd-llm, uniform, pivot, {keep}", pivot, {}
        welore = {"method": "svd", "keep": keep, "allocation": "heavy-tail"}
        yield f"svd, heavy-tail, factors, {keep}", welore, {}
    plain = {"method": "kfac", "keep": 0.8}
    for damp in (1e-4, 1e-2, 1.0):
        yield f"kfac, gradient damp {damp:g}, 0.8", plain | {"gradient_damp": damp}, {}
    for share in (0.3, 0.5):
        yield f"kfac, min_keep {share}, 0.8", plain | {"min_keep": share}, {}
    yield "kfac, max_loss 0.02, 0.8", plain | {"max_loss": 0.02}, {}
    yield "kfac, rank multiples of 8, 0.8", plain | {"rank_multiple": 8}, {}
    yield "kfac, factors, 0.8", plain | {"storage": "factors"}, {}
    yield "kfac, sampled labels, 0.8", plain, {"labels": "sampled"}
    for method, keep in (("svd-llm", 0.8), ("kfac", 0.8), ("svd-llm", 0.6), ("kfac", 0.6)):
        stage = {"method": method, "keep": keep}
        if method == "kfac":
            stage["compensate"] = {"mix": 0.3}
        other = {"source": "data/wikitext2/validation.jsonl"}
        yield f"{method} on WikiText-2, {keep}", stage, other


def main() -> None:
    """Run what is not finished, then print the table of all that is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--rows", default="*")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    start = time.monotonic()
    if not (asked.folder / "dense.json").is_file():
        _dense(load_recipe(asked.recipe, asked.overrides), asked.folder)
    for name, stage, calibration in rows():
        if not fnmatchcase(name, asked.rows) or (asked.folder / f"{name}.json").is_file():
            continue
        if time.monotonic() - start > asked.seconds:
            print("time is up; the same command goes on", file=sys.stderr)
            break
        changes = [f"calibration.{key}={value}" for key, value in calibration.items()]
        changes += [f"stages={json.dumps([{'decompose': stage}])}", "evaluate.dense=false"]
        output = asked.folder / "run"
        shutil.rmtree(output, ignore_errors=True)
        recipe = load_recipe(asked.recipe, [*asked.overrides, *changes, f"output={output}"])
        _run(name, recipe, asked.folder)
    _print(asked.folder)


def _dense(recipe: LoadedRecipe, folder: Path) -> None:
    """Evaluate the model as it is."""
    prepared = prepare(recipe.recipe)
    source = prepared.source
    model = load_dense(source, source.folder, dtype=source.dtype, device=DEVICE)
    block = evaluate_model(
        model, prepared.tokenizer, recipe.recipe.evaluate, seed=0, on_step=lambda *_: None
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dense.json").write_text(json.dumps(block))


def _run(name: str, loaded: LoadedRecipe, folder: Path) -> None:
    """Compress and evaluate one row."""
    prepared = prepare(loaded.recipe)
    calibration = loaded.recipe.calibration
    key = f"{Path(calibration.source).parent.name}-{calibration.labels}"
    shared = Journal(folder / "calibration" / key)
    started = time.monotonic()
    if not shared.has("statistics"):
        shared.work.mkdir(parents=True)
        architecture = prepared.architecture
        reader = WeightReader(prepared.source.folder, architecture)
        windows = take_windows(
            calibration,
            prepared.tokenizer,
            shared,
            seed=loaded.recipe.seed,
            embedding=architecture.model.get_input_embeddings(),
            dense=lambda: None,
            on_step=lambda *_: None,
        )
        statistics.collect(
            architecture,
            reader,
            windows,
            {linear.name: EVERYTHING for linear in architecture.linears},
            shared,
            labels=calibration.labels,
            seed=loaded.recipe.seed,
            device=DEVICE,
            memory_limit_gib=32,
            on_step=lambda *_: None,
        )
        print(f"statistics {key}: {time.monotonic() - started:.1f} s", flush=True)
    output = Path(loaded.recipe.output)
    with open_journal(output, identity(prepared)) as journal:
        shutil.copytree(
            shared.path("statistics"), journal.path("statistics"), copy_function=os.link
        )
        os.link(shared.path(WINDOWS), journal.path(WINDOWS))
    started = time.monotonic()
    report = pipeline.compress(loaded)
    seconds = report["timing"]["seconds"]
    row = {
        "kept": report["size"]["targeted"]["kept"],
        "seconds": {k: seconds.get(k, 0) for k in ("allocate", "decompose", "save", "evaluate")},
        "dense": sum(layer["form"] == "dense" for layer in report["layers"]),
        "evaluation": report["evaluation"],
    }
    (folder / f"{name}.json").write_text(json.dumps(row))
    p = {k: round(v["compressed"], 2) for k, v in report["evaluation"]["perplexity"].items()}
    print(f"{name}: {p} {time.monotonic() - started:.1f} s", flush=True)


def _print(folder: Path) -> None:
    dense = json.loads((folder / "dense.json").read_text())
    texts = list(dense["perplexity"])
    accuracies = [(t, "acc,none" if "acc,none" in m else "acc") for t, m in dense["tasks"].items()]
    print("| row | kept | " + " | ".join([*texts, *(t for t, _ in accuracies)]) + " | s |")
    print("|---" * (3 + len(texts) + len(accuracies)) + "|")
    cells = [f"{dense['perplexity'][t]['perplexity']:.2f}" for t in texts]
    cells += [f"{dense['tasks'][t][m]['value']:.3f}" for t, m in accuracies]
    print("| dense | 1.000 | " + " | ".join(cells) + " | |")
    for name, _, _ in rows():
        if not (folder / f"{name}.json").is_file():
            continue
        row = json.loads((folder / f"{name}.json").read_text())
        measured = row["evaluation"]
        cells = [_number(measured["perplexity"][t]["compressed"]) for t in texts]
        cells += [f"{measured['tasks'][t][m]['compressed']:.3f}" for t, m in accuracies]
        seconds = row["seconds"]["allocate"] + row["seconds"]["decompose"]
        print(f"| {name} | {row['kept']:.4f} | " + " | ".join(cells) + f" | {seconds:.0f} |")


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e3 else f"{value:.1e}"


if __name__ == "__main__":
    main()
