"""Encoders with and without a classification head, from a plan to a fresh process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.fresh_processes import FreshProcesses
from tests.padded_runs import (
    fresh_outputs,
    outputs_of,
    padded_batch,
    replace_weights_,
    write_task_recipe,
)
from tests.shared_runs import made_once
from tests.tiny_encoders import (
    FAMILIES,
    LABELS,
    save_encoder,
    tiny_encoder,
    tiny_words,
    write_examples,
)
from transformers import AutoModelForSequenceClassification

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.errors import CheckpointError
from lrc.configs.load import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

KFAC = {"decompose": {"method": "kfac", "keep": 0.6, "compensate": {}}}
GPTQ = {"quantize": {"method": "gptq", "bits": 8}}
STAGES: dict[str, dict[str, Any]] = {
    "kfac": KFAC,
    "mixed": {"decompose": {"method": "mixed", "keep": 0.6}},
    "svd-llm": {"decompose": {"method": "svd-llm", "keep": 0.6}},
    "fwsvd": {"decompose": {"method": "fwsvd", "keep": 0.6}},
    "svd": {"decompose": {"method": "svd", "keep": 0.6}},
    "gptq": GPTQ,
}
HEADS = {"classifier": True, "embeddings": False}
CLASSES = {"classifier": "AutoModelForSequenceClassification", "embeddings": "AutoModel"}
CASES = [(family, head, "kfac") for family in FAMILIES for head in HEADS]
CASES += [("bert", "classifier", "gptq"), ("roberta", "embeddings", "gptq")]
CASES += [("bert", "classifier", name) for name in ("mixed", "fwsvd")]


def write_recipe(folder: Path, model: Path, stage: dict[str, Any], **changes: Any) -> Path:
    """Write a recipe into the folder of its output; `changes` replace top-level keys."""
    task = {"data": str(write_examples(folder / "examples.jsonl")), "text": "sentence"}
    if "classifier" in model.name:
        task["label"] = "label"
    return write_task_recipe(folder, model, stage, task, **changes)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Compress a case at the first request of any process; return the folder and the report."""

    def start(family: str, head: str, method: str) -> tuple[Path, dict[str, Any]]:
        def make(folder: Path) -> tuple[Path, dict[str, Any]]:
            model = save_encoder(folder / f"{family}-{head}", family, classifies=HEADS[head])
            recipe = write_recipe(folder, model, STAGES[method])
            return folder, compress(load_recipe(recipe), Machine("cpu"))

        name = f"{family}-{head}-{method}"
        found: tuple[Path, dict[str, Any]]
        found = made_once(tmp_path_factory, name, make, worker=worker_id)
        return found

    return start


