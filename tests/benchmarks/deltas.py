"""Measure the accuracy of a classifier whose fine-tuning is stored as a compressed delta.

usage: python tests/benchmarks/deltas.py MODEL DATA WORK [--steps 400] [--rows 24000] [--batch 64]
           [--ratios 8 16 50] [--alphas 1] [--rank 16] [--test 872] [--jobs 8] [--only adapter]
           [--methods low-rank]

MODEL is a folder of a causal language model with its tokenizer, or a GGUF file, and DATA a folder
with train.jsonl and validation.jsonl of rows {"sentence": ..., "label": 0 or 1}, such as SST-2 of
GLUE. The model is trained to continue a prompt with " positive" or " negative", once by a LoRA
adapter of PEFT on all linear layers and once in all parameters. Both results are compressed by
every method of `lrc delta make` to about the given ratios, where the method has an option that
reaches them, `low-rank` also with training examples as calibration text, and loaded one after the
other on the same base model.

Ratios are bits of the tensors at 16 bits per number over stored bits. Prints one row of a Markdown
table per delta, with the bytes of all its files, and writes WORK/results.json.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tests.benchmarks.model_folder import as_folder
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT, LABELS = "Review: {}\nThe sentiment of this review is", (" negative", " positive")
CALIBRATION = "calibration.txt"
METHODS = ("ternary", "sparse", "low-rank", "int")
RATES = {"adapter": 1e-3, "model": 3e-5}
"""Highest learning rates, reached after a tenth of the steps; they fall linearly to zero."""


def main() -> None:
    """Parse the command line, train, compress, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=24000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--ratios", type=float, nargs="+", default=[8, 16, 50])
    parser.add_argument("--alphas", type=float, nargs="+", default=[1])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--test", type=int, default=872)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--only", choices=["adapter", "model"])
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS)
    args = parser.parse_args()
    started = time.monotonic()
    args.work.mkdir(parents=True, exist_ok=True)
    base = as_folder(args.model, args.work / "base")
    task = Task(base, args)
    task.write_text(args.work / CALIBRATION)
    kinds = [args.only] if args.only else ["adapter", "model"]
    model = task.load()
    results = [{"kind": "base", "accuracy": task.accuracy(model)}]
    print(f"base: accuracy {results[0]['accuracy']:.4f}", flush=True)
    for kind in kinds:
        tuned = args.work / f"tuned-{kind}"
        accuracy = train(task, kind, tuned, args)
        results.append({"kind": kind, "accuracy": accuracy})
        print(f"{kind}: accuracy {accuracy:.4f}, {time.monotonic() - started:.0f} s", flush=True)
        results += compressed(task, model, base, tuned, kind, args)
    (args.work / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)
    print(f"{time.monotonic() - started:.0f} s")


