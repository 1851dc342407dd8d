"""Statistics of padded pairs of texts are those of the same pairs without padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_encoder_decoders import save_encoder_decoder, tiny_encoder_decoder
from tests.tiny_encoders import WORDS, tiny_words
from tests.unpadded_sums import (
    EVERYTHING,
    Sums,
    assert_close,
    assert_same_sums,
    one_by_one,
    padded_context,
)
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from lrc.compressors.calibrate import statistics
from lrc.compressors.calibrate.batch_size import BATCH_TOKENS
from lrc.compressors.calibrate.calibration_context import CalibrationContext
from lrc.compressors.calibrate.calibration_passes import label_gradient
from lrc.compressors.calibrate.sequential_calibration import SequentialCalibration
from lrc.compressors.corpus.pairs import IGNORED, Pairs, split_windows, tokenize_pairs

LENGTHS = ((3, 4), (12, 2), (1, 9), (7, 3), (5, 6))  # words
SPECIAL = 2  # tokens around every text
FAMILIES = ("t5", "bart")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def batches_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch then has another mask, and the last has another size."""
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 2 * (12 + 9 + 2 * SPECIAL))


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + 5 * j) % len(WORDS)] for j in range(count))


def pairs(model: Any) -> Pairs:
    texts = [(words(i, source), words(3 * i, n)) for i, (source, n) in enumerate(LENGTHS)]
    return tokenize_pairs(texts, tiny_words(), model, length=32)


@pytest.fixture(params=FAMILIES)
def calibration(request: pytest.FixtureRequest, tmp_path: Path) -> CalibrationContext:
    folder = save_encoder_decoder(tmp_path / "model", request.param)
    return padded_context(folder, tmp_path / "out", pairs, "real")


def dense(context: CalibrationContext) -> Sums:
    """Return the sums of the model as transformers loads it."""
    folder = context.reader.folder  # type: ignore[attr-defined]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = pairs(model)

    def loss(row: int) -> Tensor:
        ids = found.sources[row : row + 1, found.source_mask[row]]
        labels = found.labels[row : row + 1, found.target_mask[row]]
        summed: Tensor = model(input_ids=ids, labels=labels).loss * labels.numel()
        return summed

    names = [linear.name for linear in context.architecture.linears]
    return one_by_one(model, names, len(LENGTHS), loss)


def test_statistics_are_those_of_unpadded_pairs(calibration: CalibrationContext) -> None:
    """Sums of gradients among them: in the encoder, those of the loss of the targets."""
    linears = calibration.architecture.linears
    statistics.collect(calibration, {linear.name: EVERYTHING for linear in linears})
    expected = dense(calibration)
    n_source, n_target = (sum(n) + SPECIAL * len(LENGTHS) for n in zip(*LENGTHS, strict=True))
    counts = set()
    for linear in linears:
        found = statistics.load(calibration.journal, linear.layer, linear.name)
        wanted, n_own = expected[linear.name], int(expected[linear.name]["n_tokens"])
        counts.add((linear.layer < calibration.architecture.n_encoder, n_own))
        assert found.n_tokens == n_target
        # On the scale of as many tokens as are predicted, see `build_statistics`.
        assert_same_sums(found, wanted, scale=n_target / n_own)
    assert counts == {(True, n_source), (False, n_source), (False, n_target)}


def test_compensation_sees_both_texts_without_padding(calibration: CalibrationContext) -> None:
    """A model that is not compressed lacks nothing, and what writes to the stream is found."""
    expected = dense(calibration)
    sequential, deficits = SequentialCalibration(calibration), []
    for layer in range(len(calibration.architecture.layers)):
        for group in sequential.groups(layer):
            found = sequential.measure(layer, group, deficit=True)
            for moment in (found.H, found.cross):
                assert_close(moment, expected[group[0]]["inputs"], group[0])
            for name, missing in found.deficit.items():
                deficits.append(name)
                assert float(missing.abs().max()) < 1e-3 * float(found.H.abs().max())
        sequential.advance(layer)
    expected_writers = {
        linear.name
        for linear in calibration.architecture.linears
        if linear.name.endswith((".o", ".wo"))
    }
    assert {*deficits} == expected_writers  # none in BART, where a norm follows each


def test_gradients_of_ignored_labels_are_zero() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, IGNORED], [IGNORED, 4, 0]])
    leaf = logits.clone().requires_grad_()
    loss = nn.functional.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(loss, leaf)
    found = label_gradient(logits, labels, "real", torch.Generator())
    torch.testing.assert_close(found, expected)
    drawn = label_gradient(logits, labels, "sampled", torch.Generator().manual_seed(0))
    assert not bool(drawn[labels == IGNORED].any())
    assert bool((drawn[labels != IGNORED].abs().amax(-1) > 0).all())


@pytest.mark.parametrize("bos", [True, False])
def test_halves_of_windows(bos: bool) -> None:
    """Source and target make up the window; the decoder reads every token before it predicts it."""
    model = tiny_encoder_decoder("t5")
    windows = torch.arange(4, 4 + 2 * 7).view(2, 7)
    found = split_windows(windows, model, bos=bos)
    half = 3
    assert found.n_source != found.labels.shape[1]
    for row in range(2):
        source = found.sources[row, found.source_mask[row]]
        assert source.tolist() == [*windows[row, :half].tolist(), 2]
        target = found.labels[row][found.labels[row] != IGNORED]
        assert target.tolist() == windows[row, half:].tolist()
        first = [1, int(windows[row, 0])] if bos else [1]
        assert found.inputs_of_decoder[row].tolist() == [*first, *windows[row, half:-1].tolist()]
    assert found.n_tokens == 2 * 4