def load(folder: Path, head: str) -> Any:
    return getattr(transformers, CLASSES[head]).from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def fresh(
    runs: Any,
    tmp_path_factory: pytest.TempPathFactory,
    worker_id: str,
    with_lrc: FreshProcesses,
) -> dict[str, list[Any]]:
    """Load all checkpoints in a process without anything of this one; return their outputs."""

    def outputs(folder: Path) -> Any:
        checkpoints = {
            "-".join(case): (runs(*case)[0] / "run/checkpoint", CLASSES[case[1]]) for case in CASES
        }
        return fresh_outputs(checkpoints, padded_batch(), folder, with_lrc)

    found: dict[str, list[Any]]
    found = made_once(tmp_path_factory, "encoders-fresh", outputs, worker=worker_id)
    return found


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_fresh_process_computes_with_the_compressed_weights(
    case: tuple[str, str, str], runs: Any, fresh: Any, weights_of: Any
) -> None:
    """As the dense model does in which they take the place of the original ones."""
    folder, report = runs(*case)
    family, head, _ = case
    dense = load(folder / f"{family}-{head}", head)
    before = outputs_of(dense, padded_batch())
    weights = weights_of(folder / "run")
    assert len(weights) == len(report["layers"]) > 0
    replace_weights_(dense, weights, folder / "run/checkpoint")
    found = torch.tensor(fresh["-".join(case)])
    torch.testing.assert_close(found, outputs_of(dense, padded_batch()), rtol=1e-4, atol=1e-4)
    assert float((found - before).abs().max()) > 1e-4


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_scores_are_those_of_transformers(case: tuple[str, str, str], runs: Any) -> None:
    folder, report = runs(*case)
    family, head, _ = case
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    models = {
        "dense": load(folder / f"{family}-{head}", head),
        "compressed": load(folder / "run/checkpoint", head),
    }
    labels = [row["label"] for row in rows]
    correct: dict[str, list[bool]] = {name: [] for name in models}
    cosines = []
    for row in rows:  # one by one: without padding
        inputs = {"input_ids": tiny_words()(row["sentence"], return_tensors="pt")["input_ids"]}
        embedded = []
        for name, model in models.items():
            with torch.no_grad():
                # The whole model first: packed integers of transformers are expanded by that.
                whole = model(**inputs)
                embedded.append(model.base_model(**inputs)[0][0].mean(0))
                if HEADS[head]:
                    correct[name].append(int(whole.logits.argmax()) == row["label"])
        cosines.append(float(torch.cosine_similarity(*embedded, dim=0)))
    scores = report["evaluation"]["tasks"]["examples"]
    values = torch.tensor(cosines, dtype=torch.float64)
    assert scores["similarity"]["compressed"] == pytest.approx(float(values.mean()), abs=1e-5)
    error = float(values.std()) / len(rows) ** 0.5
    assert scores["similarity"]["stderr"]["compressed"] == pytest.approx(error, abs=1e-5)
    assert report["evaluation"]["missing"] == []
    if not HEADS[head]:
        assert scores.keys() == {"similarity"}
        return
    for name, found in correct.items():
        p, n = sum(found) / len(labels), len(labels)
        assert scores["accuracy"][name] == pytest.approx(p)
        spread = (p * (1 - p) / (n - 1)) ** 0.5
        assert scores["accuracy"]["stderr"][name] == pytest.approx(spread)


def test_keep_1_leaves_outputs_unchanged(tmp_path: Path) -> None:
    """Everything but one matrix keeps all of its bits; that matrix keeps the same values."""
    dense = tiny_encoder("bert", classifies=True)
    low = dense.bert.encoder.layer[0].attention.self.query
    with torch.no_grad():  # of rank 4, so that half of the bits lose nothing
        U, S, V = torch.linalg.svd(low.weight)
        low.weight.copy_((U[:, :4] * S[:4]) @ V[:4])
    model = tmp_path / "bert-classifier"
    dense.save_pretrained(model)
    tiny_words().save_pretrained(model)
    overrides = [{"match": "*.layer.0.*.query", "keep": 0.5}, {"match": "*", "keep": 1.0}]
    stage = {"method": "svd-llm", "keep": 0.99, "overrides": overrides}
    compress(load_recipe(write_recipe(tmp_path, model, {"decompose": stage})), Machine("cpu"))
    found = outputs_of(load(tmp_path / "run/checkpoint", "classifier"), padded_batch())
    torch.testing.assert_close(found, outputs_of(dense, padded_batch()), rtol=0, atol=1e-4)


def test_labels_of_the_task_are_the_default(tmp_path: Path) -> None:
    recipe = load_recipe(
        write_recipe(tmp_path, tmp_path / "bert-classifier", STAGES["fwsvd"])
    ).recipe
    assert recipe.calibration.labels == "real"
    recipe = load_recipe(write_recipe(tmp_path, tmp_path / "bert", STAGES["fwsvd"])).recipe
    assert recipe.calibration.labels == "model"


