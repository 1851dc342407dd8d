"""A dense model alone against the same model with compressed drafters, in CUDA graphs.

usage: python -m tests.benchmarks.drafting compress|measure MODEL FOLDER --text FILE [--text FILE]
           [--calibration FILE] [--only drop int ...] [--heal TOKENS] [--device cuda] ...

compress  makes three sizes of every family of drafters in FOLDER, unless they are there
measure   acceptance, speed and exactness of every pair, with the number of drafts that is expected
          to be best, and v, the time of a step of the parent that reads all drafts over that of one
          that reads a single token, which follows from the measured speed; then what the
          acceptance means for a model in the shapes of Llama-3-8B

MODEL is a folder of safetensors. Texts are files of rows {"text": ...} or plain text; the first one
serves as calibration text if none is given. Results are also written to FOLDER/drafting.json.
"""

import argparse
import json
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from lrc.compressors.benchmark.decoders import GraphDecoder, StaticDecoder
from lrc.compressors.benchmark.drafting import DraftingBenchmark, DraftSettings
from lrc.compressors.benchmark.timing import Timer
from lrc.compressors.checkpoint.reader import load_checkpoint, load_tokenizer
from lrc.compressors.corpus.windows import evaluation_windows
from lrc.compressors.export.drafter_folder import write_drafter
from lrc.compressors.io.files import new_folder
from lrc.compressors.io.machine import Machine, no_progress, release_memory
from lrc.compressors.layers.shared_ends import share_embeddings
from lrc.compressors.planning.draft_speed import best_drafts, expected_speed
from lrc.compressors.sweep.run_sweep import Sweep
from lrc.configs.axes import combinations, read_axes
from lrc.configs.recipe import Perplexity

SCHEMES = ["int8", "int6-g64", "int5-g64", "int4-g64", "int3-g64", "int3-g32", "int2-g32"]
FIRST_DRAFTS = 4
"""Number of drafts of a round in the measurement from which the best number is computed."""


@dataclass(frozen=True)
class Family:
    """Drafters of one kind in three sizes."""

    stage: str
    options: dict[str, Any]
    keep: tuple[float, float, float]
    heals: bool = False
    """Whether ``--heal`` adds a training stage."""


FAMILIES = {
    "drop": Family("slice", {"method": "drop"}, (0.9, 0.7, 0.5), heals=True),
    "modegpt": Family("slice", {"method": "modegpt"}, (0.9, 0.7, 0.5), heals=True),
    "mixed": Family(
        "decompose",
        {"method": "mixed", "components": ["pivoted_low_rank", "sparse"], "compensate": {}},
        (0.8, 0.6, 0.4),
    ),
    "int": Family(
        "decompose",
        {"method": "mixed", "components": ["dense"], "schemes": SCHEMES, "compensate": {}},
        (0.5, 0.3, 0.2),
    ),
}
STEPS_8B = {"int": {0.5: 120.4 / 157.3, 0.3: 120.4 / 185.1, 0.2: 120.4 / 182.9}}
STEPS_8B["mixed"] = {0.8: 1 / 1.11, 0.6: 120.4 / 138.0, 0.4: 120.4 / 156.4}
"""Time of a step of a drafter in the shapes of Llama-3-8B over that of the dense model, from "Speed
of the stored forms on a GPU" in BENCHMARKS.md, of the nearest form: int8, int4-g64 and int3-g64 in
a whole model; pivoted low rank at 0.8 (products only) and 0.6 (whole model), 4:8 (whole model).
For slices, the fraction of the bytes."""


@dataclass
class Drafter:
    """A checkpoint, and what has been measured with it."""

    family: str
    keep: float
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def cost_8b(self) -> float:
        """Time of a step in the shapes of Llama-3-8B, relative to dense."""
        return STEPS_8B.get(self.family, {}).get(self.keep, self.keep)


