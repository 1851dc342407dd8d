"""Calibrate with hidden states and gradients of 16 and 32 bits between layers, and compare.

    python tests/benchmarks/buffer_precision.py MODEL TEXT HELD_OUT FOLDER

Layers compute in float32 in all runs. What passes from one layer to the next, and the inputs of
layers from which the backward pass recomputes them, is rounded to bfloat16 or not. Prints for each
choice the largest and the median relative Frobenius difference of second moments from those of 32
bits, and that of compressed matrices. A model of the first layers (``--layers``) is calibrated and
compressed; the perplexity is that of the whole model with these layers compressed.
"""

import argparse
import json
import math
import shutil
import statistics as numbers
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from model_folder import as_folder
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.activation_cache import ActivationCache
from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

CHOICES = {"all 32 bits": (False, False), "lrc": (False, True), "all 16 bits": (True, True)}
"""Whether what passes between layers is rounded, and whether the inputs of layers are."""


def first_layers(model: Path, n_layers: int, folder: Path) -> Path:
    """Write a model with the first layers of another one; return its folder."""
    whole = as_folder(model, folder / "whole")
    small = AutoModelForCausalLM.from_pretrained(
        whole, num_hidden_layers=n_layers, dtype=torch.bfloat16
    )
    small.save_pretrained(folder / "source")
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder / "source")
    return folder / "source"


@contextmanager
def rounding(between: bool, inputs: bool) -> Iterator[None]:
    """Round as one of `CHOICES` says."""
    finish_layer, head = ActivationCache.finish_layer, statistics.backward_head
    allocate = statistics.allocate_checkpoints

    def round_(tensor: Tensor) -> None:
        if between:
            tensor.copy_(tensor.bfloat16())

    def finish(self: ActivationCache, **options: Any) -> None:
        round_(self.tensor)
        finish_layer(self, **options)

    def gradients_of_head(executor: Any, hidden: Tensor, gradients: Tensor) -> None:
        head(executor, hidden, gradients)
        round_(gradients)

    def buffers(_: Any, n_layers: int, shape: tuple[int, int, int]) -> list[Tensor]:
        dtype = torch.bfloat16 if inputs else torch.float32
        return [*torch.empty((n_layers, *shape), dtype=dtype)]

    ActivationCache.finish_layer = finish  # type: ignore[method-assign]
    statistics.backward_head = gradients_of_head
    statistics.allocate_checkpoints = buffers
    try:
        yield
    finally:
        ActivationCache.finish_layer = finish_layer  # type: ignore[method-assign]
        statistics.backward_head, statistics.allocate_checkpoints = head, allocate


def run(recipe: dict[str, Any], output: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the second moments, and the compressed matrices in dense form."""
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**recipe, "output": str(output)}), encoding="utf-8")
    moments: dict[str, Tensor] = {}

    def keep(stage: str, done: int, total: int) -> None:
        if stage == "allocate" and not moments:
            for file in sorted((output / "work/statistics").glob("*.safetensors")):
                moments.update((f"{file.stem} {k}", t) for k, t in load_file(file).items())

    compress(load_recipe(path), Machine("cpu", on_step=keep))
    return moments, compressed_matrices(output)


def compressed_matrices(output: Path) -> dict[str, Tensor]:
    """Return the compressed matrices of a run in dense form."""
    model: Any = AutoModelForCausalLM.from_pretrained(output / "checkpoint", dtype=torch.float32)
    model.dequantize()
    return {k: t for k, t in model.state_dict().items() if k.endswith("_proj.weight")}


@torch.no_grad()
def perplexity(
    whole: Path, weights: dict[str, Tensor], text: Path, n_windows: int, length: int
) -> float:
    """Return the perplexity of a model in which some matrices are replaced."""
    model: Any = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    model.load_state_dict(weights, strict=False)
    lines = text.read_text(encoding="utf-8").splitlines()[:200]
    joined = "\n\n".join(json.loads(line)["text"] for line in lines)
    tokens = AutoTokenizer.from_pretrained(whole)(joined)["input_ids"][: n_windows * length]
    losses = [
        float(model(window[None], labels=window[None]).loss)
        for window in torch.tensor(tokens).view(n_windows, length)
    ]
    return math.exp(numbers.mean(losses))


def differences(found: dict[str, Tensor], exact: dict[str, Tensor]) -> list[float]:
    """Return the relative Frobenius differences of matrices."""
    return [
        float((found[name].double() - exact[name].double()).norm() / exact[name].double().norm())
        for name in exact
        if exact[name].ndim == 2
    ]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "text", "held_out", "folder"):
        parser.add_argument(name, type=Path)  # texts: .jsonl
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    calibration = {"source": str(options.text), "samples": options.samples}
    recipe = {
        "model": str(first_layers(options.model, options.layers, options.folder)),
        "calibration": {**calibration, "length": options.length},
        "stages": [{"decompose": {"method": "kfac", "keep": 0.8}}],
        "evaluate": {"perplexity": []},
    }
    whole = as_folder(options.model, options.folder / "whole")
    dense = perplexity(whole, {}, options.held_out, options.windows, options.length)
    print(f"dense: perplexity {dense:.4f}\n")
    print("| buffers | moments of inputs, largest (median) | of gradients | weights | perplexity |")
    print("|---|---|---|---|---|", flush=True)
    exact: Any = None
    for name, choice in CHOICES.items():
        output = options.folder / name.replace(" ", "-")
        shutil.rmtree(output, ignore_errors=True)
        with rounding(*choice):
            found = run(recipe, output)
        exact = exact or found
        cells = []
        for which, start in ((0, "inputs"), (0, "gradients"), (1, "")):
            chosen = {k: t for k, t in exact[which].items() if k.startswith(start)}
            each = differences(found[which], chosen)
            cells.append(f"{max(each):.1e} ({numbers.median(each):.1e})")
        score = perplexity(whole, found[1], options.held_out, options.windows, options.length)
        print(f"| {name} | {' | '.join(cells)} | {score:.4f} |", flush=True)


if __name__ == "__main__":
    main()
