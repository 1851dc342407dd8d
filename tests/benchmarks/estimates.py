"""Compare the estimates of six recipes with what their runs use.

usage: python tests/benchmarks/estimates.py MODEL FOLDER [--device cpu] [--layers N]
       [KEY=VALUE ...] [--rows NAME ...]

Every recipe runs in a new process, and what is finished in FOLDER is not run again. Prints a table
in Markdown: estimated and actual peaks of host memory, GPU memory and disk, and seconds of all
stages. On a CPU that other processes use too, the processor time of the run divided by its threads
is the better measure; it is the last column. Each row is printed when its recipe has finished;
seconds by stage follow after the table. A recipe that fails has an empty row and the exit status is
1 at the end.

MODEL is a folder with safetensors and a tokenizer. `--layers` keeps only the first decoder layers
of a model whose config.json has `num_hidden_layers` and whose layers are named `model.layers.N`.
KEY=VALUE change the recipes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from lrc.configs.size import GIB, MIB

ROWS: dict[str, list[dict[str, Any]]] = {
    "kfac": [{"decompose": {"method": "kfac", "keep": 0.8}}],
    "mixed": [
        {
            "decompose": {
                "method": "mixed",
                "keep": 0.8,
                "components": ["pivoted_low_rank", "sparse"],
            }
        }
    ],
    "gptq": [{"quantize": {"method": "gptq", "bits": 4, "group_size": 64}}],
    "slicegpt": [{"slice": {"method": "slicegpt", "keep": 0.85}}],
    "drop": [{"slice": {"method": "drop", "keep": 0.85}}],
    "svd-llm, compensated": [
        {
            "decompose": {
                "method": "svd-llm",
                "keep": 0.8,
                "compensate": {"mix": 0.3, "residual": 0.5},
            }
        }
    ],
}
RECIPE: dict[str, Any] = {
    "calibration": {"source": "python-docs", "samples": 8, "length": 512},
    "evaluate": {
        "perplexity": [{"source": "python-docs", "window": 512, "windows": 2}],
        "baselines": ["int8"],
    },
}
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def cut_model(model: Path, layers: int, folder: Path) -> Path:
    """Copy a model with its first layers only."""
    if folder.exists():
        return folder
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
    shutil.copytree(model, partial, ignore=ignored)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    (partial / "config.json").write_text(json.dumps(config))
    kept = {}
    for file in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            found = LAYER.match(name)
            if found is None or int(found[1]) < layers:
                kept[name] = tensor
    save_file(kept, partial / "model.safetensors", metadata={"format": "pt"})
    return partial.rename(folder)


def run(name: str, model: Path, folder: Path, device: str, overrides: list[str]) -> dict[str, Any]:
    """Return the report of a recipe, from an earlier call or a new run."""
    output = folder / name.replace(", ", "-")
    report = output / "report.json"
    if not report.is_file():
        recipe = {"model": str(model), **RECIPE, "stages": ROWS[name], "output": str(output)}
        path = folder / f"{output.name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        command = ["compress", str(path), *overrides, "--device", device, "--quiet", "--json"]
        subprocess.run(
            [sys.executable, "-m", "lrc", *command], check=True, stdout=subprocess.DEVNULL
        )
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def row(name: str, report: dict[str, Any]) -> str:
    """Return the line of a recipe: estimated / actual."""
    peak, memory, expected = report["estimate"]["peak"], report["memory"], report["estimate"]
    timing, threads = report["timing"], report["environment"]["threads"]
    cells = [
        f"{peak['host_bytes'] / GIB:.2f} / {memory['peak_rss_bytes'] / GIB:.2f}",
        "-"
        if peak["gpu_bytes"] is None
        else f"{peak['gpu_bytes'] / GIB:.2f} / {memory['peak_gpu_bytes'] / GIB:.2f}",
        f"{peak['disk_bytes'] / MIB:.0f} / {memory['peak_disk_bytes'] / MIB:.0f}",
        f"{sum(expected['seconds'].values()):.0f} / {sum(timing['seconds'].values()):.0f}",
        f"{sum(timing['cpu_seconds'].values()) / threads:.0f}",
    ]
    return f"| {name} | {' | '.join(cells)} |"


def stages(report: dict[str, Any]) -> str:
    """Return estimated and actual seconds by stage."""
    guessed, timing = report["estimate"]["seconds"], report["timing"]
    names = dict.fromkeys([*guessed, *timing["seconds"]])
    parts = [
        f"{name} {guessed.get(name, 0):.1f} / {timing['seconds'].get(name, 0):.1f} "
        f"({timing['cpu_seconds'].get(name, 0):.1f})"
        for name in names
    ]
    return ", ".join(parts)


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=[*ROWS])
    options, overrides = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = options.model
    if options.layers is not None:
        model = cut_model(model, options.layers, options.folder / f"model-{options.layers}")
    print("| recipe | host, GiB | GPU, GiB | disk, MiB | seconds | processor seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    reports = {}
    for name in options.rows:
        try:
            report = run(name, model, options.folder, options.device, overrides)
        except subprocess.CalledProcessError as error:
            print(f"{name}: exit status {error.returncode}", file=sys.stderr)
            print(f"| {name} | | | | | |", flush=True)
        else:
            reports[name] = report
            print(row(name, report), flush=True)
    print("\nSeconds by stage: estimated / wall (processor)")
    for name, report in reports.items():
        print(f"{name}: {stages(report)}")
    print(f"\nload average {os.getloadavg()}", flush=True)
    if len(reports) < len(options.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
