"""Time `lrc compress` on a random model of real shapes, made on the spot, or on a given model.

usage: python tests/benchmarks/shapes.py [--preset llama-3-8b] [--method kfac] [--keep 0.8] ...
       python tests/benchmarks/shapes.py --model FOLDER_OR_GGUF [--set KEY=VALUE] ...

Prints one JSON object. `seconds.compress` runs from looking at the model to the saved checkpoint
and report, nothing evaluated; imports and the making of model and text are not in it. Model files
were just written or are read as they lie, so they may come from the page cache.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from lrc.cli import console
from lrc.compressors.checkpoint.writer import write_weights
from lrc.compressors.io.machine import Machine, release_memory
from lrc.compressors.models.source import load_tokenizer, locate
from lrc.compressors.pipeline import compress
from lrc.compressors.slicing import METHODS as SLICERS
from lrc.configs.errors import LrcError
from lrc.configs.load import LoadedRecipe, parse_recipe
from lrc.configs.quantize import Quantize
from lrc.configs.recipe import Calibration, Model
from lrc.configs.yaml_text import write_yaml

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")
PRESETS = {
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128_256, False),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128_256, True),
    "tiny": (64, 96, 2, 4, 2, 512, False),
}
DECAY = 0.5  # singular values fall about as the index to minus this: energies as 1 / index


def make_model(folder: Path, sizes: dict[str, Any], device: str) -> None:
    """Write a random Llama in bfloat16 and its tokenizer."""
    config = LlamaConfig(
        **sizes,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=8192,
    )
    with torch.device("meta"):
        meta = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    if config.tie_word_embeddings:
        del meta["lm_head.weight"]
    write_model(folder, config, meta, device)


def write_model(
    folder: Path, config: PreTrainedConfig, meta: dict[str, torch.Tensor], device: str
) -> None:
    """Write random weights in bfloat16, one matrix on the device at a time, and a tokenizer."""
    config.save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)

    def read(name: str) -> torch.Tensor:
        shape = meta[name].shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        W = random_matrix(*shape, generator) * element_std(name, shape[1], config)
        return W.to("cpu", torch.bfloat16)

    write_weights(folder, meta, read)
    # A word a token: real text, too, has so many different tokens that every Gram matrix is full.
    words = {str(number): number for number in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="0").save_pretrained(folder)


def random_matrix(d_out: int, d_in: int, generator: torch.Generator) -> torch.Tensor:
    """Return a matrix [d_out, d_in] of unit variance and falling singular values, without an SVD.

    It is ``(G1 * s) @ G2`` with Gaussian G1, G2 and a power law s: full rank, as weights are.
    """
    inner, device = min(d_out, d_in), generator.device
    s = torch.arange(1, inner + 1, dtype=torch.float32, device=device).pow(-DECAY)
    left = torch.randn(d_out, inner, generator=generator, device=device)
    right = torch.randn(inner, d_in, generator=generator, device=device)
    return left.mul_(s / s.norm()) @ right  # [d_out, d_in]


def element_std(name: str, d_in: int, config: PreTrainedConfig) -> float:
    """Return the spread that keeps hidden states near 1 and logits near 1 at any depth."""
    if name == "model.embed_tokens.weight" and not config.tie_word_embeddings:
        return 1.0
    adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return float((d_in * (2 * config.num_hidden_layers if adds_to_residual else 1)) ** -0.5)


def write_text(path: Path, model: str, windows: Calibration) -> None:
    """Write the tokenizer's own tokens, drawn by Zipf's law on their ids, as words of a text.

    Ids of byte-pair encodings are about in order of frequency. The packaged text is too short.
    """
    tokenizer = load_tokenizer(locate(Model(path=model)))
    decoded = tokenizer.batch_decode([[i] for i in range(len(tokenizer))], skip_special_tokens=True)
    words = [word for word in map(str.strip, decoded) if word and word.isprintable()]
    weights = 1 / torch.arange(1, len(words) + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    count = 3 * windows.samples * windows.length  # windows start anywhere and may overlap
    drawn = torch.multinomial(weights, count, replacement=True, generator=generator)
    path.write_text(" ".join(words[i] for i in drawn.tolist()), encoding="utf-8")


def recipe_of(args: argparse.Namespace, model: str, folder: Path) -> LoadedRecipe:
    """Build the recipe that the arguments stand for."""
    text = str(folder / "text.txt")
    content = {
        "model": model,
        "calibration": {"source": text, "samples": args.samples, "length": args.length},
        "stages": [_stage(args.method, args.keep)],
        "output": str(folder / "run"),
    }
    recipe = parse_recipe(write_yaml(content), name="shapes.py", overrides=args.set)
    return LoadedRecipe(recipe, write_yaml(content), tuple(args.set))


def _stage(method: str, keep: float) -> dict[str, Any]:
    if method in get_args(Quantize.model_fields["method"].annotation):
        return {"quantize": {"method": method, "bits": 4, "group_size": 64}}
    return {"slice" if method in SLICERS else "decompose": {"method": method, "keep": keep}}


def forget_peaks() -> None:
    """Measure peaks from here on: making the model is not in them."""
    release_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux; elsewhere the peak of the whole process is reported
        Path("/proc/self/clear_refs").write_text("5")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make what is missing in `folder`, compress, and return the facts."""
    model = args.model or str(folder / "model")
    loaded = recipe_of(args, model, folder)
    sizes = None
    start = time.monotonic()
    if not args.model:
        sizes = dict(zip(SIZES, PRESETS[args.preset], strict=True))
        sizes["num_hidden_layers"] = args.layers or sizes["num_hidden_layers"]
        make_model(folder / "model", sizes, Machine(args.device).chosen)
    text = folder / "text.txt"
    if loaded.recipe.calibration.source == str(text):  # no override names another
        write_text(text, model, loaded.recipe.calibration)
    made = time.monotonic() - start
    forget_peaks()
    start = time.monotonic()
    with console.Steps(quiet=args.quiet).running() as steps:
        report = compress(loaded, Machine(args.device, overwrite=True, on_step=steps))
    took = {"make": round(made, 2), "compress": round(time.monotonic() - start, 2)}
    matrices = Counter(" x ".join(map(str, layer["config"]["shape"])) for layer in report["layers"])
    shapes = {"name": args.model or args.preset, "config": sizes, "matrices": dict(matrices)}
    return {
        "model": shapes | report["size"]["model"],
        "recipe": report["recipe"],
        "kept": report["size"]["targeted"]["kept"],
        "slices": report["slices"],
        "training": report["training"],
        "seconds": took | {"stages": report["timing"]["seconds"]},
        **report["memory"],
        **report["environment"],
        "folder": str(folder) if args.keep_files else None,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", choices=PRESETS, default="llama-3-8b")
    which.add_argument("--model", help="folder, .gguf file or Hub id; then nothing is made")
    parser.add_argument("--layers", type=int, help="fewer (or more) layers than the preset has")
    parser.add_argument("--method", default="kfac")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=1024, help="tokens a window")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", help="an existing one, in which a temporary one is made")
    parser.add_argument("--keep-files", action="store_true", help="do not delete the temporary one")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="shapes-", dir=args.folder))
    try:
        print(json.dumps(measure(args, folder), indent=1))
    finally:
        if not args.keep_files:
            shutil.rmtree(folder)


if __name__ == "__main__":
    with console.quiet_libraries():
        console.quiet_transformers()
        try:
            main()
        except LrcError as error:
            sys.exit(console.exit_code_of(error, debug=False))