class Task:
    """Prompts and labels, and the accuracy of a model on those that it is not trained on."""

    def __init__(self, base: Path, args: argparse.Namespace) -> None:
        self.base = base
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        words = [self.tokenizer(word, add_special_tokens=False).input_ids[0] for word in LABELS]
        if len({*words}) < len(LABELS):
            raise SystemExit(f"{base}: the labels {LABELS} must start with different tokens")
        self.words = torch.tensor(words, device=self.device)
        self.batch = args.batch
        self.train = read_rows(args.data / "train.jsonl")[: args.rows]
        self.test = read_rows(args.data / "validation.jsonl")[: args.test]

    def write_text(self, path: Path) -> None:
        """Write the examples to train on as a calibration text."""
        lines = (
            PROMPT.format(row["sentence"].strip()) + LABELS[row["label"]] for row in self.train
        )
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")

    def load(self) -> Any:
        """Load the base model in float32.

        Eager attention, because fused kernels return NaN gradients for padding on the left, whose
        queries see no key.
        """
        model = AutoModelForCausalLM.from_pretrained(
            self.base, dtype=torch.float32, attn_implementation="eager"
        )
        return model.to(self.device).eval()

    def logits(self, model: Any, rows: list[dict[str, Any]]) -> Tensor:
        """Return the logits of the next token after every prompt, [rows, tokens]."""
        prompts = [PROMPT.format(row["sentence"].strip()) for row in rows]
        inputs = self.tokenizer(prompts, padding=True, return_tensors="pt").to(self.device)
        positions = (inputs.attention_mask.cumsum(1) - 1).clamp_min(0)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            found: Tensor = model(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                position_ids=positions,
                logits_to_keep=1,
            ).logits
        return found[:, -1].float()

    def targets(self, rows: list[dict[str, Any]]) -> Tensor:
        """Return the tokens of the labels."""
        return self.words[torch.tensor([row["label"] for row in rows], device=self.device)]

    @torch.no_grad()
    def accuracy(self, model: Any) -> float:
        """Return the fraction of test rows for which the right label is more likely."""
        right = 0
        for start in range(0, len(self.test), self.batch):
            rows = self.test[start : start + self.batch]
            chosen = self.words[self.logits(model, rows)[:, self.words].argmax(dim=1)]
            right += int((chosen == self.targets(rows)).sum())
        return right / len(self.test)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON rows."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(task: Task, kind: str, folder: Path, args: argparse.Namespace) -> float:
    """Train and save an adapter or the whole model; return its accuracy."""
    torch.manual_seed(0)
    model = task.load()
    if kind == "adapter":
        import peft

        config = peft.LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules="all-linear",
            lora_dropout=0.05,
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[kind], weight_decay=0.0)
    warm = max(1, args.steps // 10)

    def rate(step: int) -> float:
        return min((step + 1) / warm, (args.steps - step) / max(1, args.steps - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for rows in batches(task.train, args.batch, args.steps):
        loss = cross_entropy(task.logits(model, rows), task.targets(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    model.save_pretrained(folder)
    return task.accuracy(model)


def batches(rows: list[dict[str, Any]], size: int, steps: int) -> Iterator[list[dict[str, Any]]]:
    """Yield random batches, without repetition until all rows have been used."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(rows), generator=generator).tolist()
        yield [rows[place] for place in order[:size]]
        del order[:size]


def compressed(
    task: Task, model: Any, base: Path, tuned: Path, kind: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Compress a result in every way, and measure each on the base model."""
    from lrc.compressors.deltas.loaded_deltas import LoadedDeltas

    jobs = []
    chosen = [each for each in settings(kind, args) if each[1] in args.methods]
    for number, (ratio, method, options) in enumerate(chosen):
        folder = args.work / f"delta-{kind}-{number}"
        jobs.append((str(base), tuned, folder, ratio, method, options))
    # Spawned: CUDA does not survive a fork.
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(make, jobs))
    deltas = LoadedDeltas(model)
    for row, job in zip(rows, jobs, strict=True):
        name = str(job[2])
        deltas.add(name, name)
        deltas.activate(name)
        row |= {"kind": kind, "accuracy": task.accuracy(model)}
    deltas.deactivate()
    return rows


def settings(kind: str, args: argparse.Namespace) -> Iterator[tuple[float, str, list[str]]]:
    """Yield ratio, method and options of every delta."""
    for ratio in args.ratios:
        density = density_of(16 / ratio, bits=1)
        for alpha in args.alphas:
            yield ratio, "ternary", [f"density={density}", "scale=std", f"alpha={alpha}"]
        yield ratio, "ternary", [f"density={density}"]
        yield ratio, "sparse", [f"density={density_of(16 / ratio, bits=16)}", "values=bfloat16"]
        size = f"keep={1 / ratio}" if kind == "model" else f"rank={round(args.rank / ratio)}"
        if kind == "model" or args.rank >= ratio:
            yield ratio, "low-rank", [size]
            text = f"calibration.source={args.work / CALIBRATION}"
            yield ratio, "low-rank", [size, text, "calibration.length=512"]
        bits = int(16 / ratio)
        if bits >= 2:
            yield ratio, "int", [f"bits={bits}", "group_size=128"]


def density_of(budget: float, *, bits: int) -> float:
    """Return the density at which places and `bits` per place take `budget` bits per number."""

    def cost(p: float) -> float:
        entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p) if p < 1 else 1.0
        return min(entropy, 1.0) + bits * p

    low, high = 1e-6, 1.0
    if cost(high) <= budget:
        return high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return round(low, 6)


def make(job: tuple[str, Path, Path, float, str, list[str]]) -> dict[str, Any]:
    """Make a delta in a process of its own; return its sizes."""
    from lrc.compressors.deltas.make_delta import make_delta
    from lrc.compressors.io.files import new_folder, remove
    from lrc.configs.delta_methods import parse_delta_method

    torch.set_num_threads(2)
    base, tuned, folder, ratio, method, options = job
    remove(folder)
    with new_folder(folder) as partial:
        found = make_delta(base, tuned, partial, parse_delta_method(method, options))
    n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    shown = " ".join("calibrated" if "source" in each else each for each in options)
    return {"target": ratio, "method": method, "options": shown, "bytes": n_bytes} | found["sizes"]


def print_table(results: list[dict[str, Any]]) -> None:
    """Print all results."""
    print("| delta of | method | ratio | bits | files, KiB | relative error | accuracy |")
    print("|---|---|---|---|---|---|---|")
    for row in results:
        cells = [row["kind"], "", "", "", "", ""]
        if "method" in row:
            cells = [
                row["kind"],
                f"`{row['method']}` {row['options']}",
                f"{row['ratio']:.1f}",
                f"{row['bits_per_number']:.3f}",
                f"{row['bytes'] / 2**10:.0f}",
                f"{row['relative_error']:.3f}",
            ]
        print(f"| {' | '.join(cells)} | {row['accuracy']:.1%} |")


if __name__ == "__main__":
    main()
