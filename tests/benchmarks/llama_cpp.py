"""Measure GGUF files in llama.cpp: perplexity, next to models in transformers, and speed.

usage: python -m tests.benchmarks.llama_cpp TEXT.jsonl FILE.gguf ... [--transformers FOLDER ...]
           [--windows 16] [--length 512] [--threads 1] [--rounds 0]

TEXT is a file of rows {"text": ...}. Its documents are joined by a blank line and tokenized by
llama.cpp with the vocabulary of the first file; all files must have the same. Windows are disjoint,
without BOS; the first token of a window is not predicted. Prints size and perplexity of each file,
and, with folders, the perplexity in transformers in float32 on the same tokens and the largest
difference of logits of the first window from those of the first file. With rounds, each measures
the speed of all files one after the other, with a prompt of 256 tokens and 48 tokens after it; the
medians are printed. Needs `make llama`.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from tests.llama_library import LlamaCpp, LlamaModel, why_missing
from transformers import AutoModelForCausalLM

import lrc  # noqa: F401  # registers the format
from lrc.compressors.corpus.documents import SEPARATOR, read_documents

PROMPT, TOKENS = 256, 48  # as in `llama-bench -p 256 -n 48`
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
    parser.add_argument("--rounds", type=int, default=0, help="of the measurement of speed")
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
            found = [model.logits(window.tolist(), threads=args.threads) for window in windows]
        first = found[0] if first is None else first
        size = path.stat().st_size / 2**20
        print(f"{path.name}: {size:.1f} MiB, perplexity {perplexity(found, windows):.3f}")
    for folder in args.transformers:
        found = reference(folder, windows)
        assert first is not None
        difference = np.abs(found[0] - first).max() / found[0].std()
        same = (found[0].argmax(1) == first.argmax(1)).mean()
        print(
            f"{folder} in transformers: perplexity {perplexity(found, windows):.3f}; first window: "
            f"largest difference {difference:.3f} standard deviations, {same:.1%} of argmax equal"
        )
    if args.rounds:
        *_, speeds = alternating(library, args.files, windows[0], args.rounds, args.threads)
        for path, (prompt, generated) in zip(args.files, speeds, strict=True):
            print(f"{path.name}: prompt {prompt:.0f}, generated {generated:.0f} tokens/s")


def alternating(
    library: LlamaCpp, files: list[Path], window: np.ndarray, rounds: int, threads: int
) -> Iterator[list[list[float]]]:
    """Yield, after every round, the median speeds of every file so far, in tokens per second.

    The speeds of a file are those of the prompt and of generation.
    """
    prompt = window[:PROMPT].tolist()
    with ExitStack() as stack:
        models = [stack.enter_context(library.open(path)) for path in files]
        for model in models:
            model.speed(prompt, TOKENS, threads=threads)  # reads the file into memory
        found = []
        for _ in range(rounds):
            found.append([model.speed(prompt, TOKENS, threads=threads) for model in models])
            medians: list[list[float]] = np.median(np.array(found), axis=0).tolist()
            yield medians


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


def perplexity(logits: Iterable[np.ndarray], windows: np.ndarray) -> float:
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
