"""Encoder-decoder models, from a plan to a fresh process."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fresh_processes import FreshProcesses
from tests.padded_runs import (
    fresh_outputs,
    outputs_of,
    padded_batch,
    replace_weights_,
    write_task_recipe,
)
from tests.shared_runs import made_once
from tests.tiny_encoder_decoders import save_encoder_decoder, tiny_encoder_decoder, write_pairs
from tests.tiny_encoders import WORDS, tiny_words
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSeq2SeqLM

from lrc.compressors.io.machine import Machine
from lrc.compressors.pipeline import compress
from lrc.configs.load import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")

KFAC = {"decompose": {"method": "kfac", "keep": 0.6}}
STAGES: dict[str, dict[str, Any]] = {
    "kfac": {"decompose": {**KFAC["decompose"], "compensate": {}}},
    "gptq": {"quantize": {"method": "gptq", "bits": 8}},
}
CASES = [(family, method) for family in ("t5", "bart") for method in STAGES]


def write_recipe(folder: Path, model: Path, stage: dict[str, Any], **changes: Any) -> Path:
    """Write a recipe into the folder of its output; `changes` replace top-level keys."""
    task = {"data": str(write_pairs(folder / "pairs.jsonl")), "target": "target"}
    return write_task_recipe(folder, model, stage, task, **changes)


def write_text(path: Path) -> Path:
    words = (WORDS[(i * i + i // 3) % len(WORDS)] for i in range(600))
    path.write_text(" ".join(words), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Compress a case at the first request of any process; return the folder and the report.

    `kfac` of BART is calibrated and evaluated on a text, everything else on pairs.
    """

    def start(family: str, method: str) -> tuple[Path, dict[str, Any]]:
        def make(folder: Path) -> tuple[Path, dict[str, Any]]:
            model = save_encoder_decoder(folder / family, family)
            changes: dict[str, Any] = {}
            if (family, method) == ("bart", "kfac"):
                text = str(write_text(folder / "words.txt"))
                changes["calibration"] = {"source": text, "samples": 20, "length": 15}
                changes["evaluate"] = {
                    "perplexity": [{"source": text, "window": 15, "windows": 5}],
                    "generations": {"prompts": ["good film"], "tokens": 4},
                    "baselines": ["int8"],
                }
            recipe = write_recipe(folder, model, STAGES[method], **changes)
            return folder, compress(load_recipe(recipe), Machine("cpu"))

        found: tuple[Path, dict[str, Any]]
        found = made_once(tmp_path_factory, f"{family}-{method}", make, worker=worker_id)
        return found

    return start


def batch() -> dict[str, Tensor]:
    return {**padded_batch(), "decoder_input_ids": torch.tensor([[1, 0, 5, 9], [1, 0, 7, 4]])}


def load(folder: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()


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
            "-".join(case): (runs(*case)[0] / "run/checkpoint", "AutoModelForSeq2SeqLM")
            for case in CASES
        }
        return fresh_outputs(checkpoints, batch(), folder, with_lrc)

    found: dict[str, list[Any]]
    found = made_once(tmp_path_factory, "encoder-decoders-fresh", outputs, worker=worker_id)
    return found


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_fresh_process_computes_with_the_compressed_weights(
    case: tuple[str, str], runs: Any, fresh: Any, weights_of: Any
) -> None:
    """As the dense model does in which they take the place of the original ones.

    All linears of both stacks are among them, the last one of every layer of T5 too.
    """
    folder, report = runs(*case)
    dense = load(folder / case[0])
    before = outputs_of(dense, batch())
    weights = weights_of(folder / "run")
    assert len(weights) == len(report["layers"]) == 32
    replace_weights_(dense, weights, folder / "run/checkpoint")
    found = torch.tensor(fresh["-".join(case)])
    torch.testing.assert_close(found, outputs_of(dense, batch()), rtol=1e-4, atol=1e-4)
    assert float((found - before).abs().max()) > 1e-4


