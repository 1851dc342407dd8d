"""Compare each budget of an elastic checkpoint with a run for this budget alone.

usage: python tests/benchmarks/elastic.py RECIPE FOLDER [KEY=VALUE ...]
           [--budgets 0.9 0.8 ...] [--method NAME] [--storage TYPE] [--compensate]
           [--heal TOKENS]

RECIPE gives model, calibration text and evaluation, as tests/benchmarks/protocol_a.yaml does; its
stages are replaced. Each run is written into a folder of FOLDER and is not repeated if it is there,
so a second call with other options (compensation, healing) adds runs to the same table of dense and
dedicated results. Sizes are those of the weight files.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lrc.compressors import pipeline
from lrc.compressors.checkpoint.budget_export import export_budget
from lrc.compressors.checkpoint.reader import load_checkpoint, load_tokenizer
from lrc.compressors.evaluate.scores import evaluate_model
from lrc.compressors.io.machine import release_memory
from lrc.configs.load import LoadedRecipe, load_recipe
from lrc.configs.recipe import Evaluate, Recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    options = arguments()
    loaded = load_recipe(options.recipe, options.overrides)
    budgets = sorted(options.budgets, reverse=True)
    elastic = run(loaded, options, {"elastic": budgets}, "elastic")
    rows: list[tuple[float, Path, dict[str, Any]]] = []
    for keep in budgets:
        dedicated = run(loaded, options, {"keep": keep}, f"keep-{keep:g}")
        rows.append((keep, dedicated, cut(loaded.recipe, elastic, keep)))
    names = [spec.name for spec in loaded.recipe.evaluate.perplexity]
    dense = report_of(elastic)["evaluation"]["perplexity"]
    print("dense: " + ", ".join(f"{name} {dense[name]['dense']:.3f}" for name in names))
    print("| keep | file, MiB | text | dedicated | cut | ratio |\n|---|---|---|---|---|---|")
    for keep, dedicated, scores in rows:
        for name in names:
            alone = report_of(dedicated)["evaluation"]["perplexity"][name]["compressed"]
            found = scores[name]["perplexity"]
            print(
                f"| {keep:g} | {file_bytes(dedicated) / 2**20:.1f} | {name} | {alone:.3f} | "
                f"{found:.3f} | {found / alone:.4f} |"
            )
    size = file_bytes(elastic) / file_bytes(rows[0][1])
    print(f"elastic file: {size:.3f} of the largest dedicated one")
    for record in report_of(elastic)["training"]:
        print(json.dumps(record["budgets"]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--method", default="kfac")
    parser.add_argument("--storage", default="pivoted_low_rank")
    parser.add_argument("--compensate", action="store_true")
    parser.add_argument("--heal", type=int, default=0, metavar="TOKENS")
    return parser.parse_intermixed_args()


def run(
    loaded: LoadedRecipe, options: argparse.Namespace, budget: dict[str, Any], name: str
) -> Path:
    """Compress with one budget or several, unless that is done; return the folder of the run."""
    stage: dict[str, Any] = {"method": options.method, "storage": options.storage, **budget}
    stages: list[dict[str, Any]] = [{"decompose": stage}]
    if options.compensate:
        stage["compensate"], name = {}, f"{name}-compensate"
    if options.heal:
        stages.append({"heal": {"method": "distill", "tokens": options.heal}})
        name = f"{name}-heal-{options.heal}"
    output = options.folder / f"{options.method}-{options.storage}-{name}"
    if not (output / "report.json").exists():
        changed = loaded.recipe.model_dump(mode="json") | {"stages": stages, "output": str(output)}
        pipeline.compress(replace(loaded, recipe=Recipe.model_validate(changed)))
        release_memory()
    return output


def cut(recipe: Recipe, run: Path, keep: float) -> dict[str, Any]:
    """Return the perplexities of a budget of an elastic checkpoint."""
    folder = run / f"cut-{keep:g}"
    shutil.rmtree(folder, ignore_errors=True)
    export_budget(run / "checkpoint", folder, keep)
    dtype = torch.float32 if DEVICE == "cpu" else getattr(torch, recipe.model.dtype)  # as in a run
    model, tokenizer = load_checkpoint(folder, dtype=dtype, device=DEVICE), load_tokenizer(folder)
    texts = Evaluate(perplexity=recipe.evaluate.perplexity)
    found: dict[str, Any] = evaluate_model(model, tokenizer, texts, seed=recipe.seed)["perplexity"]
    shutil.rmtree(folder)
    return found


def report_of(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


def file_bytes(run: Path) -> int:
    return sum(file.stat().st_size for file in (run / "checkpoint").glob("*.safetensors"))


if __name__ == "__main__":
    main()
