"""Compare each budget of an elastic checkpoint with a run for this budget alone.

usage: python tests/benchmarks/elastic.py RECIPE FOLDER [KEY=VALUE ...]
           [--budgets 0.9 0.8 ...] [--cuts 0.9 ...] [--dedicated [0.9 ...]] [--method NAME]
           [--storage TYPE] [--heal TOKENS]

RECIPE gives model, calibration text and evaluation, as tests/benchmarks/protocol_a.yaml does; its
stages are replaced. Each run is written into a folder of FOLDER and is not repeated if it is there,
nor are its cuts measured again; a call that was interrupted continues with the same command. The
cuts come first. Sizes are those of the weight files.
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
from lrc.compressors.io.files import write_text
from lrc.compressors.io.machine import release_memory
from lrc.configs.load import LoadedRecipe, load_recipe
from lrc.configs.recipe import Evaluate, Recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    options = arguments()
    loaded = load_recipe(options.recipe, options.overrides)
    budgets = sorted(options.budgets, reverse=True)
    elastic = run(loaded, options, {"elastic": budgets}, "elastic")
    names = [spec.name for spec in loaded.recipe.evaluate.perplexity]
    dense = report_of(elastic)["evaluation"]["perplexity"]
    print("dense: " + ", ".join(f"{name} {dense[name]['dense']:.3f}" for name in names))
    for record in report_of(elastic)["training"]:
        print(json.dumps(record["budgets"]), flush=True)
    scores = {}
    cuts = budgets if options.cuts is None else sorted(options.cuts, reverse=True)
    for keep in cuts:
        found = scores[keep] = cut(loaded.recipe, elastic, keep)
        values = ", ".join(f"{name} {found[name]['perplexity']:.3f}" for name in names)
        print(f"cut to {keep:g}: {values}", flush=True)
    print("\n| keep | file, MiB | text | dedicated | cut | ratio |\n|---|---|---|---|---|---|")
    for keep in cuts if options.dedicated is None else sorted(options.dedicated, reverse=True):
        dedicated = run(loaded, options, {"keep": keep}, f"keep-{keep:g}", dense=False)
        for name in names:
            alone = report_of(dedicated)["evaluation"]["perplexity"][name]["compressed"]
            found = scores[keep][name]["perplexity"]
            print(
                f"| {keep:g} | {file_bytes(dedicated) / 2**20:.1f} | {name} | {alone:.3f} | "
                f"{found:.3f} | {found / alone:.4f} |",
                flush=True,
            )
    print(f"elastic file: {file_bytes(elastic) / 2**20:.1f} MiB")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--cuts", type=float, nargs="+", help="budgets to measure; all by default")
    parser.add_argument(
        "--dedicated", type=float, nargs="*", help="budgets with a run for this one alone, or none"
    )
    parser.add_argument("--method", default="kfac")
    parser.add_argument("--storage", default="pivoted_low_rank")
    parser.add_argument("--heal", type=int, default=0, metavar="TOKENS")
    options = parser.parse_intermixed_args()
    for name, wanted in {"--cuts": options.cuts, "--dedicated": options.dedicated}.items():
        allowed = options.budgets if name == "--cuts" else options.cuts or options.budgets
        if unknown := set(wanted or ()) - set(allowed):
            parser.error(f"{name}: must be among {sorted(allowed)}, got {sorted(unknown)}")
    return options


def run(
    loaded: LoadedRecipe,
    options: argparse.Namespace,
    budget: dict[str, Any],
    name: str,
    *,
    dense: bool = True,
) -> Path:
    """Compress with one budget or several, unless that is done; return the folder of the run."""
    stage: dict[str, Any] = {"method": options.method, "storage": options.storage, **budget}
    stages: list[dict[str, Any]] = [{"decompose": stage}]
    if options.heal:
        stages.append({"heal": {"method": "distill", "tokens": options.heal}})
        name = f"{name}-heal-{options.heal}"
    output = options.folder / f"{options.method}-{options.storage}-{name}"
    if not (output / "report.json").exists():
        changed = loaded.recipe.model_dump(mode="json") | {"stages": stages, "output": str(output)}
        changed["evaluate"]["dense"] = dense
        pipeline.compress(replace(loaded, recipe=Recipe.model_validate(changed)))
        release_memory()
    return output


def cut(recipe: Recipe, run: Path, keep: float) -> dict[str, Any]:
    """Return the perplexities of a budget of an elastic checkpoint, measured once."""
    result = run / f"cut-{keep:g}.json"
    if not result.exists():
        folder = run / f"cut-{keep:g}"
        shutil.rmtree(folder, ignore_errors=True)
        export_budget(run / "checkpoint", folder, keep)
        # As in a run.
        dtype = torch.float32 if DEVICE == "cpu" else getattr(torch, recipe.model.dtype)
        model = load_checkpoint(folder, dtype=dtype, device=DEVICE)
        texts = Evaluate(perplexity=recipe.evaluate.perplexity)
        scores = evaluate_model(model, load_tokenizer(folder), texts, seed=recipe.seed)
        write_text(result, json.dumps(scores["perplexity"]))
        shutil.rmtree(folder)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def report_of(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return report


def file_bytes(run: Path) -> int:
    return sum(file.stat().st_size for file in (run / "checkpoint").glob("*.safetensors"))


if __name__ == "__main__":
    main()
