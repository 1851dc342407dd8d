"""Time the compression of a few random layers with the shapes of Qwen3-30B-A3B.

usage: python tests/benchmarks/experts.py [--methods gptq reap mixed] [--layers 2] ...

Prints one JSON object per method as soon as it is done. `seconds.layer` are those of one layer by
stage, from one progress report to the next, so that loading and warming up are not in them; with
--layers 1 those of the whole stage, which contain both. `peak_so_far` is the largest GPU memory up
to the last report of a stage, in GiB.
`seconds.extrapolated` is an estimate for all 48 layers, nothing measured: the time up to the last
report, the time of a layer for each layer that was not made, and the time after it, in which files
are written, in proportion to the bytes of the compressed model. With --products, the block of
experts of the loaded checkpoint is timed too, with and without products of several experts.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from shape_models import RandomModel, write_text
from stage_costs import reset_peaks
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lrc.cli import console
from lrc.compressors.checkpoint.reader import load_checkpoint
from lrc.compressors.io.machine import Machine, release_memory
from lrc.compressors.pipeline import compress
from lrc.configs.errors import LrcError
from lrc.configs.load import LoadedRecipe, parse_recipe
from lrc.configs.yaml_text import write_yaml

LAYERS = 48
TOKENS, REPEATS = (1, 2, 8, 64, 1024), 21
PRESETS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}
STAGES: dict[str, dict[str, Any]] = {
    "gptq": {"quantize": {"method": "gptq", "bits": 4, "group_size": 64}},
    "reap": {"slice": {"method": "reap", "keep": 0.75}},
    "mixed": {"decompose": {"method": "mixed", "keep": 0.5}},
    "svd-llm": {"decompose": {"method": "svd-llm", "keep": 0.7}},
    "kfac": {"decompose": {"method": "kfac", "keep": 0.7}},
}


def make_model(folder: Path, sizes: dict[str, Any], layers: int, device: str) -> None:
    """Write a random model in bfloat16, with one tensor per matrix of each expert as published."""
    config = Qwen3MoeConfig(
        **sizes,
        num_hidden_layers=layers,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=8192,
    )
    with torch.device("meta"):
        state = Qwen3MoeForCausalLM(config).to(torch.bfloat16).state_dict()
    meta: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if ".experts." not in name:
            meta[name] = tensor
            continue
        experts, leaf = name.rsplit(".", 1)
        parts = {"down_proj": tensor}
        if leaf == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True))
        for part, stacked in parts.items():
            for number, matrix in enumerate(stacked):
                meta[f"{experts}.{number}.{part}.weight"] = matrix
    folder.mkdir()
    RandomModel(config, meta, device, layers).save(folder)


class Steps:
    """Times at which layers were reported as done, by stage."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.at: defaultdict[str, list[float]] = defaultdict(list)
        self.peaks: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Record a report of progress."""
        self.last = time.monotonic()
        self.at[stage].append(self.last)
        if torch.cuda.is_available():
            self.peaks[stage] = round(torch.cuda.max_memory_allocated() / 2**30, 2)

    def per_layer(self, whole: dict[str, float]) -> dict[str, float]:
        """Return the mean seconds between reports by stage; of a stage with one report, `whole`."""
        return {
            stage: (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else whole[stage]
            for stage, times in self.at.items()
            if len(times) > 1 or stage in whole
        }


def recipe_of(args: argparse.Namespace, method: str, folder: Path) -> LoadedRecipe:
    """Build the recipe of a method."""
    content = {
        "model": str(folder / "model"),
        "calibration": {
            "source": str(folder / "text.txt"),
            "samples": args.samples,
            "length": args.length,
        },
        "stages": [STAGES[method]],
        "output": str(folder / method),
    }
    recipe = parse_recipe(write_yaml(content), name="experts.py", overrides=args.set)
    return LoadedRecipe(recipe, write_yaml(content), tuple(args.set))


def measure(args: argparse.Namespace, method: str, folder: Path) -> dict[str, Any]:
    """Compress the model in `folder` by one method and return the facts."""
    release_memory()
    reset_peaks(Machine(args.device).chosen)
    steps = Steps()
    report = compress(
        recipe_of(args, method, folder), Machine(args.device, overwrite=True, on_step=steps)
    )
    end = time.monotonic()
    per_layer = steps.per_layer(report["timing"]["seconds"] if args.layers == 1 else {})
    sizes = PRESETS[args.preset]
    outside = 2 * 2 * sizes["vocab_size"] * sizes["hidden_size"]  # embeddings, in bfloat16
    stored = report["size"]["model"]["tensor_bytes"]["compressed"]
    whole = outside + (stored - outside) * LAYERS / args.layers
    left = LAYERS - args.layers
    products = time_products(folder / method / "checkpoint", args.device) if args.products else None
    shutil.rmtree(folder / method)
    return {
        "method": method,
        "preset": args.preset,
        "layers": args.layers,
        "kept": report["size"]["targeted"]["kept"] if report["layers"] else None,
        "stage": STAGES[method],
        "bytes": {"measured": stored, "extrapolated": round(whole)},
        "experts": report["experts"],
        "seconds": {
            "total": round(end - steps.start, 1),
            "stages": report["timing"]["seconds"],
            "layer": {stage: round(seconds, 2) for stage, seconds in per_layer.items()},
            "layer_total": round(sum(per_layer.values()), 2),
            "extrapolated": round(
                steps.last
                - steps.start
                + left * sum(per_layer.values())
                + (end - steps.last) * whole / stored
            ),
        },
        "peak_so_far": steps.peaks,
        "milliseconds": products,
        **report["memory"],
        **report["environment"],
    }


@torch.inference_mode()
def time_products(checkpoint: Path, device: str) -> dict[str, dict[str, float]]:
    """Return milliseconds of a block of experts by the number of tokens.

    ``difference`` is the largest one between the outputs, relative to their standard deviation.
    """
    machine = Machine(device)
    model = load_checkpoint(checkpoint, dtype=torch.bfloat16, device=machine.chosen)
    block = model.model.layers[-1].mlp
    found: dict[str, dict[str, float]] = {}
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, n, model.config.hidden_size, generator=generator) for n in TOKENS]
    outputs: list[torch.Tensor] = []
    for name in ("together", "one after the other"):
        found[name] = {}
        for n_tokens, on_host in zip(TOKENS, inputs, strict=True):
            x = on_host.to(model.device, model.dtype)
            took = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                block(x)
                if x.is_cuda:
                    torch.cuda.synchronize(x.device)
                took.append(1e3 * (time.perf_counter() - start))
            found[name][str(n_tokens)] = round(sorted(took)[REPEATS // 2], 3)
            outputs.append(block(x).float())
        block.experts.batches = None  # of a plain checkpoint this means nothing
    pairs = [*zip(outputs[: len(TOKENS)], outputs[len(TOKENS) :], strict=True)]
    found["difference"] = {
        str(n): float((a - b).abs().max() / b.std())
        for n, (a, b) in zip(TOKENS, pairs, strict=True)
    }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="qwen3-30b-a3b")
    parser.add_argument("--methods", nargs="+", choices=STAGES, default=["gptq", "reap", "mixed"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, help="fewer per layer than the preset has")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=1024, help="tokens a window")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override")
    parser.add_argument("--products", action="store_true", help="time the checkpoint, too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="an existing one, in which a temporary one is made")
    args = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="experts-", dir=args.folder))
    sizes = PRESETS[args.preset] | ({"num_experts": args.experts} if args.experts else {})
    try:
        make_model(folder / "model", sizes, args.layers, Machine(args.device).chosen)
        n_tokens = 3 * args.samples * args.length  # windows start anywhere
        write_text(folder / "text.txt", str(folder / "model"), n_tokens)
        for method in args.methods:
            print(json.dumps(measure(args, method, folder), indent=1), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    with console.quiet_libraries():
        console.quiet_transformers()
        try:
            main()
        except LrcError as error:
            sys.exit(console.exit_code_of(error, debug=False))
