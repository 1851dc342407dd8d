"""Train one compressed model with different options of `heal`, and measure each result.

usage: python tests/benchmarks/heal_variants.py RECIPE FOLDER NAME [VARIANT ...]
           [--tasks] [--set KEY=VALUE ...]

RECIPE gives model, calibration text and evaluation, as tests/benchmarks/protocol_a.yaml does; its
stages are replaced. NAME is a model of the table of `table_rows.healed`, such as "kfac 0.6", which
is compressed once in FOLDER. VARIANT has options of the stage that replace those of the row
"healed: NAME", such as "extend=true cross_entropy=0.3"; "" is this row, and "steps=0" only measures
the model before training. Each variant is a run of its own, which is printed as soon as it is
measured, and left out if FOLDER has it. Text that the model writes is sampled once for all variants
with the same number of tokens, which are rounded up to whole steps of every batch up to 8.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from table_rows import Stages, healed

from lrc.compressors import pipeline
from lrc.compressors.heal.trained_files import text_folder
from lrc.compressors.io.journal import IDENTITY, LOCK, Journal, open_journal
from lrc.compressors.io.machine import Machine, release_memory
from lrc.compressors.prepare import prepare
from lrc.compressors.run_identity import identity
from lrc.compressors.stages import STAGES
from lrc.compressors.stages.compress_weights import ALLOCATED, EXECUTED
from lrc.configs.errors import LrcError, Stopped
from lrc.configs.load import LoadedRecipe, load_recipe

BATCH = 8
HEALED = "healed: "
HEADER = "| options | divergence | cross entropy | {texts} | tasks | s | tokens/s | GiB |"


def main() -> None:
    """Compress, then train and measure the variants; an error of the recipe ends the program."""
    try:
        measure(arguments())
    except LrcError as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None


def measure(options: argparse.Namespace) -> None:
    """Print a row for every variant."""
    base = options.folder / options.name.replace(" ", "-")
    results = base / f"results{'-tasks' if options.tasks else ''}.jsonl"
    lines = results.read_text().splitlines() if results.is_file() else []
    done = {facts["variant"]: facts for facts in map(json.loads, lines)}
    compressed = compress(options, base / "compressed")
    texts = [spec.name for spec in load(options, [], base).recipe.evaluate.perplexity]
    print(HEADER.format(texts=" | ".join(texts)), flush=True)
    print("|---" * (7 + len(texts)) + "|", flush=True)
    for variant in options.variants:
        if variant not in done:
            try:
                done[variant] = run(options, base, compressed, variant)
            except (LrcError, RuntimeError) as error:  # the other variants go on
                print(f"{variant}: {type(error).__name__}: {str(error)[:1000]}", flush=True)
                continue
            with results.open("a") as file:
                file.write(json.dumps(done[variant]) + "\n")
        print(row(done[variant]), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("variants", nargs="*", default=["steps=0", ""])
    parser.add_argument("--tasks", action="store_true", help="run the tasks of the recipe, too")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE")
    asked = parser.parse_args()
    rows = (row for row, _ in healed() if row.startswith(HEALED))
    names = [row.removeprefix(HEALED) for row in rows]
    if asked.name not in names:
        parser.error(f"NAME: must be one of {', '.join(names)}, got {asked.name}")
    return asked


def load(options: argparse.Namespace, stages: Stages, output: Path) -> LoadedRecipe:
    """Return the recipe with other stages."""
    changes = ["evaluate.dense=false", "evaluate.baselines=[]", f"output={output}"]
    if stages:
        changes.append(f"stages={json.dumps(stages)}")
    if not options.tasks:
        changes.append("evaluate.tasks={}")
    return load_recipe(options.recipe, [*options.overrides, *changes])


def stages_of(options: argparse.Namespace, variant: str) -> Stages:
    """Return the stages of a variant."""
    stage, heal = dict(healed())[HEALED + options.name]
    pairs = (each.partition("=")[::2] for each in variant.split())
    changed: dict[str, Any] = heal["heal"] | {key: yaml.safe_load(value) for key, value in pairs}
    if "steps" in changed or "minutes" in changed:
        changed.pop("tokens")
    else:
        length = changed.get("length") or load(options, [], Path("run")).recipe.calibration.length
        whole = BATCH * length
        changed["tokens"] = -(-changed["tokens"] // whole) * whole
    return [stage, {"heal": changed}]


def compress(options: argparse.Namespace, output: Path) -> Journal:
    """Run the first stage, unless that is done; return the journal with its results."""
    journal = Journal(output)
    if not (output / "seconds").is_file():
        started = time.monotonic()

        def stop(stage: str, *_: object) -> None:
            if stage == "heal":
                raise Stopped("compressed")

        with suppress(Stopped):
            pipeline.compress(
                load(options, stages_of(options, "steps=1 held_out=1"), output),
                Machine(on_step=stop),
            )
        release_memory()
        (output / "seconds").write_text(f"{time.monotonic() - started:.0f}")
    print(f"{options.name}: compressed in {(output / 'seconds').read_text()} s", flush=True)
    return journal


def run(
    options: argparse.Namespace, base: Path, compressed: Journal, variant: str
) -> dict[str, Any]:
    """Train and measure; return the record of the stage and the scores."""
    stages = stages_of(options, variant)
    output = base / "run"
    shutil.rmtree(output, ignore_errors=True)
    loaded = load(options, stages, output)
    heal: dict[str, Any] = stages[1]["heal"]
    keys = ("tokens", "steps", "minutes", "length", "source", "extend", "held_out")
    name = "-".join(f"{key}={heal[key]}" for key in keys if key in heal)
    text = base.parent / "texts" / "".join(c if c.isalnum() else "-" for c in name)
    prepared = prepare(loaded.recipe, STAGES)
    training = prepared.plan.to_json()["training"]
    with open_journal(output, identity(prepared)) as journal:
        for each in compressed.work.iterdir():
            if each.name in (ALLOCATED, EXECUTED):  # the plan, of which only the training differs
                plan = compressed.read_json(each.name) | {"training": training}
                journal.write_json(each.name, plan)
            elif each.name not in (IDENTITY, LOCK) and not each.name.startswith("heal"):
                link(each, journal.work / each.name)
        if text.is_dir():
            link(text, journal.path(text_folder(1)))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    report = pipeline.compress(loaded, Machine(on_step=keep_text(journal, text)))
    release_memory()
    evaluation = report["evaluation"]
    tasks = (evaluation["tasks"] or {}).values()
    accuracies = [task.get("acc,none") or task["acc"] for task in tasks]
    shutil.rmtree(output)
    return {
        "variant": variant,
        "training": report["training"][0],
        "perplexity": {n: each["compressed"] for n, each in evaluation["perplexity"].items()},
        "tasks": [each["compressed"] for each in accuracies],
    }


def keep_text(journal: Journal, text: Path) -> Callable[..., None]:
    """Return a progress callback that keeps the text of the stage for other variants."""

    def keep(stage: str, *_: object) -> None:
        if stage == "heal" and not text.exists():
            partial_copy = text.with_name(f"{text.name}.{os.getpid()}")
            link(journal.path(text_folder(1)), partial_copy)
            with suppress(OSError):  # another program was faster
                partial_copy.rename(text)

    return keep


def link(source: Path, target: Path) -> None:
    """Copy a file or a folder as hard links: finished pieces are never changed."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=os.link)
    else:
        os.link(source, target)


def row(facts: dict[str, Any]) -> str:
    """Return the line of a variant."""
    training = facts["training"]
    speed, entropy = training["tokens_per_second"], training.get("cross_entropy")
    cells = [
        f"`{facts['variant']}`" if facts["variant"] else "row of the table",
        f"{training['before']:.3f} -> {training['after']:.3f}",
        f"{entropy['before']:.3f} -> {entropy['after']:.3f}" if entropy else "",
        *(f"{each:.2f}" for each in facts["perplexity"].values()),
        f"{fmean(facts['tasks']):.3f}" if facts["tasks"] else "",
        f"{training['seconds']:.0f}",
        f"{speed:,.0f}" if speed else "",
        f"{training['peak_bytes'] / 2**30:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
