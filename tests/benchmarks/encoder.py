"""Compress an encoder: accuracy of a classifier, and embeddings, by method and size.

usage: python tests/benchmarks/encoder.py MODEL DATA FOLDER [--steps N] [--samples N] [--only NAME]

MODEL is a folder with all-MiniLM-L6-v2, DATA one with train.jsonl and validation.jsonl of SST-2
(columns sentence and label). The model is trained as a classifier first, unless FOLDER/classifier
exists. Each row is then a run in FOLDER, which is not repeated if it is there: of the classifier,
calibrated with the cross entropy of the labels, and of the embedding model, calibrated with the
cosine distance of embeddings. `keep` counts bits in bfloat16.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lrc.compressors import pipeline
from lrc.compressors.io.machine import release_memory
from lrc.configs.load import load_recipe

BATCH, RATE, LENGTH, WARM_UP = 32, 2e-4, 64, 20
CALIBRATION_LENGTH = 32  # few texts of the training set are longer
Stages = list[dict[str, Any]]


def main() -> None:
    options = arguments()
    classifier = options.folder / "classifier"
    if not classifier.exists():
        train(options.model, options.data / "train.jsonl", classifier, options.steps)
    models = {"classifier": classifier, "embeddings": options.model}
    print(
        "| stages | kept | file, MiB | accuracy | similarity, classifier | similarity, embeddings |"
    )
    print("|---|---|---|---|---|---|")
    for name, stages in rows():
        if options.only and options.only not in name:
            continue
        found = {}
        for kind, model in models.items():
            output = options.folder / f"{kind}-{name.replace(' ', '-').replace('.', '')}"
            if not (output / "report.json").exists():
                file = output.with_suffix(".yaml")
                file.write_text(yaml.safe_dump(recipe(kind, model, options, stages, output)))
                pipeline.compress(load_recipe(file))
                release_memory()
            found[kind] = json.loads((output / "report.json").read_text())
        print(row(name, **found), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--only", default="")
    return parser.parse_args()


def rows() -> Iterator[tuple[str, Stages]]:
    """Yield names and stages; low-rank methods as published, then those of lrc."""
    for keep in (0.7, 0.5):
        for method in ("svd", "fwsvd", "svd-llm"):
            yield f"{method} {keep}", [{"decompose": {"method": method, "keep": keep}}]
        for method in ("kfac", "mixed"):
            stage = {"method": method, "keep": keep, "compensate": {}}
            yield f"{method} {keep}", [{"decompose": stage}]
    yield "rtn int8", [{"quantize": {"method": "rtn", "bits": 8}}]
    yield "rtn int4-g64", [{"quantize": {"method": "rtn", "bits": 4, "group_size": 64}}]
    gptq = {"method": "gptq", "bits": 4, "group_size": 64, "compensate": {}}
    yield "gptq int4-g64", [{"quantize": gptq}]


def recipe(
    kind: str, model: Path, options: argparse.Namespace, stages: Stages, output: Path
) -> dict[str, Any]:
    task = {"text": "sentence", "length": LENGTH}
    if kind == "classifier":
        task["label"] = "label"
    return {
        "model": str(model),
        "calibration": {
            "task": {
                **task,
                "data": str(options.data / "train.jsonl"),
                "length": CALIBRATION_LENGTH,
            },
            "samples": options.samples,
        },
        "stages": stages,
        "evaluate": {
            "task": {"data": str(options.data / "validation.jsonl"), "name": "sst2", **task}
        },
        "output": str(output),
    }


def row(name: str, classifier: dict[str, Any], embeddings: dict[str, Any]) -> str:
    scores = classifier["evaluation"]["tasks"]["sst2"]
    size = classifier["size"]["model"]["file_bytes"]["compressed"] / 2**20
    kept = classifier["size"]["targeted"]["kept"]
    similarities = (scores, embeddings["evaluation"]["tasks"]["sst2"])
    cells = [
        f"{kept:.3f}",
        f"{size:.1f}",
        percent(scores["accuracy"]),
        *(f"{each['similarity']['compressed']:.4f}" for each in similarities),
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def percent(entry: dict[str, Any]) -> str:
    return (
        f"{entry['compressed']:.1%} ± {entry['stderr']['compressed']:.1%} "
        f"(dense {entry['dense']:.1%})"
    )


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