def test_a_text_can_calibrate_too(tmp_path: Path, tiny_text: Path) -> None:
    model = save_encoder(tmp_path / "bert-classifier", "bert", classifies=True)
    calibration = {"source": str(tiny_text), "samples": 6, "length": 16}
    recipe = write_recipe(tmp_path, model, KFAC, calibration=calibration)
    report = compress(load_recipe(recipe), Machine("cpu"))
    assert report["calibration"]["source"] == str(tiny_text)
    assert report["calibration"]["tokens"] == 6 * 16


def test_pairs_of_texts_and_names_of_classes(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert-classifier", "bert", classifies=True)
    rows = [
        json.loads(line)
        for line in write_examples(tmp_path / "x.jsonl").read_text().split("\n")
        if line
    ]
    lines = ["sentence,other,label"]
    lines += [f"{row['sentence']},{row['other']},{LABELS[row['label']]}" for row in rows]
    (tmp_path / "pairs.csv").write_text("\n".join(lines), encoding="utf-8")
    task = {"data": str(tmp_path / "pairs.csv"), "text": ["sentence", "other"], "label": "label"}
    recipe = write_recipe(
        tmp_path,
        model,
        STAGES["fwsvd"],
        calibration={"task": {**task, "length": 20}, "samples": 20},
        evaluate={
            "task": {**task, "length": 20, "samples": 8},
            "gates": ["tasks.pairs.accuracy >= 0"],
        },
    )
    report = compress(load_recipe(recipe), Machine("cpu"))
    assert report["evaluation"]["tasks"]["pairs"]["accuracy"]["documents"] == 8
    assert report["recipe"]["calibration"]["labels"] == "real"


@pytest.mark.parametrize("form", ["dense", "remote-code"])
def test_exports_compute_the_same(form: str, runs: Any, lrc: Any, tmp_path: Path) -> None:
    folder, _ = runs("bert", "classifier", "svd-llm")
    checkpoint, out = folder / "run/checkpoint", tmp_path / "export"
    assert lrc("export", checkpoint, out, "--format", form).code == 0
    options = {"trust_remote_code": True} if form == "remote-code" else {}
    exported = AutoModelForSequenceClassification.from_pretrained(out, **options).eval()
    expected = outputs_of(load(checkpoint, "classifier"), padded_batch())
    torch.testing.assert_close(outputs_of(exported, padded_batch()), expected, rtol=1e-4, atol=1e-4)


def test_an_encoder_cannot_draft(runs: Any, lrc: Any, tmp_path: Path) -> None:
    folder, _ = runs("bert", "classifier", "svd-llm")
    checkpoint = folder / "run/checkpoint"
    options = ("--format", "drafter", "--parent", checkpoint)
    lrc("export", checkpoint, tmp_path / "out", *options).refuses(1, "got an encoder")


def test_a_missing_head_is_an_error(runs: Any, tmp_path: Path) -> None:
    """It would be drawn at random otherwise."""
    folder, _ = runs("bert", "classifier", "svd-llm")
    checkpoint = Path(shutil.copytree(folder / "run/checkpoint", tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        load(checkpoint, "classifier")


def test_modules_of_sentence_transformers_come_with_the_result(tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert-embeddings", "bert", classifies=False)
    folders = ["", "1_Pooling", "2_Normalize", "../outside"]
    (model / "modules.json").write_text(json.dumps([{"path": each} for each in folders]))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling/config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/config.json").write_text("{}")
    compress(load_recipe(write_recipe(tmp_path, model, STAGES["svd"])), Machine("cpu"))
    checkpoint = tmp_path / "run/checkpoint"
    assert (checkpoint / "modules.json").is_file()
    found = (checkpoint / "1_Pooling/config.json").read_text()
    assert found == '{"pooling_mode_mean_tokens": true}'
    assert not (tmp_path / "run/outside").exists()


REFUSED: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "slice": ({"stages": [{"slice": {"method": "drop", "keep": 0.5}}]}, "stages[0].slice", ()),
    "heal": (
        {"stages": [KFAC, {"heal": {"method": "distill", "tokens": 1000}}]},
        "stages[1].heal",
        ("an encoder",),
    ),
    "perplexity": ({"evaluate": {"perplexity": ["c4"]}}, "evaluate.perplexity", ("task",)),
    "lm-eval": ({"evaluate": {"tasks": ["piqa"]}}, "evaluate.tasks", ("evaluate.task",)),
    "generations": (
        {"evaluate": {"generations": ["A film"]}},
        "evaluate.generations",
        ("causal language models",),
    ),
    "sampled from itself": (
        {"calibration": {"source": "self", "length": 16}},
        "calibration.source",
        ("writes no text",),
    ),
    "too long": (
        {"calibration": {"source": "python-docs", "length": 64}},
        "calibration.length",
        ("must be at most 40", "got 64"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_only_causal_models_support_is_refused(case: str, lrc: Any, tmp_path: Path) -> None:
    changes, where, words = REFUSED[case]
    model = save_encoder(tmp_path / "bert-classifier", "bert", classifies=True)
    recipe = write_recipe(tmp_path, model, KFAC, **changes)
    lrc("plan", recipe).refuses(2, *words, where=where)


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("tasks.examples.accuracy >= 0.5", ()),
        ("tasks.examples.similarity >= 0.9x", ("is a comparison with the dense model already",)),
        ("tasks.examples.f1 >= 0.5", ("no evaluated metric is named 'tasks.examples.f1'",)),
    ],
)
def test_gates_name_what_is_measured(
    gate: str, words: tuple[str, ...], lrc: Any, tmp_path: Path
) -> None:
    model = save_encoder(tmp_path / "bert-classifier", "bert", classifies=True)
    recipe = write_recipe(tmp_path, model, KFAC)
    ended = lrc("plan", recipe, f"evaluate.gates=[{gate}]")
    if words:
        ended.refuses(2, *words)
    else:
        assert ended.code == 0, ended.err


def test_labels_need_a_head(lrc: Any, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert-classifier", "bert", classifies=False)
    lrc("plan", write_recipe(tmp_path, model, KFAC)).refuses(
        2, "BertModel has no classification head", count=2, where="evaluate.task.label"
    )


def test_positions_of_padding_do_not_count(lrc: Any, tmp_path: Path) -> None:
    """RoBERTa numbers positions from the one after the padding token."""
    model = save_encoder(tmp_path / "roberta-classifier", "roberta", classifies=True)
    calibration = {"source": "python-docs", "length": 39}
    recipe = write_recipe(tmp_path, model, KFAC, calibration=calibration)
    lrc("plan", recipe).refuses(2, "must be at most 38", where="calibration.length")


def test_causal_models_have_no_task(lrc: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_model_folder, KFAC)
    lrc("plan", recipe).refuses(2, "is for encoders", count=2, where="calibration.task")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BertForMaskedLM", "it predicts masked tokens"),
        ("BertForTokenClassification", "describes a BertForTokenClassification"),
    ],
)
def test_other_heads_are_refused(name: str, words: str, lrc: Any, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert-classifier", "bert", classifies=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    lrc("plan", write_recipe(tmp_path, model, KFAC)).refuses(1, words, code="invalid-model")


def test_commands_for_causal_models_refuse_encoders(lrc: Any, tmp_path: Path) -> None:
    model = save_encoder(tmp_path / "bert-classifier", "bert", classifies=True)
    for command in (
        ("eval", model, "--perplexity", "python-docs"),
        ("generate", model, "--prompt", "A film"),
        ("bench", model),
    ):
        lrc(*command).refuses(1, "got an encoder", code="invalid-model")
    recipe = write_recipe(tmp_path, model, KFAC)
    lrc("plan", recipe, "--profile", "2").refuses(1, "got an encoder", code="invalid-model")
