"""Compress an encoder: accuracy of a classifier, and embeddings, by method and size.

usage: python tests/benchmarks/encoder.py KIND MODEL DATA FOLDER [--steps N] [--samples N]
           [--examples N] [--rows NAME ...]

MODEL is a folder with all-MiniLM-L6-v2, DATA one with train.jsonl and validation.jsonl of SST-2
(columns sentence and label). KIND is one of

classifier
    The model is first trained as a classifier, unless FOLDER/classifier exists, and then
    calibrated with the cross entropy of the labels.
embeddings
    The model is calibrated with the cosine distance of embeddings.

Each row is a run in FOLDER, which is not repeated if it is there. `keep` counts bits in bfloat16.
Scores are computed here, with one pass over the examples for a model.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lrc.compressors import pipeline
from lrc.compressors.checkpoint.reader import load_checkpoint, load_tokenizer
from lrc.compressors.corpus.sentences import Sentences, tokenize_sentences
from lrc.compressors.io.machine import release_memory
from lrc.configs.load import load_recipe

BATCH, RATE, LENGTH, WARM_UP = 32, 2e-4, 64, 20
CALIBRATION_LENGTH = 24  # few texts of the training set are longer
Stages = list[dict[str, Any]]


def main() -> None:
    options = arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = options.model
    if options.kind == "classifier":
        model = options.folder / "classifier"
        if not model.exists():
            train(options.model, options.data / "train.jsonl", model, options.steps)
    print("| stages | kept | file, MiB | accuracy | similarity |\n|---|---|---|---|---|")
    sentences = examples(model, options)
    dense = outputs(load_checkpoint(model, dtype=torch.float32), sentences)
    print(row("dense", {}, dense, dense), flush=True)
    for name, stages in rows():
        if options.rows and name not in options.rows:
            continue
        output = options.folder / f"{options.kind}-{name.replace(' ', '-').replace('.', '')}"
        if not (output / "report.json").exists():
            file = output.with_suffix(".yaml")
            file.write_text(yaml.safe_dump(recipe(model, options, stages, output)))
            pipeline.compress(load_recipe(file))
            release_memory()
        found = outputs(load_checkpoint(output / "checkpoint", dtype=torch.float32), sentences)
        report = json.loads((output / "report.json").read_text())
        print(row(name, report["size"], dense, found), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["classifier", "embeddings"])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--examples", type=int, default=872)
    parser.add_argument("--rows", nargs="+", help="such as 'mixed 0.5'; default: all")
    return parser.parse_args()


def rows() -> Iterator[tuple[str, Stages]]:
    """Yield names and stages; methods with their default options."""
    for method in ("svd", "fwsvd", "svd-llm", "kfac"):
        for keep in (0.7, 0.5):
            yield f"{method} {keep}", [{"decompose": {"method": method, "keep": keep}}]
    yield "rtn int8", [{"quantize": {"method": "rtn", "bits": 8}}]
    yield "rtn int4-g64", [{"quantize": {"method": "rtn", "bits": 4, "group_size": 64}}]
    yield "gptq int4-g64", [{"quantize": {"method": "gptq", "bits": 4, "group_size": 64}}]
    for keep in (0.7, 0.5):  # takes longest
        yield f"mixed {keep}", [{"decompose": {"method": "mixed", "keep": keep}}]


def recipe(
    model: Path, options: argparse.Namespace, stages: Stages, output: Path
) -> dict[str, Any]:
    data = str(options.data / "train.jsonl")
    task: dict[str, Any] = {"data": data, "text": "sentence", "length": CALIBRATION_LENGTH}
    if options.kind == "classifier":
        task["label"] = "label"
    return {
        "model": str(model),
        "calibration": {"task": task, "samples": options.samples},
        "stages": stages,
        "output": str(output),
    }


def examples(model: Path, options: argparse.Namespace) -> Sentences:
    lines = (options.data / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines[: options.examples]]
    return tokenize_sentences(
        [(each["sentence"],) for each in found],
        load_tokenizer(model),
        length=LENGTH,
        labels=[each["label"] for each in found],
    )


Outputs = tuple[Tensor | None, Tensor]
"""Whether each example is classified correctly, and its mean-pooled embedding."""


@torch.inference_mode()
def outputs(model: Any, sentences: Sentences) -> Outputs:
    correct, embeddings = [], []
    for part in sentences.batches(BATCH):
        inputs = part.inputs("cpu")
        found = model(**inputs, output_hidden_states=True)
        mask = inputs["attention_mask"][..., None].float()
        embeddings.append((found.hidden_states[-1] * mask).sum(dim=1) / mask.sum(dim=1))
        if "logits" in found:
            correct.append((found.logits.argmax(dim=-1) == part.labels).double())
    return torch.cat(correct) if correct else None, torch.cat(embeddings)


def row(name: str, size: dict[str, Any], dense: Outputs, found: Outputs) -> str:
    correct, embeddings = found
    cosines = torch.cosine_similarity(dense[1].double(), embeddings.double())
    cells = [
        name,
        f"{size['targeted']['kept']:.3f}" if size else "1",
        f"{size['model']['file_bytes']['compressed'] / 2**20:.1f}" if size else "",
        "" if correct is None else with_error(100 * correct, "{:.1f}") + " %",
        with_error(cosines, "{:.4f}"),
    ]
    return f"| {' | '.join(cells)} |"


def with_error(values: Tensor, form: str) -> str:
    error = float(values.std()) / len(values) ** 0.5
    return f"{form.format(float(values.mean()))} ± {form.format(error)}"


def train(source: Path, data: Path, folder: Path, steps: int) -> None:
    """Fine-tune all weights with a new head on random examples."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    examples = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, (steps - step) / (steps - WARM_UP))
    )
    chosen = torch.randperm(len(examples))[: steps * BATCH].tolist()
    # Batches of texts of similar length need little padding.
    chosen.sort(key=lambda index: len(examples[index]["sentence"]))
    batches = [chosen[start : start + BATCH] for start in range(0, len(chosen), BATCH)]
    model.train()
    for step, number in enumerate(torch.randperm(steps).tolist()):
        part = [examples[index] for index in batches[number]]
        texts = [each["sentence"] for each in part]
        inputs = tokenizer(
            texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        loss = model(**inputs, labels=torch.tensor([each["label"] for each in part])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