def drafters(args: argparse.Namespace) -> list[Drafter]:
    """Return all checkpoints that the options name."""
    return [
        Drafter(name, keep, folder(args, name) / f"keep={keep:g}" / "drafter")
        for name in args.only
        for keep in FAMILIES[name].keep
    ]


def folder(args: argparse.Namespace, name: str) -> Path:
    """Return the folder of the sizes of a family."""
    healed = f"-heal-{args.heal}" if args.heal and FAMILIES[name].heals else ""
    return Path(args.folder) / f"{name}{healed}"


def compress(args: argparse.Namespace) -> None:
    """Make the drafters that are missing."""
    for name in args.only:
        start, family = time.monotonic(), FAMILIES[name]
        stages: list[Any] = [{family.stage: {**family.options, "keep": family.keep[0]}}]
        if args.heal and family.heals:
            stages.append({"heal": {"method": "distill", "tokens": args.heal}})
        recipe = {
            "model": {"path": args.model, "dtype": "bfloat16"},
            "calibration": {
                "source": args.calibration or args.text[0],
                "samples": args.samples,
                "length": args.length,
            },
            "stages": stages,
            "evaluate": {"baselines": []},
            "output": str(folder(args, name)),
        }
        path = Path(args.folder) / f"{folder(args, name).name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False))
        sweep = Sweep(path, folder(args, name), Machine(args.device))
        wanted = combinations(read_axes([f"keep={','.join(f'{k:g}' for k in family.keep)}"]))
        with sweep.opened() as shared:
            sweep.run(wanted, shared)
        for run, outcome in sweep.outcomes.items():
            if outcome.problems:
                print(f"{name} {run}: {'; '.join(outcome.problems)}")
            out = outcome.folder / "drafter"
            if outcome.report is not None and not out.is_dir():
                # In the format of lrc also if plain: transformers would expand the integers.
                with new_folder(out) as partial:
                    write_drafter(outcome.folder / "checkpoint", args.model, partial, no_progress)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


