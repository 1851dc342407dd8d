"""Statistics of padded texts are those of the same texts without padding, one after the other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_encoders import FAMILIES, WORDS, save_encoder, tiny_words
from tests.unpadded_sums import EVERYTHING, assert_same_sums, one_by_one, padded_context
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.batch_size import BATCH_TOKENS
from lrc.compressors.calibrate.calibration_context import CalibrationContext, Labels
from lrc.compressors.calibrate.calibration_passes import output_gradient
from lrc.compressors.calibrate.sequential_calibration import SequentialCalibration
from lrc.compressors.corpus.sentences import Sentences, tokenize_sentences
from lrc.compressors.evaluate.encoder_outputs import mean_pooled

pytestmark = pytest.mark.usefixtures("one_thread")

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
    return padded_context(folder, output, lambda _: sentences(), labels)


def assert_same(
    ours: CalibrationContext, model: nn.Module, loss: Callable[[Tensor, int], Tensor]
) -> None:
    """Compare what was collected with the sums of a loss of tokens [1, length] and their number."""
    linears, texts = ours.architecture.linears, sentences()

    def of_row(row: int) -> Tensor:
        return loss(texts.tokens[row : row + 1, texts.mask[row]], row)

    expected = one_by_one(model, [linear.name for linear in linears], len(LENGTHS), of_row)
    for linear in linears:
        found, wanted = (
            statistics.load(ours.journal, linear.layer, linear.name),
            expected[linear.name],
        )
        assert found.n_tokens == sum(LENGTHS) + 2 * len(LENGTHS)
        assert found.n_tokens == wanted["n_tokens"]
        assert_same_sums(found, wanted)


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

    assert_same(ours, model, loss)


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

    assert_same(ours, model, loss)


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
