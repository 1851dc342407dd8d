"""Compress a model with another program and evaluate the result as lrc's own rows are evaluated.

usage: python tests/benchmarks/peers/row.py RECIPE FOLDER PEER [OPTION=VALUE ...]
           [--set KEY=VALUE ...]

RECIPE gives model, calibration text and evaluation, as tests/benchmarks/protocol_a.yaml does; its
stage is not used. PEER is a key of `PEERS`; its options are the keyword arguments of that function.
`--set` overrides keys of the recipe. The peer receives exactly the windows of tokens on which lrc
calibrates, and its weights, dequantized or multiplied out, replace those of the dense model for the
evaluation. Writes FOLDER/ROW.json and prints one line of a Markdown table.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from compressed_model import Calibrated, Compressed, layer_linears
from transformers import AutoModelForCausalLM
from with_auto_round import auto_round
from with_llm_compressor import llm_compressor
from with_sparsegpt import sparsegpt
from with_svd_llm import svd_llm
from with_wanda import wanda

from lrc.compressors.corpus.windows import calibration_windows
from lrc.compressors.evaluate.scores import evaluate_model
from lrc.compressors.io.machine import release_memory
from lrc.compressors.models.source import load_dense
from lrc.compressors.prepare import Prepared, prepare
from lrc.compressors.stages import STAGES
from lrc.configs.load import load_recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def dense(calibrated: Calibrated) -> Compressed:
    """Change nothing: the row that must agree with the dense model of the other tables."""
    return Compressed("", {}, {})


PEERS = {
    "dense": dense,
    "auto-round": auto_round,
    "llm-compressor": llm_compressor,
    "sparsegpt": sparsegpt,
    "svd-llm": svd_llm,
    "wanda": wanda,
}


def main() -> None:
    """Parse the command line, make the row, evaluate it, print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    asked = parser.parse_args()
    options = dict(option.split("=", 1) for option in asked.options)
    recipe = load_recipe(asked.recipe, asked.overrides).recipe
    prepared = prepare(recipe, STAGES)
    windows = calibration_windows(
        recipe.calibration,
        prepared.tokenizer,
        generator=torch.Generator().manual_seed(recipe.seed),
    )
    folder = prepared.source.folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=prepared.source.dtype).eval()
    calibrated = Calibrated(model, prepared.tokenizer, windows.tokens, DEVICE)
    started = time.monotonic()
    values = {key: yaml.safe_load(value) for key, value in options.items()}
    compressed = PEERS[asked.peer](calibrated, **values)
    seconds = time.monotonic() - started
    del model, calibrated
    release_memory()
    values.pop("code", None)
    row = " ".join([asked.peer, *(f"{key}={value}" for key, value in values.items())])
    facts = {"version": compressed.version, "seconds": seconds} | _evaluate(prepared, compressed)
    asked.folder.mkdir(parents=True, exist_ok=True)
    (asked.folder / f"{row}.json").write_text(json.dumps(facts))
    texts = facts["evaluation"]["perplexity"].values()
    cells = [row, compressed.version, f"{facts['kept']:.4f}"]
    cells += [*(f"{text['perplexity']:.2f}" for text in texts), f"{seconds:.0f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def _evaluate(prepared: Prepared, compressed: Compressed) -> dict[str, Any]:
    """Put the weights into the dense model; return sizes and scores."""
    source, recipe = prepared.source, prepared.recipe
    model = load_dense(source, source.folder, dtype=source.dtype, device=DEVICE)
    matrices = layer_linears(model).keys()
    if compressed.bits and compressed.bits.keys() != matrices:
        raise SystemExit(f"not compressed: {sorted(matrices - compressed.bits.keys())[:8]}")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in compressed.weights.items():
            parameters[name].copy_(weight)
    n_all = sum(parameter.numel() for parameter in parameters.values())
    n_layers = sum(parameters[name].numel() for name in matrices)
    bits = sum(compressed.bits.values()) if compressed.bits else 16 * n_layers
    scores = evaluate_model(model, prepared.tokenizer, recipe.evaluate, seed=recipe.seed)
    return {
        "kept": bits / (16 * n_layers),
        "bytes": 2 * (n_all - n_layers) + bits / 8,
        "evaluation": scores,
    }


if __name__ == "__main__":
    main()
