"""Quantize a GGUF file with llama.cpp's own quantizer, as a baseline for the files of lrc.

usage: python -m tests.benchmarks.llama_quantize SOURCE.gguf FOLDER TYPE ...
           [--importance MODEL TEXT.jsonl] [--windows 128] [--length 1024]

Each TYPE is a name of `gguf.LlamaFileType` without ``MOSTLY_``, such as Q4_K_M; its file is
FOLDER/TYPE.gguf, or TYPE-imatrix.gguf with `--importance`. The importance matrix is then what
``llama-imatrix`` computes, the mean square of every input of every linear layer over the windows of
a text; transformers computes it in float32 from MODEL, a folder. Needs `make llama`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, LlamaFileType, get_tensor_name_map
from tests.benchmarks.llama_cpp import tokenized
from tests.llama_library import LlamaCpp, why_missing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

TYPES = {each.name.removeprefix("MOSTLY_"): each for each in LlamaFileType}


def main() -> None:
    """Parse the command line, quantize."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("types", nargs="+", choices=sorted(TYPES), metavar="TYPE")
    parser.add_argument("--importance", nargs=2, metavar=("MODEL", "TEXT"))
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    if (reason := why_missing()) is not None:
        sys.exit(reason)
    library, importance = LlamaCpp(), None
    if args.importance:
        folder, text = args.importance
        with library.open(args.source) as model:
            windows = tokenized(model, text, args.windows, args.length)
        print(f"importance: {windows.size} tokens")
        importance = mean_squares(Path(folder), windows)
    for name in args.types:
        target = args.folder / f"{name}{'-imatrix' if importance else ''}.gguf"
        library.quantize(args.source, target, int(TYPES[name]), importance)


@torch.no_grad()
def mean_squares(
    folder: Path, windows: np.ndarray, *, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Return the mean square of the inputs of every linear layer, by its name in GGUF."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval().to(device)
    arch = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}[model.config.model_type]
    names = get_tensor_name_map(arch, model.config.num_hidden_layers)
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        squares = x.double().square().flatten(0, -2).sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            stored = f"{names.get_name(name)}.weight"
            module.register_forward_pre_hook(lambda _, inputs, n=stored: add(n, inputs[0]))
    for window in windows:
        model(torch.from_numpy(window[None]).to(device), logits_to_keep=1)
    return {name: (total / windows.size).float().cpu().numpy() for name, total in sums.items()}


if __name__ == "__main__":
    main()
