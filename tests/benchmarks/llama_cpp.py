"""Measure the perplexity of GGUF files in llama.cpp, next to that of models in transformers.

usage: python -m tests.benchmarks.llama_cpp TEXT.jsonl FILE.gguf ... [--transformers FOLDER ...]
           [--windows 16] [--length 512] [--threads 1]

TEXT is a file of rows {"text": ...}. Its documents are joined by a blank line and tokenized by
llama.cpp with the vocabulary of the first file; all files must have the same. Windows are disjoint,
without BOS; the first token of a window is not predicted. Prints size, perplexity and tokens per
second of each file, and, with folders, the perplexity in transformers in float32 on the same tokens
and the largest difference of logits of the first window from those of the first file. Needs
`make llama`.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tests.llama_library import LlamaCpp, LlamaModel, why_missing
from transformers import AutoModelForCausalLM

import lrc  # noqa: F401  # registers the format
from lrc.compressors.corpus.documents import SEPARATOR, read_documents

CHARACTERS = 8  # of text per token, more than any tokenizer has on average


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("text")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--transformers", type=Path, nargs="+", default=[])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if (reason := why_missing()) is not None:
        sys.exit(reason)
    library = LlamaCpp()
    with library.open(args.files[0]) as model:
        windows = tokenized(model, args.text, args.windows, args.length)
    first: np.ndarray | None = None
    print(f"{windows.shape[0]} windows, {windows.shape[0] * (args.length - 1)} predicted tokens")
    for path in args.files:
        with library.open(path) as model:
            started = time.perf_counter()
            found = [model.logits(window.tolist(), threads=args.threads) for window in windows]
            speed = windows.size / (time.perf_counter() - started)
        first = found[0] if first is None else first
        size = path.stat().st_size / 2**20
        print(
            f"{path.name}: {size:.1f} MiB, perplexity {perplexity(found, windows):.3f}, "
            f"{speed:.0f} tokens/s"
        )
    for folder in args.transformers:
        found = reference(folder, windows)
        assert first is not None
        difference = np.abs(found[0] - first).max() / found[0].std()
        same = (found[0].argmax(1) == first.argmax(1)).mean()
        print(
            f"{folder} in transformers: perplexity {perplexity(found, windows):.3f}; first window: "
            f"largest difference {difference:.3f} standard deviations, {same:.1%} of argmax equal"
        )


def tokenized(model: LlamaModel, text: str, count: int, length: int) -> np.ndarray:
    """Return windows [count, length] of a text."""
    documents: list[str] = []
    for document in read_documents(text, part="evaluation"):
        documents.append(str(document))
        if sum(map(len, documents)) > CHARACTERS * count * length:
            break
    ids = model.tokenize(SEPARATOR.join(documents), special=False)
    count = min(count, len(ids) // length)
    return np.array(ids[: count * length], dtype=np.int64).reshape(count, length)


def perplexity(logits: list[np.ndarray], windows: np.ndarray) -> float:
    """Return the perplexity of all tokens but the first of each window."""
    losses = [
        torch.nn.functional.cross_entropy(torch.from_numpy(each[:-1]), torch.from_numpy(ids[1:]))
        for each, ids in zip(logits, windows, strict=True)
    ]
    return math.exp(torch.stack(losses).double().mean())


@torch.no_grad()
def reference(folder: Path, windows: np.ndarray) -> list[np.ndarray]:
    """Return the logits of every window in transformers, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [model(torch.from_numpy(ids[None])).logits[0].numpy() for ids in windows]


if __name__ == "__main__":
    main()
