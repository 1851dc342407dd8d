"""Measure `lrc compress` on a random model of real shapes, made on the spot, or on a given model.

usage: python tests/benchmarks/shapes.py [--preset llama-3-8b] [--method kfac] [--keep 0.8] ...
       python tests/benchmarks/shapes.py --preset llama-3-70b --generated --layers 6 --depth 80
       python tests/benchmarks/shapes.py --sizes [--method gptq] ...
       python tests/benchmarks/shapes.py --model FOLDER_OR_GGUF [--set KEY=VALUE] ...

Prints one JSON object: seconds, peak memory of the GPU (`torch.cuda.max_memory_allocated`) and of
the host (high-water mark of the resident set) and peak disk space of every stage. `seconds.run`
goes from looking at the model to the report; imports and the making of model and text are not in
it. Model files were just written or are read as they lie, so they may come from the page cache.

With fewer layers than `--depth`, costs of all layers are extrapolated from the time per layer, and
labelled as such. With `--sizes`, models of 135M to 70B parameters run with `--layers` layers each
(6 by default), and exponents of the costs are fitted.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

from run_folder import run_folder
from shape_models import PRESETS, SIZES, RandomModel, write_text
from stage_costs import GIB, StageCosts, exponents, smaller_gpu

from lrc.cli import console
from lrc.compressors.io.gpu_allocator import use_expandable_segments
from lrc.compressors.io.machine import Machine, release_memory
from lrc.compressors.pipeline import compress
from lrc.compressors.slicing import METHODS as SLICERS
from lrc.configs.errors import LrcError
from lrc.configs.load import LoadedRecipe, parse_recipe
from lrc.configs.quantize import Quantize
from lrc.configs.yaml_text import write_yaml

GROWING = ("smollm2-135m", "llama-3.2-1b", "llama-3-8b", "llama-3-70b")
"""Presets of `--sizes`."""
EVALUATION_WINDOW = 2048


def recipe_of(args: argparse.Namespace, model: str, folder: Path) -> LoadedRecipe:
    """Build the recipe that the arguments stand for."""
    text = str(folder / "text.txt")
    content: dict[str, Any] = {
        "model": model,
        "calibration": {"source": text, "samples": args.samples, "length": args.length},
        "stages": [_stage(args)],
        "output": str(folder / "run"),
    }
    if args.evaluate:
        window = min(EVALUATION_WINDOW, args.length * args.samples // 2)
        texts = [{"source": text, "name": "text", "window": window, "windows": args.evaluate}]
        content["evaluate"] = {
            **{"perplexity": texts, "streaming": "always"},
            "baselines": ["int8", "int4-g64"],
        }
    recipe = parse_recipe(write_yaml(content), name="shapes.py", overrides=args.set)
    return LoadedRecipe(recipe, write_yaml(content), tuple(args.set))


def _stage(args: argparse.Namespace) -> dict[str, Any]:
    compensate: dict[str, Any] = {"compensate": {}} if args.compensate else {}
    if args.method in get_args(Quantize.model_fields["method"].annotation):
        return {"quantize": {"method": args.method, "bits": 4, "group_size": 64, **compensate}}
    kind = "slice" if args.method in SLICERS else "decompose"
    return {kind: {"method": args.method, "keep": args.keep, **compensate}}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make what is missing in `folder`, compress, and return the facts."""
    model = args.model or str(folder / "model")
    loaded = recipe_of(args, model, folder)
    device = Machine(args.device).chosen
    use_expandable_segments()
    sizes, source, depth = None, nullcontext(), args.depth
    start = time.monotonic()
    if not args.model:
        sizes = dict(zip(SIZES, PRESETS[args.preset], strict=True))
        depth = depth or sizes["num_hidden_layers"]
        sizes["num_hidden_layers"] = args.layers or sizes["num_hidden_layers"]
        depth_at_least = max(depth, sizes["num_hidden_layers"])
        random = RandomModel.llama(sizes, device, depth_at_least, gaussian=args.gaussian)
        (folder / "model").mkdir()
        if args.generated:
            source = random.generated(folder / "model")
        else:
            random.save(folder / "model")
    with (
        source,
        console.Steps(quiet=args.quiet).running() as steps,
        smaller_gpu(device, args.gpu_gib),
    ):
        text = folder / "text.txt"
        if loaded.recipe.calibration.source == str(text):  # no override names another
            windows = loaded.recipe.calibration
            n_tokens = [3 * windows.samples * windows.length]  # windows start anywhere
            n_tokens += [s.window * (s.windows or 0) for s in loaded.recipe.evaluate.perplexity]
            write_text(text, model, max(n_tokens))
        made = time.monotonic() - start
        release_memory()
        costs = StageCosts(device, folder / "run", steps)
        start = time.monotonic()
        with costs.watching():
            report = compress(loaded, Machine(args.device, overwrite=True, on_step=costs.on_step))
    return {
        **_described(args, report, sizes, folder),
        "seconds": {"make": round(made, 2), "run": round(time.monotonic() - start, 2)},
        "stages": {
            name: {key: round(value, 3) for key, value in found.items()}
            for name, found in costs.stages.items()
        },
        **({} if sizes is None else _extrapolated(costs, report, sizes, depth)),
    }