def test_the_perplexity_of_pairs_is_that_of_transformers(runs: Any) -> None:
    folder, report = runs("t5", "gptq")
    words, rows = tiny_words(), (folder / "pairs.jsonl").read_text().splitlines()
    entry = report["evaluation"]["tasks"]["pairs"]["perplexity"]
    for name, path in (("dense", folder / "t5"), ("compressed", folder / "run/checkpoint")):
        model, loss, count = load(path), 0.0, 0
        for row in map(json.loads, rows):  # one by one: without padding
            labels = words(text_target=row["target"], return_tensors="pt")["input_ids"]
            ids = words(row["text"], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                loss += float(model(input_ids=ids, labels=labels).loss) * labels.numel()
            count += labels.numel()
        assert entry[name] == pytest.approx(math.exp(loss / count), rel=1e-4)
        assert entry["stderr"][name] > 0
    assert report["evaluation"]["missing"] == []
    assert report["calibration"]["source"].endswith("pairs.jsonl")


def test_the_perplexity_of_a_text_is_that_of_second_halves(runs: Any) -> None:
    folder, report = runs("bart", "kfac")
    entry = report["evaluation"]["perplexity"]["words"]
    ids = tiny_words()((folder / "words.txt").read_text(), add_special_tokens=False)["input_ids"]
    losses = []
    model = load(folder / "bart")
    for number in range(5):
        window = [0, *ids[15 * number : 15 * (number + 1)]]  # with a BOS token
        source, target = [*window[:8], 2], window[8:]
        decoder = torch.tensor([[1, 0, *target[:-1]]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([source]), decoder_input_ids=decoder).logits
        losses.append(cross_entropy(logits[0, 1:], torch.tensor(target)))
    assert entry["dense"] == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-4)
    assert entry["tokens"] == 5 * 8
    evaluation = report["evaluation"]
    assert evaluation["kl"]["words"]["forward"] > 0
    assert [each["name"] for each in evaluation["baselines"]] == ["int8"]
    assert 1 <= evaluation["generations"][0]["new_tokens"]["dense"] <= 4
    assert report["calibration"]["tokens"] == 20 * 15


def test_keep_1_leaves_logits_unchanged(tmp_path: Path) -> None:
    """Everything but one matrix keeps all of its bits; that matrix keeps the same values."""
    dense = tiny_encoder_decoder("t5", tie_word_embeddings=False)
    low = dense.decoder.block[0].layer[2].DenseReluDense.wo
    with torch.no_grad():  # of rank 4, so that half of the bits lose nothing
        U, S, V = torch.linalg.svd(low.weight, full_matrices=False)
        low.weight.copy_((U[:, :4] * S[:4]) @ V[:4])
    model = tmp_path / "t5"
    dense.save_pretrained(model)
    tiny_words().save_pretrained(model)
    overrides = [{"match": "decoder.*.0.*.wo", "keep": 0.5}, {"match": "*", "keep": 1.0}]
    stage = {"method": "svd-llm", "keep": 0.99, "overrides": overrides}
    compress(load_recipe(write_recipe(tmp_path, model, {"decompose": stage})), Machine("cpu"))
    found = outputs_of(load(tmp_path / "run/checkpoint"), batch())
    torch.testing.assert_close(found, outputs_of(dense, batch()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["dense", "remote-code"])
def test_exports_compute_the_same(form: str, runs: Any, lrc: Any, tmp_path: Path) -> None:
    folder, _ = runs("t5", "kfac")
    checkpoint, out = folder / "run/checkpoint", tmp_path / "export"
    assert lrc("export", checkpoint, out, "--format", form).code == 0
    options = {"trust_remote_code": True} if form == "remote-code" else {}
    exported = AutoModelForSeq2SeqLM.from_pretrained(out, **options).eval()
    torch.testing.assert_close(outputs_of(exported, batch()), outputs_of(load(checkpoint), batch()))


def test_layers_that_are_kept_in_float32_run_in_float16(runs: Any) -> None:
    folder, _ = runs("t5", "kfac")
    checkpoint = folder / "run/checkpoint"
    half = AutoModelForSeq2SeqLM.from_pretrained(checkpoint, dtype=torch.float16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16, torch.float32}
    expected = outputs_of(load(checkpoint), batch())
    torch.testing.assert_close(outputs_of(half, batch()).float(), expected, rtol=0, atol=0.05)


def test_commands(runs: Any, lrc: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = runs("bart", "kfac")
    checkpoint = folder / "run/checkpoint"
    written = lrc("generate", checkpoint, "--prompt", "good film", "--tokens", "3")
    assert written.code == 0, written.err
    assert lrc("inspect", checkpoint, "--verify").code == 0
    refused: list[tuple[Any, ...]] = [
        ("bench", checkpoint),
        ("plan", folder / "recipe.yaml", "--profile", "2"),
    ]
    for command in refused:
        lrc(*command).refuses(1, "got an encoder-decoder model", code="invalid-model")
    options = ("--format", "drafter", "--parent", checkpoint)
    lrc("export", checkpoint, tmp_path / "out", *options).refuses(1, "got an encoder-decoder")
    # Before lm-eval is imported, which takes seconds.
    monkeypatch.setattr("lrc.cli.evaluate.check_tasks", None)
    lrc("eval", checkpoint, "--tasks", "none").refuses(1, "got an encoder-decoder", "--perplexity")


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder_decoder(tmp_path_factory.mktemp("models") / "bart", "bart")


def test_what_only_decoders_support_is_refused(lrc: Any, bart: Path, tmp_path: Path) -> None:
    """All of it by name, before any work starts."""
    task = {"data": str(write_pairs(tmp_path / "examples.jsonl")), "length": 16}
    latency = {"method": "mixed", "keep": 0.6, "measure": "latency", "targets": ["*.fc2"]}
    recipe = write_recipe(
        tmp_path,
        bart,
        {"slice": {"method": "drop", "keep": 0.5}},
        stages=[
            {"slice": {"method": "drop", "keep": 0.5}},
            {"decompose": {"method": "kfac", "elastic": [0.8, 0.6], "targets": ["*.fc1"]}},
            {"decompose": latency},
            {"quantize": {"method": "rtn", "bits": 8, "embeddings": "int8"}},
            {"heal": {"method": "distill", "tokens": 1000}},
        ],
        calibration={"source": "self", "length": 16},
        evaluate={"streaming": "always", "tasks": ["piqa"], "task": task},
    )
    ended = lrc("plan", recipe)
    refused = {
        "stages[0].slice",
        "stages[1].decompose.elastic",
        "stages[2].decompose.measure",
        "stages[3].quantize.embeddings",
        "stages[4].heal",
        "calibration.source",
        "evaluate.streaming",
        "evaluate.tasks",
        "evaluate.task.target",
    }
    words = ("writes no text without a source", "must name the column of the texts to write")
    ended.refuses(2, *words, count=len(refused), code="unsupported-by-model")
    for where in refused:
        assert f"]: {where}: " in ended.err, where


def test_lengths_must_fit_the_positions(lrc: Any, bart: Path, tmp_path: Path) -> None:
    task = {"data": str(write_pairs(tmp_path / "pairs.jsonl")), "target": "target", "length": 40}
    recipe = write_recipe(tmp_path, bart, KFAC, evaluate={"task": task})
    lrc("plan", recipe).refuses(2, "must be below 40", "got 40", where="evaluate.task.length")
    recipe = write_recipe(tmp_path, bart, KFAC, calibration={"source": "python-docs", "length": 3})
    lrc("plan", recipe).refuses(2, "must be at least 4", where="calibration.length")


def test_parts_of_encoder_decoder_models_are_refused(lrc: Any, tmp_path: Path) -> None:
    model = save_encoder_decoder(tmp_path / "t5", "t5")
    config = json.loads((model / "config.json").read_text())
    names = ["T5EncoderModel"]
    (model / "config.json").write_text(json.dumps(config | {"architectures": names}))
    recipe = write_recipe(tmp_path, model, KFAC)
    lrc("plan", recipe).refuses(1, "T5EncoderModel", code="invalid-model")
