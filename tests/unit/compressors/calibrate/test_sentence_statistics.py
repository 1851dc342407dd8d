"""Statistics of padded texts are those of the same texts without padding, one after the other."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_encoders import FAMILIES, WORDS, save_encoder, tiny_words
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.calibration_context import CalibrationContext, Labels
from lrc.compressors.calibrate.calibration_passes import output_gradient
from lrc.compressors.calibrate.layer_check import build_checked
from lrc.compressors.calibrate.layer_executor import BATCH_TOKENS
from lrc.compressors.calibrate.sequential_calibration import SequentialCalibration
from lrc.compressors.corpus.sentences import Sentences, tokenize_sentences
from lrc.compressors.evaluate.encoder_outputs import mean_pooled
from lrc.compressors.io.journal import Journal
from lrc.compressors.models.source import locate
from lrc.compressors.models.weights import WeightReader
from lrc.configs.recipe import Model

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = frozenset(
    {"inputs", "gradients", "input_mean", "input_magnitude", "row_fisher", "whole_inputs"}
    | {"whole_gradients"}
)
LENGTHS = (3, 12, 1, 7, 5)  # words


@pytest.fixture(autouse=True)
def batches_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch then has another mask, and the last has another size."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 2 * (max(LENGTHS) + 2))


def sentences() -> Sentences:
    texts = [
        (" ".join(WORDS[(i + j) % len(WORDS)] for j in range(n)),) for i, n in enumerate(LENGTHS)
    ]
    return tokenize_sentences(texts, tiny_words(), length=32, labels=[0, 1, 2, 0, 2])


def context(folder: Path, output: Path, labels: Labels) -> CalibrationContext:
    architecture = build_checked(locate(Model(path=str(folder), dtype="float32")))
    journal = Journal(output)
    journal.work.mkdir(parents=True)
    found = sentences()
    return CalibrationContext(
        architecture,
        WeightReader(folder, architecture),
        lambda: found.tokens,
        journal,
        device="cpu",
        memory_limit_gib=1.0,
        seed=0,
        on_step=lambda *_: None,
        labels=labels,
        sentences=lambda: found,
    )


def one_by_one(model: nn.Module, names: list[str], loss: Any) -> dict[str, dict[str, Tensor]]:
    """Sum inputs, gradients and Fisher information over unpadded texts, by plain autograd."""
    sums: dict[str, dict[str, Any]] = {name: {} for name in names}

    def add(name: str, key: str, value: Tensor) -> None:
        sums[name][key] = sums[name].get(key, 0) + value.double()

    def see(name: str, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0].detach()[0]
        add(name, "inputs", x.T @ x)
        add(name, "input_mean", x.sum(0))
        add(name, "input_magnitude", x.abs().sum(0))
        add(name, "n_tokens", torch.tensor(len(x)))
        y.register_hook(lambda g: add(name, "gradients", g[0].T @ g[0]))

    found = sentences()
    for row, mask in enumerate(found.mask):
        ids = found.tokens[row : row + 1, mask]
        hooks = [
            model.get_submodule(name).register_forward_hook(partial(see, name)) for name in names
        ]
        weights = [model.get_submodule(name).weight for name in names]
        gradients = torch.autograd.grad(loss(ids, row), weights)
        for hook in hooks:
            hook.remove()
        for name, gradient in zip(names, gradients, strict=True):
            add(name, "row_fisher", gradient.square().sum(dim=1))
    return sums


def assert_same(journal: Journal, linears: Any, expected: dict[str, dict[str, Tensor]]) -> None:
    for linear in linears:
        found = statistics.load(journal, linear.layer, linear.name)
        assert found.n_tokens == sum(LENGTHS) + 2 * len(LENGTHS)
        assert found.n_tokens == expected[linear.name]["n_tokens"]
        assert found.inputs is not None
        assert found.gradients is not None
        values = {
            "inputs": found.inputs.full,
            "gradients": found.gradients.full,
            "row_fisher": found.row_fisher,
            "input_mean": found.input_mean,
            "input_magnitude": found.input_magnitude,
        }
        for key, value in values.items():
            assert value is not None, key
            wanted = expected[linear.name][key]
            scale = wanted.abs().max()
            torch.testing.assert_close(value.double() / scale, wanted / scale, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_a_task_are_those_of_its_unpadded_texts(family: str, tmp_path: Path) -> None:
    """Fisher information among them: that of the cross entropy of the labels, text by text."""
    folder = save_encoder(tmp_path / "model", family, classifies=True)
    ours = context(folder, tmp_path / "out", "real")
    linears = ours.architecture.linears
    statistics.collect(ours, {linear.name: EVERYTHING for linear in linears})
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    labels = sentences().labels

    def loss(ids: Tensor, row: int) -> Tensor:
        assert labels is not None
        return nn.functional.cross_entropy(model(input_ids=ids).logits, labels[row : row + 1])

    expected = one_by_one(model, [linear.name for linear in linears], loss)
    assert_same(ours.journal, linears, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_of_embeddings_are_those_of_the_cosine_distance(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same random directions; their second moment is the Hessian of the distance."""
    folder = save_encoder(tmp_path / "model", family, classifies=False)
    ours = context(folder, tmp_path / "out", "model")
    found = sentences()
    drawn = torch.randn(len(found.tokens), 32, generator=torch.Generator().manual_seed(1))
    rows = iter(drawn)

    def draw(shape: tuple[int, int], **_: object) -> Tensor:
        return torch.stack([next(rows) for _ in range(shape[0])])

    monkeypatch.setattr("lrc.compressors.calibrate.calibration_passes.torch.randn", draw)
    used = ours.architecture.linears
    statistics.collect(ours, {linear.name: EVERYTHING for linear in used})
    monkeypatch.undo()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def loss(ids: Tensor, row: int) -> Tensor:
        part = Sentences(ids, torch.ones_like(ids, dtype=torch.bool))
        return (mean_pooled(model, part, "cpu")[0] * drawn[row]).sum()

    assert_same(ours.journal, used, one_by_one(model, [linear.name for linear in used], loss))


def test_compensation_sees_no_padding(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "model", "bert", classifies=True)
    ours = context(folder, tmp_path / "out", "model")
    sequential = SequentialCalibration(ours)
    first, *_ = sequential.groups(0)
    found = sequential.measure(0, first, deficit=False)
    texts = sentences()
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        x = model.base_model.embeddings(input_ids=texts.tokens)[texts.mask].double()
    torch.testing.assert_close(found.H.double(), x.T @ x, rtol=1e-4, atol=1e-3)
    assert sequential.n_tokens == len(x)


@pytest.mark.parametrize(
    ("problem", "hessian"),
    [
        (
            "single_label_classification",
            lambda z: z.softmax(0).diag() - torch.outer(z.softmax(0), z.softmax(0)),
        ),
        ("multi_label_classification", lambda z: (z.sigmoid() * (1 - z.sigmoid())).diag()),
        ("regression", lambda z: torch.eye(len(z))),
    ],
)
def test_gradients_have_the_second_moment_of_the_hessian(problem: str, hessian: Any) -> None:
    outputs = torch.tensor([0.5, -1.0, 2.0])
    many = outputs.expand(200_000, 3)
    generator = torch.Generator().manual_seed(0)
    g = output_gradient(many, None, problem, "model", generator)
    torch.testing.assert_close(g.T @ g / len(g), hessian(outputs), rtol=0, atol=0.01)