def measure(args: argparse.Namespace) -> None:
    """Measure every drafter that is there, until the time is over."""
    start = time.monotonic()
    model = Path(args.model)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    parent = load_checkpoint(model, dtype=dtype, device=args.device)
    tokenizer = load_tokenizer(model)
    prompts = {}
    for file in args.text:
        spec = Perplexity(source=file, window=args.prompt, tokens=args.text_tokens)
        found = evaluation_windows(spec, tokenizer).tokens
        prompts[Path(file).parent.name or spec.name] = found[:: max(1, len(found) // args.prompts)][
            : args.prompts
        ]
    names = ("accepted", "expected", "measured", "v")
    print(f"{'':12} {'MiB':>6} {'c':>5} {'k':>3} {' '.join(f'{name:>9}' for name in names)}")
    done = []
    for drafter in drafters(args):
        if not drafter.folder.is_dir() or time.monotonic() - start > args.seconds:
            print(f"{drafter.family} {drafter.keep:g}: not measured")
            continue
        try:
            drafter.facts = one(parent, drafter, prompts, dtype, args)
        except RuntimeError as error:  # the others may still be measured
            traceback.print_exc()
            print(f"{drafter.family} {drafter.keep:g}: {error}", flush=True)
            continue
        finally:
            release_memory()
        done.append(drafter)
        facts = [{"family": d.family, "keep": d.keep, **d.facts} for d in done]
        (Path(args.folder) / "drafting.json").write_text(json.dumps(facts, indent=1) + "\n")
    report(done)


def one(
    parent: Any, drafter: Drafter, prompts: dict[str, Any], dtype: Any, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure a pair, first with a common number of drafts, then with the best one."""
    model = load_checkpoint(drafter.folder, dtype=dtype, device=args.device)
    share_embeddings(model, parent)
    prompt = next(iter(prompts.values()))[:1].to(args.device)
    cost = step_seconds(model, prompt, args) / step_seconds(parent, prompt, args)
    drafts, runs = FIRST_DRAFTS, {}
    for repeats in (1, args.repeats):
        settings = DraftSettings(drafts, args.prompts, prompt.shape[1], args.tokens, repeats)
        benchmark = DraftingBenchmark(parent, model, settings, generate=False)
        found = benchmark.run(prompts, no_progress)
        rounds = sum(each["rounds"] for each in found["acceptance"].values())
        rate = sum(e["rate"] * e["rounds"] for e in found["acceptance"].values()) / rounds
        tokens = sum(e["tokens_per_round"] * e["rounds"] for e in found["acceptance"].values())
        runs[drafts] = found | {
            "rate": rate,
            "expected": expected_speed(rate, drafts, cost),
            "check": tokens / rounds / found["speed"][0]["ratio"] - drafts * cost,
        }
        row(drafter, cost, drafts, runs[drafts])
        del benchmark
        drafts = max(1, best_drafts(rate, cost)[0])
        if drafts in runs:
            break
    return {"cost": cost, "runs": runs}


def step_seconds(model: Any, prompt: Any, args: argparse.Namespace) -> float:
    """Return the seconds of a step that reads one token, the mean over one text."""
    kind = GraphDecoder if prompt.is_cuda else StaticDecoder
    with torch.no_grad():
        decoder = kind(model, prompt, args.tokens)
        decoder.prefill()
        timer = Timer(args.device)
        timer(decoder.decode)
        decoder.prefill()
        return timer(decoder.decode) / args.tokens


def row(drafter: Drafter, cost: float, drafts: int, found: dict[str, Any]) -> None:
    """Print a measurement."""
    (speed,) = found["speed"]
    (exact,) = found["exact"].values()
    equal = exact["texts"] - len(exact["differ"])
    ties = sum(each["tie"] for each in exact["differ"])
    rates = " ".join(f"{name} {e['rate']:.1%}" for name, e in found["acceptance"].items())
    mib = found["memory"]["drafter"] / 2**20
    print(
        f"{drafter.family:7} {drafter.keep:4g} {mib:6.1f} {cost:5.2f} "
        f"{drafts:3} {found['rate']:9.1%} {found['expected']:8.2f}x {speed['ratio']:8.2f}x "
        f"{found['check']:9.2f}   "
        f"{speed['parent_tokens_per_second']:.1f} -> {speed['pair_tokens_per_second']:.1f}"
        f" tokens/s   {rates}   equal {equal} of {exact['texts']}, ties {ties}",
        flush=True,
    )


def report(done: list[Drafter]) -> None:
    """Print the best pair, and what the acceptance would give at 8B."""
    pairs = [
        (run["speed"][0]["ratio"], d.family, d.keep, drafts)
        for d in done
        for drafts, run in d.facts["runs"].items()
    ]
    if not pairs:
        return
    ratio, family, keep, drafts = max(pairs)
    print(f"\nbest pair: {family} {keep:g} with {drafts} drafts, {ratio:.2f}x of the parent alone")
    print("\nexpected in the shapes of Llama-3-8B, with the acceptance measured here")
    for d in done:
        rate = next(iter(d.facts["runs"].values()))["rate"]
        drafts, speed = best_drafts(rate, d.cost_8b)
        print(f"{d.family:7} {d.keep:4g}  c {d.cost_8b:.2f}  k {drafts:2}  {speed:.2f}x")


def main() -> None:
    """Parse the command line and run a part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", choices=["compress", "measure"])
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--calibration")
    parser.add_argument("--only", nargs="+", choices=[*FAMILIES], default=[*FAMILIES])
    parser.add_argument("--heal", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--text-tokens", type=int, default=100_000)
    parser.add_argument("--prompts", type=int, default=2, help="of every text")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.device == "cuda":
        print(torch.cuda.get_device_name(), torch.__version__)
    {"compress": compress, "measure": measure}[args.part](args)


if __name__ == "__main__":
    main()