def _described(
    args: argparse.Namespace, report: dict[str, Any], sizes: Any, folder: Path
) -> dict[str, Any]:
    matrices = Counter(" x ".join(map(str, layer["config"]["shape"])) for layer in report["layers"])
    shapes = {"name": args.model or args.preset, "config": sizes, "matrices": dict(matrices)}
    evaluation = report["evaluation"]
    return {
        "model": shapes | report["size"]["model"],
        "recipe": report["recipe"],
        "kept": report["size"]["targeted"]["kept"],
        "slices": report["slices"],
        "training": report["training"],
        "perplexity": evaluation["perplexity"],
        "kl": {name: each["forward"] for name, each in evaluation["kl"].items()},
        "baselines": evaluation["baselines"],
        "estimate": _estimate(report["estimate"]),
        **report["environment"],
        "gpu_gib_limit": args.gpu_gib,
        "weights_generated": args.generated,
        "folder": str(folder) if args.keep_files else None,
    }


def _estimate(found: dict[str, Any]) -> dict[str, Any]:
    """Return the estimates by stage, in the units of the measured stages."""
    stages: dict[str, Any] = {
        stage: {"seconds": round(seconds, 2)} for stage, seconds in found["seconds"].items()
    }
    for kind in ("gpu", "host", "disk"):
        for stage, n_bytes in found[f"{kind}_bytes"].items():
            stages.setdefault(stage, {})[f"{kind}_gib"] = round(n_bytes / GIB, 3)
    return stages


def _extrapolated(
    costs: StageCosts, report: dict[str, Any], sizes: dict[str, Any], depth: int
) -> dict[str, Any]:
    n_layers = sizes["num_hidden_layers"]
    if depth <= n_layers:
        return {}
    ends = sizes["hidden_size"] * sizes["vocab_size"] * (1 if sizes["tie_word_embeddings"] else 2)
    in_layers = 1 - ends / report["size"]["model"]["parameters"]["dense"]
    return {"extrapolation": costs.extrapolated(n_layers, depth, in_layers)}


def measure_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """Measure models of several sizes; return their costs, and the exponents."""
    found, costs = {}, {}
    for preset in GROWING:
        depth = dict(zip(SIZES, PRESETS[preset], strict=True))["num_hidden_layers"]
        changes = {"preset": preset, "layers": min(depth, args.layers or 6), "depth": depth}
        facts = _in_folder(argparse.Namespace(**vars(args) | changes))
        n_layers, few = changes["layers"], facts["model"]["parameters"]["dense"]
        ends = facts["model"]["config"]
        ends = ends["hidden_size"] * ends["vocab_size"] * (2 - ends["tie_word_embeddings"])
        parameters = ends + (few - ends) * depth // n_layers
        whole = facts.get("extrapolation", {}).get("seconds") or {
            name: stage["seconds"] for name, stage in facts["stages"].items()
        }
        found[preset] = {
            "parameters": parameters,
            "layers": n_layers,
            "of_layers": depth,
            "seconds": facts["seconds"],
            "stages": facts["stages"],
            "estimate": facts["estimate"],
            "extrapolated_seconds": whole,
        }
        costs[parameters] = {
            **{f"{name} seconds": value for name, value in whole.items()},
            "total seconds": sum(whole.values()),
            **{
                f"{name} {key}": stage[key]
                for name, stage in facts["stages"].items()
                for key in ("gpu_gib", "host_gib")
            },
        }
    note = "exponents of the number of parameters; seconds of all layers are extrapolated"
    return {"sizes": found, "exponents": exponents(costs), "note": note}


def _in_folder(args: argparse.Namespace) -> dict[str, Any]:
    with run_folder("shapes", args.folder, keep=args.keep_files) as folder:
        return measure(args, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", choices=PRESETS, default="llama-3-8b")
    which.add_argument("--sizes", action="store_true", help=f"all of {', '.join(GROWING)}")
    which.add_argument("--model", help="folder, .gguf file or Hub id; then nothing is made")
    parser.add_argument("--generated", action="store_true", help="weights are made when read")
    parser.add_argument("--gaussian", action="store_true", help="weights without structure")
    parser.add_argument("--layers", type=int, help="fewer (or more) layers than the preset has")
    parser.add_argument("--depth", type=int, help="layers to extrapolate to, by default all")
    parser.add_argument("--method", default="kfac")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--compensate", action="store_true", help="with error compensation")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=1024, help="tokens a window")
    parser.add_argument(
        "--evaluate",
        type=int,
        metavar="WINDOWS",
        help=f"evaluate the result and two baselines on windows of {EVALUATION_WINDOW} tokens",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu-gib", type=float, help="use only so much memory of the GPU")
    parser.add_argument("--folder", help="an existing one, in which a temporary one is made")
    parser.add_argument("--keep-files", action="store_true", help="do not delete the temporary one")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args(arguments)
    print(json.dumps(measure_sizes(args) if args.sizes else _in_folder(args), indent=1))


if __name__ == "__main__":
    with console.quiet_libraries():
        console.quiet_transformers()
        try:
            main()
        except LrcError as error:
            sys.exit(console.exit_code_of(error, debug=False))
